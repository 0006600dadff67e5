"""What metrics that are means have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The mean of all values that `update` adds, whatever batches and ranks they came in; nan without any."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Adds values of any shape."""
        self.total += values.to(self.total.device).double().sum()  # a CLIP may be elsewhere
        self.count += values.numel()

    def compute(self) -> Tensor:
        """The mean, a float32 scalar."""
        return (self.total / self.count).float()
