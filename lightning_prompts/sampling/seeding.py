"""Randomness that is addressed, not consumed: every draw is a function of where it is used.

So a resumed run, the company a problem keeps in a batch and the number of ranks do not change what is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

VALIDATION = -1
"""The step of the draws that score prompts; no gradient ever sees them."""

INIT = -2
"""The step of the draws that initial prompts come from."""

REGENERATION = -3
"""The step of the draws that pictures are drawn from."""

WORD_MAPS = -4
"""The step of the draws that word maps are computed on."""

RERANK = -5
"""The step of the draws of pictures that prompts are scored by."""

SEARCH = -6
"""The step of the draws of pictures that candidates are judged by."""

FINAL = -7
"""The step of the draws of pictures that the result is judged by."""

CHECK = -100
"""The first of the steps of the draws that `check` measures with; it goes down from here."""

FINAL_SEEDS = 10
"""How many these are."""


def derive_seed(seed: int, key: str, step: int, sample: int) -> int:
    """Return a seed in [0, 2**63) for sample `sample` at step `step` of the problem `key`."""
    digest = hashlib.blake2b(f"{seed}/{key}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, key: str, step: int, sample: int) -> torch.Generator:
    """Return a generator at an derive_seed; always the CPU's, as every kind of device draws other numbers from a seed.

    torch seeds it with the lowest 32 bits, so that two given addresses share their numbers with a probability of 2**-32.
    """
    return torch.Generator().manual_seed(derive_seed(seed, key, step, sample))


def draw_noise(
    seed: int,
    keys: Sequence[str],
    step: int | Sequence[int],
    samples: int,
    shape: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Standard normal noise (P, N, *shape) for N samples of P problems, each at a step."""
    draws = [
        torch.randn(*shape, generator=generator(seed, key, at, k))
        for key, at in zip(keys, _each(step, keys), strict=True)
        for k in range(samples)
    ]
    drawn = torch.stack(draws).view(len(keys), samples, *shape)
    # From memory that stays in its place a GPU fetches it while it computes, and nobody waits.
    return (drawn.pin_memory() if torch.device(device).type == "cuda" else drawn).to(device, non_blocking=True)


def draw_timesteps(
    seed: int, keys: Sequence[str], step: int | Sequence[int], samples: int, low: int, high: int
) -> Tensor:
    """Timesteps (P, N) in [low, high): sample k from the k-th of N equal parts of the range, uniformly."""
    draws = [
        float(torch.rand((), generator=generator(seed, f"{key}/t", at, k)))
        for key, at in zip(keys, _each(step, keys), strict=True)
        for k in range(samples)
    ]
    parts = torch.tensor(draws, dtype=torch.float64).view(len(keys), samples) + torch.arange(samples)
    return (low + parts / samples * (high - low)).long().clamp(max=high - 1)


def _each(step: int | Sequence[int], keys: Sequence[str]) -> Sequence[int]:
    """The step of each key."""
    return [step] * len(keys) if isinstance(step, int) else step


def image_indices(step: int, samples: int, pictures: int) -> Tensor:
    """Which of a subject's I pictures each of a step's N samples looks at, (N,).

    Sample k has the k-th part of the timesteps at every step. With plain turns a picture could stay in one part; here each
    picture comes equally often, and equally often in every part.
    """
    number = step * samples + torch.arange(samples)
    return (number + number // math.lcm(samples, pictures)) % pictures


def validation_timesteps(samples: int, low: int, high: int) -> Tensor:
    """Timesteps (N,) in the middle of N equal parts of [low, high)."""
    return (low + (torch.arange(samples) + 0.5) / samples * (high - low)).long()
