"""Textual inversion (arXiv 2208.01618): a picture to a new pseudo-word, which is no text but says more than text can."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.backbones.embedding_files import pack_embedding
from lightning_prompts.backbones.vocabulary import fill_template, fillers
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.base import Found, Inverter
from lightning_prompts.optimizers import BatchedAdam
from lightning_prompts.runs.record import Problem
from lightning_prompts.types import Rate

PSEUDO_WORD = r"<[a-z0-9-]+-[0-9a-f]{8}>"


class TextualInversion(Inverter):
    """Adam on the denoising loss of free embeddings, which are never projected.

    The prompt of a problem holds a pseudo-word in angle brackets that stands for its M embeddings; they are in the record, in
    `embedding.safetensors`, and, for other tools, in a file of their own in `embeddings/`. In `test` and `predict` pseudo-words of the run may stand in any text, several in one.

    A text encoder that is not searched, such as the CLIP of FLUX, always reads the pseudo-word itself as text: during the search,
    when it is scored and when it is drawn. That is what diffusers gives it after `load_textual_inversion` into the others.

    Args:
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        **kwargs: See `Inverter`.
    """

    def __init__(self, *, lr: Rate = 5e-3, weight_decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lr, self.weight_decay = float(lr), weight_decay

    def step(self, batch: Step, rows: Tensor) -> None:
        """One AdamW step."""
        ids, embeddings = self.prompt(self.to_device(rows))
        loss = self.loss(rows, ids, embeddings, self.samples(rows, batch), self.texts(rows))
        self.step_active(loss, rows)
        self.log_step(batch, rows, loss=loss)

    def decode(self, rows: Tensor) -> tuple[list[Found], Tensor]:
        """The embeddings as they are, under their pseudo-words."""
        texts = self.texts(rows)
        ids, embeddings = self.prompt(rows.to(self.device))
        told = self.backbone.encode(ids, embeddings, texts=texts)
        free = self.prompt.embeddings.detach()[rows.to(self.device)].tolist()
        return [Found(text, None, embedding) for text, embedding in zip(texts, free, strict=True)], told

    def texts(self, rows: Tensor) -> list[str]:
        """Write the pseudo-words of the problems `rows` (Q,) in the template."""
        return [fill_template(self.template, pseudo_word(self.batch[row].record)) for row in rows.tolist()]

    def encode(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encoded prompts (P, R, D) of texts in which pseudo-words of this run stand for what was found."""
        return torch.cat([self._encode(text, negative) for text in texts])

    def _encode(self, text: str, negative: bool) -> Tensor:
        known = {word: self.embedded(self._record(word)) for word in re.findall(PSEUDO_WORD, text)}
        parts = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
        found = [known[part] for part in parts if part in known]
        if not found:
            return super().encode([text], negative)
        filled = [
            " ".join(" ".join([word] * len(known[part])) if part in known else part.strip() for part in parts)
            for word in fillers(self.vocabulary.tokenizer)
        ]
        ids, others = self.vocabulary.encode_text(filled).to(self.device)
        places, free = (ids != others).nonzero().squeeze(1), torch.cat(found).to(self.prompt.table)
        embeddings = self.prompt.table[ids].index_copy(0, places, free)
        return self.backbone.encode(ids[None], embeddings[None], texts=[text], negative=negative)

    def _record(self, word: str) -> Problem:
        """What a pseudo-word stands for."""
        begun, folder = word[-9:-1], self.data.folder
        files = [file.stem for file in folder.problems.glob(f"{begun}*.json")]
        for problem in (*self.batch.records, *map(folder.read, files)):
            if problem and problem.embedding and pseudo_word(problem) == word:
                return problem
        known = [pseudo_word(problem) for problem in islice(folder.found(), 5)]
        raise UserError(f"This run knows no {word}; it has {', '.join(known) or 'found nothing yet'}.")

    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """As other inverters, and a file a problem that diffusers, AUTOMATIC1111 and ComfyUI read."""
        super().final_evaluation(problems, scores)
        for problem in problems:
            word = pseudo_word(problem)
            content = pack_embedding(self.embedded(problem), self.backbone, word)
            self.data.folder.write(self.data.folder.embeddings / f"{word[1:-1]}.safetensors", content)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as the released code."""
        return BatchedAdam([self.prompt.embeddings], lr=self.lr, weight_decay=self.weight_decay)


def pseudo_word(problem: Problem) -> str:
    """What stands for a problem's embeddings in a text, such as `<fox-3fa9c01d>`."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(problem.target).stem.lower()).strip("-") or "picture"
    return f"<{name}-{problem.key[:8]}>"
