"""LPIPS, where its trunk's weights are at hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

TRUNK = "alexnet-owt-7be5be79.pth"


def perceptual_distance(drawn: Tensor, targets: Tensor) -> float | None:
    """Mean LPIPS (AlexNet) between pictures (B, 3, H, W) and targets (I, 3, H, W) in [-1, 1]; 0 is equal.

    Nothing is downloaded: without the trunk's weights in torch's cache the answer is None.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / TRUNK).exists():
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()
    pairs = [F.interpolate(x, size=64) if x.shape[-1] < 64 else x for x in (drawn, targets)]
    with torch.no_grad():
        distances = [network(pairs[0], target.expand_as(pairs[0])) for target in pairs[1]]
    return float(torch.cat(distances).mean())
