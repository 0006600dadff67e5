"""LPIPS (arXiv 1801.03924) as a metric."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_prompts.metrics.mean import Mean
from lightning_prompts.objectives.lpips import LpipsDistance, Trunk


class Lpips(Mean):
    """Mean LPIPS between generated images and their targets, 0 or more, 0 for equal ones; lower is better.

    Args:
        trunk: The network whose features are compared.
        weights: File of the trunk's weights as published by torchvision; None for the one in torch's hub cache.

    Raises:
        UserError: The file is missing or does not hold the trunk's weights.
    """

    higher_is_better = False

    def __init__(self, trunk: Trunk = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        self.distance = LpipsDistance(trunk, weights)

    @torch.no_grad()
    def update(self, images: Tensor, targets: Tensor) -> None:
        """Add all pairs of generated images (B, 3, H, W) and target images (I, 3, H, W), both in [-1, 1]."""
        self.add(torch.cat([self.distance(images, target.expand_as(images)) for target in targets]))
