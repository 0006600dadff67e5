"""The base class of metrics that are means."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The mean of all values passed to `add`, over batches and ranks; NaN without values.

    Unlike torchmetrics' `MeanMetric`, it sums in float64, takes values from any device, and does not drop NaN.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total += values.to(self.total.device).double().sum()  # the CLIP may be on another device
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Return the mean, a float32 scalar."""
        return (self.total / self.count).float()
