"""Initial prompts: random tokens, an earlier run, a text or an embedding file."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.backbones.embedding_files import read_embedding, split_name
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import generator

log = logging.getLogger(__name__)


def random_tokens(prompt: TokenEmbeddings, keys: Sequence[str], seed: int, step: int | Sequence[int]) -> Tensor:
    """Draw allowed tokens (P, M) for P problems, a function of the seed, each problem's key and its step."""
    allowed, tokens = prompt.allowed.nonzero().squeeze(1).cpu(), len(prompt.positions)
    steps = [step] * len(keys) if isinstance(step, int) else step
    draws = [generator(seed, f"{key}/tokens", at, 0) for key, at in zip(keys, steps, strict=True)]
    drawn = [allowed[torch.randint(len(allowed), (tokens,), generator=draw)] for draw in draws]
    return torch.stack(drawn).to(prompt.table.device) if drawn else allowed.new_empty(0, tokens)


def records_of_run(folder: str | Path, problems: Sequence[Problem]) -> list[Problem]:
    """Read the records of another run, of any method, for the same images.

    Raises:
        UserError: The run has no prompt for one of the problems.
    """
    records = [RunFolder(folder).read(problem.key) for problem in problems]
    for problem, record in zip(problems, records, strict=True):
        if record is None or record.prompt is None:
            raise UserError(
                f"The run {folder} to start from has no prompt for {problem.target} under this model and template; "
                "give the folder of a run that has searched these images, or --model.init random or clip_words."
            )
    return [record for record in records if record]


def looks_like_file(init: str) -> bool:
    """Return whether an `init` names a file, existing or not, and so cannot be a text."""
    return os.sep in init or Path(init.partition("#")[0]).suffix in (".safetensors", ".pt", ".bin")


def init_embeddings(init: str, backbone: Backbone, tokens: int, allow_pickle: bool) -> Tensor | None:
    """Read the initial embeddings (M, D) from a text or a file, repeated or truncated to M tokens.

    Args:
        init: A text, an embedding file, the folder of a run, `random` or `clip_words`.
        backbone: The model.
        tokens: M.
        allow_pickle: Whether the file may be a pickle.

    Returns:
        The embeddings; None for a run, `random` or `clip_words`.

    Raises:
        UserError: `init` is none of these.
    """
    if not init.strip():
        raise UserError("--model.init must not be empty; give a text, a file, a run, random or clip_words.")
    if init in ("random", "clip_words") or os.path.isdir(init):  # unlike pathlib's, accepts a text of any length
        return None
    if os.path.isfile(split_name(init)[0]):
        embeddings = read_embedding(init, backbone, allow_pickle)
    elif looks_like_file(init):
        raise UserError(f"There is neither a run nor an embedding in {init!r} to start from; check --model.init.")
    elif close := difflib.get_close_matches(init, ("random", "clip_words"), 1, 0.8):
        raise UserError(f"--model.init {init!r} is unknown; did you mean {close[0]}?")
    else:
        ids = backbone.vocabulary.token_lists([init])[0]
        if not ids:
            raise UserError(f"The text {init!r} to start from has no token; give another --model.init.")
        embeddings = backbone.vocabulary.table[torch.tensor(ids)]
    if len(embeddings) > tokens:
        log.warning("%r has %d tokens, and the search starts from the first %d.", init, len(embeddings), tokens)
    return embeddings.repeat(-(-tokens // len(embeddings)), 1)[:tokens].float()
