"""The loss of DPO-Diff: how far a picture is from a text on CLIP's sphere."""

from __future__ import annotations

import torch
from torch import Tensor


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared angle between unit vectors (..., E), in [0, pi^2 / 2], lower is nearer (arXiv 2407.01606, section 4)."""
    return 2 * torch.asin(((x - y).norm(dim=-1) / 2).clamp(max=1)).square()
