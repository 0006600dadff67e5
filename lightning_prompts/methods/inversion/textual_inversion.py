"""Textual inversion (arXiv 2208.01618): embeddings for a new pseudo-word that describes the images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from lightning_prompts.backbones.embedding_files import pack_embedding
from lightning_prompts.backbones.vocabulary import fill_template, fillers
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.gradient import GradientInverter
from lightning_prompts.methods.inversion.token_embeddings import DecodedPrompt
from lightning_prompts.runs.record import Problem

PSEUDO_WORD = r"<[a-z0-9-]+-[0-9a-f]{8}>"


class TextualInversion(GradientInverter):
    """Optimize free embeddings on the denoising loss, without projecting them.

    The prompt of a problem has a pseudo-word in angle brackets for its M embeddings. They are in the record, in
    `embedding.safetensors` and, for other tools, in a file of their own in `embeddings/`. In `test` and `predict`, any
    text may have pseudo-words of the run.

    A text encoder that is not searched, such as the CLIP of FLUX, always reads the pseudo-word as text: during the
    search, in scoring and in generated images, as in diffusers after `load_textual_inversion` into the other encoders.

    Args:
        optimizer: Optimizer of the embeddings; AdamW is that of the released code.
        **kwargs: See `Inverter`.
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-3, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)

    def decode(self, rows: Tensor) -> tuple[list[DecodedPrompt], Tensor]:
        """Return the pseudo-words with their embeddings, and the encoded prompts (Q, R, D)."""
        texts = self.texts(rows)
        ids, embeddings = self.prompt(rows.to(self.device))
        prompt_embeds = self.backbone.encode(ids, embeddings, texts=texts)
        learned = self.prompt.embeddings.detach()[rows.to(self.device)].tolist()
        decoded = [DecodedPrompt(text, None, embedding) for text, embedding in zip(texts, learned, strict=True)]
        return decoded, prompt_embeds

    def texts(self, rows: Tensor) -> list[str]:
        """Return the pseudo-words of the problems `rows` (Q,) in the template."""
        return [fill_template(self.template, pseudo_word(self.batch[row].record)) for row in rows.tolist()]

    def encode(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encode texts, which may have pseudo-words of this run, to (P, R, D)."""
        return torch.cat([self._encode(text, negative) for text in texts])

    def _encode(self, text: str, negative: bool) -> Tensor:
        known = {word: self.embeddings_of(self._record(word)) for word in re.findall(PSEUDO_WORD, text)}
        if not known:
            return super().encode([text], negative)
        parts = re.split(f"({'|'.join(map(re.escape, known))})", text)
        learned = torch.cat([known[part] for part in parts if part in known]).to(self.prompt.table)
        # With two different fillers in place of the pseudo-words, the tokens that differ are the positions of the
        # embeddings.
        filled = [
            " ".join(" ".join([word] * len(known[part])) if part in known else part.strip() for part in parts)
            for word in fillers(self.vocabulary.tokenizer)
        ]
        ids, others = self.vocabulary.encode_text(filled).to(self.device)
        positions = (ids != others).nonzero().squeeze(1)
        embeddings = self.prompt.table[ids].index_copy(0, positions, learned)
        return self.backbone.encode(ids[None], embeddings[None], texts=[text], negative=negative)

    def _record(self, word: str) -> Problem:
        """Return the record of a pseudo-word."""
        key_start, folder = word[-9:-1], self.data.folder
        files = [file.stem for file in folder.problems.glob(f"{key_start}*.json")]
        for problem in (*self.batch.records, *map(folder.read, files)):
            if problem and problem.embedding and pseudo_word(problem) == word:
                return problem
        known = [pseudo_word(problem) for problem in islice(folder.with_prompt(), 5)]
        raise UserError(f"This run has no pseudo-word {word}; it has {', '.join(known) or 'none yet'}.")

    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score the prompts, and write a file per problem that diffusers, AUTOMATIC1111 and ComfyUI read."""
        super().final_evaluation(problems, scores)
        for problem in problems:
            word = pseudo_word(problem)
            content = pack_embedding(self.embeddings_of(problem), self.backbone, word)
            self.data.folder.write(self.data.folder.embeddings / f"{word[1:-1]}.safetensors", content)


def pseudo_word(problem: Problem) -> str:
    """Return the pseudo-word of a problem's embeddings, such as `<fox-3fa9c01d>`."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(problem.target).stem.lower()).strip("-") or "image"
    return f"<{name}-{problem.key[:8]}>"
