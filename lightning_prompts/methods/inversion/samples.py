"""The samples of a step: noisy versions of each problem's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.sampling.seeding import draw_noise, image_indices

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a step of Q problems.

    Attributes:
        latents: Clean latents of the target images, (Q, N, C, h, w).
        timesteps: Timesteps, (Q, N).
        noise: Standard normal noise, (Q, N, C, h, w).
        negative: Clean latents of negative images, which get the same timesteps and noise, (Q, N, C, h, w); None
            without any.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    negative: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Samples:
        """Select problems, as rows of a tensor."""
        negative = None if self.negative is None else self.negative[rows]
        return Samples(self.latents[rows], self.timesteps[rows], self.noise[rows], negative)


def draw_samples(method: Inverter, rows: Tensor, batch: Step) -> Samples:
    """Draw the samples of a step of the problems `rows` (Q,); several images of a problem take turns."""
    timesteps = batch.timesteps[rows].to(method.device, non_blocking=True)
    steps = [batch.steps[row] for row in rows.tolist()]
    keys, count = [problem.key for problem in method.records(rows)], timesteps.shape[1]
    noise = draw_noise(method.data.seed, keys, steps, count, method.backbone.latent_shape, method.device)
    latents = _take_turns([method.latents[row] for row in rows.tolist()], steps, count)
    negative = method.data.negative_latents(method.backbone)
    if negative is not None:
        negative = _take_turns([negative.to(method.device)] * len(steps), steps, count)
    return Samples(latents, timesteps, noise, negative)


def _take_turns(images: Sequence[Tensor], steps: Sequence[int], count: int) -> Tensor:
    """Return the latents (Q, N, C, h, w) of the images that Q problems use at their steps; several images take turns.

    Args:
        images: Latents of each problem's I images, (I, C, h, w).
        steps: The step of each problem.
        count: N, the samples per problem.
    """
    used = [
        some[image_indices(max(step, 0), count, len(some)).to(some.device, non_blocking=True)]
        for some, step in zip(images, steps, strict=True)
    ]
    return torch.stack(used)
