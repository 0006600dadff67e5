"""Similarity of pictures by a CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prompts.objectives.clip import ClipSimilarity


class ClipImageSimilarity(Metric):
    """Mean cosine between the CLIP features of drawn pictures and of their targets, in [-1, 1]; higher is better.

    Args:
        name: Folder or hub id of a CLIPModel.
        offline: Do not connect to the hub.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, name: str, offline: bool = False) -> None:
        super().__init__()
        self.scorer = ClipSimilarity(name, offline)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, drawn: Tensor, targets: Tensor) -> None:
        """Adds pictures (B, 3, H, W) and the targets (I, 3, H, W) they should look like, both in [-1, 1]."""
        cosines = self.scorer.features(drawn) @ self.scorer.features(targets).T
        self.total += cosines.double().sum()
        self.count += cosines.numel()

    def compute(self) -> Tensor:
        """The mean over all pairs."""
        return (self.total / self.count).float()
