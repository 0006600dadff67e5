"""LPIPS, where its trunk's weights are at hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRUNK = "alexnet-owt-7be5be79.pth"


@cache
def _network(folder: Path) -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def lpips_lacks() -> str | None:
    """Why there is no LPIPS, in one sentence; None where there is."""
    path = _folder() / TRUNK
    if path.exists():
        return None
    return f"LPIPS is left out: the weights of its AlexNet, from https://download.pytorch.org/models/{TRUNK}, are not in {path.parent}."


def perceptual_distance(drawn: Tensor, targets: Tensor) -> float | None:
    """Mean LPIPS (AlexNet) between pictures (B, 3, H, W) and targets (I, 3, H, W) in [-1, 1]; 0 is equal.

    Nothing is downloaded: without the trunk's weights in torch's cache the answer is None, see `lpips_lacks`.
    """
    if lpips_lacks():
        return None
    network = _network(_folder())
    pairs = [F.interpolate(x, size=64) if x.shape[-1] < 64 else x for x in (drawn, targets)]
    with torch.no_grad():
        distances = [network(pairs[0], target.expand_as(pairs[0])) for target in pairs[1]]
    return float(torch.cat(distances).mean())


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
