"""Where a search can start: random tokens, words that a CLIP chooses, an earlier run, a text or an embedding's file."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.backbones.embedding_files import read_embedding, split_name
from lightning_prompts.cache import cached, fingerprint
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHORTLIST = 64
"""Words a picture, the best ones alone, that are tried at each place."""


def reads_tokens(clip: ClipSimilarity, prompt: TokenEmbeddings) -> bool:
    """Tell whether a CLIP has the vocabulary of the prompts, so that it can read their token ids."""
    used = torch.cat([prompt.allowed.nonzero().squeeze(1), prompt.template]).unique()
    return clip.has_same_tokens(prompt.vocabulary.tokenizer, used)


@torch.no_grad()
def prompt_features(
    clip: ClipSimilarity, prompt: TokenEmbeddings, token_ids: Tensor, as_text: bool, chunk: int = 256
) -> Tensor:
    """Encode prompts in their template with a CLIP.

    Args:
        clip: The CLIP.
        prompt: The template.
        token_ids: Token ids of B prompts of m tokens, (B, m).
        as_text: Decode the tokens and have the CLIP's own tokenizer read the text, for a CLIP with another vocabulary.
        chunk: Prompts that are encoded at a time.

    Returns:
        Unit vectors, (B, E).
    """
    if as_text:
        texts = prompt.texts(token_ids)
        return torch.cat([clip.features_of(texts[i : i + chunk]) for i in range(0, len(texts), chunk)])
    return torch.cat([clip.text_features(part) for part in prompt.ids(token_ids).split(chunk)])


def word_features(clip: ClipSimilarity, prompt: TokenEmbeddings, as_text: bool, chunk: int = 256) -> Tensor:
    """Encode each allowed token alone in the template: unit vectors (A, E) in the order of `prompt.allowed.nonzero()`.

    Those of the whole vocabulary are computed once for a CLIP, a vocabulary and a template, and kept in the cache. Of a list of
    words only these are encoded.
    """
    allowed = prompt.allowed.nonzero()
    if prompt.listed:
        return prompt_features(clip, prompt, allowed, as_text, chunk)
    every = prompt.vocabulary.allowed().to(allowed.device).nonzero() if prompt.blocked else allowed
    tokenizers = [clip.tokenizer, prompt.vocabulary.tokenizer] if as_text else []
    depends_on = {
        "clip": fingerprint(clip.clip.text_model) + fingerprint(clip.clip.text_projection),
        "template": f"{prompt.positions[0]} {prompt.ids(every[:1]).tolist()}",
        "tokens": hashlib.blake2b(every.cpu().numpy().tobytes(), digest_size=16).hexdigest(),
        "tokenizers": " ".join(_digest(tokenizer) for tokenizer in tokenizers),
        "device": allowed.device.type,  # they round differently
    }
    features = cached("words", depends_on, lambda: prompt_features(clip, prompt, every, as_text, chunk))
    kept = torch.isin(every, allowed).squeeze(1)
    return features.to(allowed.device)[kept]


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that a tokenizer does."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


@torch.no_grad()
def best_words(
    clip: ClipSimilarity,
    prompt: TokenEmbeddings,
    features: Tensor,
    beams: int = 1,
    chunk: int = 256,
    words: Tensor | None = None,
) -> Tensor:
    """Builds prompts word by word, each time adding what raises the cosine most; no word is taken twice.

    Args:
        clip: The CLIP; with another vocabulary than the prompt's it reads the decoded text.
        prompt: Says which tokens are allowed and in which template they stand.
        features: Mean features of each problem's pictures, (P, E).
        beams: Prompts that are kept at each length; 1 is greedy.
        chunk: Prompts that are encoded at a time.
        words: Features (A, E) of the allowed tokens alone, see `word_features`; None to compute them.

    Returns:
        Token ids, (P, M).
    """
    allowed, as_text = prompt.allowed.nonzero().squeeze(1), not reads_tokens(clip, prompt)

    def cosines(prompts: Tensor) -> Tensor:
        """Cosines (P, B) of the pictures with B prompts of m words each, (P, B, m)."""
        text = prompt_features(clip, prompt, prompts.flatten(0, 1), as_text, chunk)
        return torch.bmm(text.view(*prompts.shape[:2], -1), features.unsqueeze(2)).squeeze(2)

    words = word_features(clip, prompt, as_text, chunk) if words is None else words
    score, best = (features @ words.T).topk(min(SHORTLIST, len(allowed)))
    shortlist = allowed[best]  # (P, S)
    chosen, score = shortlist[:, :beams].unsqueeze(2), score[:, :beams]
    for _ in range(1, len(prompt.positions)):
        longer = torch.cat(  # each beam with each word of the shortlist, (P, W, S, m + 1)
            [
                chosen.unsqueeze(2).expand(-1, -1, shortlist.shape[1], -1),
                shortlist[:, None, :, None].expand(-1, chosen.shape[1], -1, -1),
            ],
            dim=3,
        ).flatten(1, 2)
        ordered = longer.sort(2).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).sum(2)
        score = cosines(longer) - 4 * repeated  # still taken where the vocabulary is shorter than the prompt
        score, kept = score.topk(min(beams, longer.shape[1]))
        chosen = longer.gather(1, kept.unsqueeze(2).expand(-1, -1, longer.shape[2]))
    return chosen[:, 0]


def random_tokens(prompt: TokenEmbeddings, keys: Sequence[str], seed: int, step: int | Sequence[int]) -> Tensor:
    """Allowed tokens (P, M) for P problems, each drawn at a step's address."""
    allowed, tokens = prompt.allowed.nonzero().squeeze(1).cpu(), len(prompt.positions)
    steps = [step] * len(keys) if isinstance(step, int) else step
    draws = [generator(seed, f"{key}/tokens", at, 0) for key, at in zip(keys, steps, strict=True)]
    drawn = [allowed[torch.randint(len(allowed), (tokens,), generator=draw)] for draw in draws]
    return torch.stack(drawn).to(prompt.table.device) if drawn else allowed.new_empty(0, tokens)


def earlier(folder: str | Path, problems: Sequence[Problem]) -> list[Problem]:
    """The records of another run, whatever its method, for the same pictures.

    Raises:
        UserError: There is none for one of them.
    """
    found = [RunFolder(folder).read(problem.key) for problem in problems]
    for problem, record in zip(problems, found, strict=True):
        if record is None or record.prompt is None:
            raise UserError(
                f"The run {folder} to start from has no prompt for {problem.target} under this model and template; give the "
                "folder of a run that has searched these pictures, or --model.start random or clip_words."
            )
    return [record for record in found if record]


def looks_like_file(start: str) -> bool:
    """Tell whether what a search is to start from can be no text, whether or not it exists."""
    return os.sep in start or Path(start.partition("#")[0]).suffix in (".safetensors", ".pt", ".bin")


def given(start: str, backbone: Backbone, tokens: int, pickle: bool) -> Tensor | None:
    """Embeddings (M, D) of a text or in a file, repeated or cut to M tokens.

    Args:
        start: What a person has named.
        backbone: The model.
        tokens: M.
        pickle: Whether the file may be a pickle.

    Returns:
        None where it is the folder of a run, `random` or `clip_words`.

    Raises:
        UserError: It is none of all these.
    """
    if not start.strip():
        raise UserError(
            "There is nothing to start from in --model.start ''; give a text, a file, a run, random or clip_words."
        )
    if start in ("random", "clip_words") or os.path.isdir(start):  # unlike pathlib's, takes a text of any length
        return None
    if os.path.isfile(split_name(start)[0]):
        found = read_embedding(start, backbone, pickle)
    elif looks_like_file(start):
        raise UserError(f"There is neither a run nor an embedding in {start!r} to start from; check --model.start.")
    elif close := difflib.get_close_matches(start, ("random", "clip_words"), 1, 0.8):
        raise UserError(f"The start {start!r} is unknown; did you mean --model.start {close[0]}?")
    else:
        ids = backbone.vocabulary.token_lists([start])[0]
        if not ids:
            raise UserError(f"The text {start!r} to start from has no token; give another --model.start.")
        found = backbone.vocabulary.table[torch.tensor(ids)]
    if len(found) > tokens:
        log.warning("%r has %d tokens, and the search starts from the first %d.", start, len(found), tokens)
    return found.repeat(-(-tokens // len(found)), 1)[:tokens].float()
