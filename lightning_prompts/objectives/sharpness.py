"""Sharpness of images: the variance of their Laplacian (arXiv 2308.12059)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.objectives.base import Objective


def laplacian_variance(images: Tensor) -> Tensor:
    """Compute the variance (B,) of the Laplacian of the luma in [0, 1] of images (B, 3, H, W) in [-1, 1].

    The Laplacian uses all eight neighbors, so pixels at the border are left out.
    """
    luma = images.new_tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)
    kernel = images.new_ones(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = -8
    brightness = ((images + 1) / 2 * luma).sum(1, keepdim=True)
    return F.conv2d(brightness, kernel).flatten(1).var(1)


class Sharpness(Objective):
    """Variance of the Laplacian, in [0, inf); higher is better.

    Args:
        weight: See `Objective`; the default is the paper's.
    """

    lowest, highest = 0.0, math.inf

    def __init__(self, weight: float = 50.0) -> None:
        super().__init__(weight)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1]."""
        return laplacian_variance(images)


class Blurriness(Sharpness):
    """Variance of the Laplacian, in [0, inf); lower is better.

    Args:
        weight: See `Objective`; the default is the paper's.
    """

    higher_is_better = False

    def __init__(self, weight: float = 20.0) -> None:
        super().__init__(weight)
