"""Seed every random draw by its use: the run's seed, the problem's key, the step and the sample.

So resuming a run, the rest of the batch and the number of ranks do not change the draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prompts.errors import UserError

VALIDATION = -1
"""Step of the noise that scores prompts, and that no gradient uses."""

INIT = -2
"""Step of the draws of initial prompts."""

REGENERATION = -3
"""Step of the noise of the images that a run shows for its prompts."""

WORD_MAPS = -4
"""Step of the noise of word maps."""

RERANK = -5
"""Step of the noise of images by which prompts are reranked."""

SEARCH = -6
"""Step of the noise of images by which candidates are scored."""

FINAL = -7
"""Step of the noise of images by which the result is evaluated."""

CHECK = -100
"""Step of the first draws of `check`, whose further steps count down from here."""

FINAL_SEEDS = 10
"""Number of images per prompt in the final evaluation."""


def derive_seed(seed: int, key: str, step: int, sample: int) -> int:
    """Return a seed in [0, 2**63) for sample `sample` at step `step` of the problem `key`."""
    digest = hashlib.blake2b(f"{seed}/{key}/{step}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, key: str, step: int, sample: int) -> torch.Generator:
    """Return a generator for a draw; always on the CPU, since devices draw different numbers from the same seed.

    torch uses the lowest 32 bits of the seed, so two given draws coincide with a probability of 2**-32.
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
    """Draw standard normal noise (P, N, *shape) for N samples of P problems, at a common step or one step each."""
    draws = [
        torch.randn(*shape, generator=generator(seed, key, at, k))
        for key, at in zip(keys, _per_key(step, keys), strict=True)
        for k in range(samples)
    ]
    noise = torch.stack(draws).view(len(keys), samples, *shape)
    # Pinned memory, so that the copy to a GPU overlaps with its computation.
    return (noise.pin_memory() if torch.device(device).type == "cuda" else noise).to(device, non_blocking=True)


def draw_timesteps(
    seed: int, keys: Sequence[str], step: int | Sequence[int], samples: int, low: int, high: int
) -> Tensor:
    """Draw timesteps (P, N) in [low, high): sample k uniformly from the k-th of N equal parts of the range."""
    draws = [
        float(torch.rand((), generator=generator(seed, f"{key}/t", at, k)))
        for key, at in zip(keys, _per_key(step, keys), strict=True)
        for k in range(samples)
    ]
    parts = torch.tensor(draws, dtype=torch.float64).view(len(keys), samples) + torch.arange(samples)
    return (low + parts / samples * (high - low)).long().clamp(max=high - 1)


def _per_key(step: int | Sequence[int], keys: Sequence[str]) -> Sequence[int]:
    """Return the step of each key."""
    return [step] * len(keys) if isinstance(step, int) else step


def image_indices(step: int, samples: int, images: int) -> Tensor:
    """Return which of a target's I images each of the N samples of a step uses, (N,).

    Sample k always has a timestep in the k-th part of the range. Simple cycling could pair an image with the same part
    at every step; here every image is used equally often, and equally often in every part.
    """
    number = step * samples + torch.arange(samples)
    return (number + number // math.lcm(samples, images)) % images


def validation_timesteps(samples: int, low: int, high: int) -> Tensor:
    """Return the timesteps (N,) in the middle of N equal parts of [low, high)."""
    return (low + (torch.arange(samples) + 0.5) / samples * (high - low)).long()


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Check that seeds are valid for a torch generator and give different images.

    Args:
        name: Name of the setting.
        seeds: The seeds.

    Raises:
        UserError: There are no seeds; one is negative or has more than 64 bits; or two agree in the 32 bits that
            torch's CPU generator uses.
    """
    wrong = [seed for seed in seeds if not 0 <= seed < 2**64]
    if wrong or not seeds:
        given = wrong[0] if wrong else "an empty list"
        raise UserError(f"{name} takes whole numbers from 0 to {2**64 - 1}, not {given}.")
    first: dict[int, int] = {}
    for seed in seeds:
        if seed % 2**32 in first:
            raise UserError(
                f"{name} must give different images, but {first[seed % 2**32]} and {seed} give the same one, since "
                "torch's CPU generator uses only the lowest 32 bits of a seed; leave one of them out."
            )
        first[seed % 2**32] = seed


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise (S, C, h, w) from seeds, as diffusers does with CPU generators."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
