"""The loss of DPO-Diff: the spherical distance of CLIP features."""

from __future__ import annotations

import torch
from torch import Tensor


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute half the squared angle between unit vectors (..., E), in [0, pi^2 / 2] (arXiv 2407.01606, section 4)."""
    return 2 * torch.asin(((x - y).norm(dim=-1) / 2).clamp(max=1)).square()
