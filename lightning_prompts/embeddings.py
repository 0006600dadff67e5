"""Pure functions on embeddings: interpolation, transfer, statistics and diverse subsets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lerp(a: Tensor, b: Tensor, value: float | Tensor) -> Tensor:
    """Interpolate linearly from a (..., D) at 0 to b (..., D) at 1."""
    return a + value * (b - a)


def slerp(a: Tensor, b: Tensor, value: float | Tensor) -> Tensor:
    """Interpolate on the arc from a at 0 to b at 1, row by row (arXiv 2308.12059, section 3).

    The direction turns at a constant rate along the great circle, and the length changes at a constant rate. For rows
    of equal length this is the paper's formula, which is unbounded for nearly opposite rows of different lengths.
    Between opposite rows, the choice among the possible arcs is deterministic; from or to a row of zeros, the path is a
    straight line.

    Args:
        a: Rows (..., D).
        b: Rows (..., D).
        value: A number, or a tensor that broadcasts to (..., 1).

    Returns:
        Rows (..., D); gradients flow to all three arguments.
    """
    lengths = [x.norm(dim=-1, keepdim=True) for x in (a, b)]
    one, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = 2 * torch.atan2((one - other).norm(dim=-1, keepdim=True), (one + other).norm(dim=-1, keepdim=True))
    across = _without(other, one)
    sine, tiny = across.norm(dim=-1, keepdim=True), 8 * torch.finfo(across.dtype).eps
    axis = F.one_hot(one.abs().argmin(-1), one.shape[-1]).to(one)
    across = torch.where(sine > tiny, across / sine.clamp(min=tiny), axis)
    across = F.normalize(_without(across, one), dim=-1)  # again, as the first result may be mostly rounding errors
    turned = torch.cos(value * angle) * one + torch.sin(value * angle) * across
    known = (lengths[0] > 0) & (lengths[1] > 0)
    return torch.where(known, lerp(lengths[0], lengths[1], value) * turned, lerp(a, b, value))


def _without(rows: Tensor, unit: Tensor) -> Tensor:
    """Return rows (..., D) without their component along unit rows (..., D)."""
    return rows - (rows * unit).sum(-1, keepdim=True) * unit


def transfer(embeds: Tensor, before: Tensor, after: Tensor, strength: float = 1.0) -> Tensor:
    """Add `strength` times the difference `after - before` to embeddings; all are (..., D)."""
    return embeds + strength * (after - before)


def shift(embeds: Tensor, like: Tensor) -> Tensor:
    """Shift embeddings (..., L, D) to the mean and standard deviation of `like` (..., L, D), over all L * D numbers.

    Rows that are zeros in `like` are padding, which is ignored and stays unchanged.
    """
    counts = (like != 0).any(-1, keepdim=True)
    (mean, std), (wanted_mean, wanted_std) = (_mean_and_std(x, counts) for x in (embeds, like))
    return torch.where(counts, (embeds - mean) / std * wanted_std + wanted_mean, embeds)


def _mean_and_std(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation over the rows of (..., L, D) that count, (..., L, 1)."""
    numbers = counts.sum(-2, keepdim=True) * x.shape[-1]
    mean = (x * counts).sum((-2, -1), keepdim=True) / numbers
    square = ((x - mean) * counts).square().sum((-2, -1), keepdim=True)
    return mean, (square / (numbers - 1)).sqrt()


def farthest(vectors: Tensor, count: int, first: int = 0) -> list[int]:
    """Choose vectors one by one, each as far as possible from the nearest one chosen before; return their indices.

    The distance is one minus the cosine.

    Args:
        vectors: V vectors to choose from, (V, D).
        count: Number of vectors to choose, at most V.
        first: Index of the first one.
    """
    units = F.normalize(vectors, dim=-1)
    chosen, nearest = [first], 1 - units @ units[first]
    while len(chosen) < count:
        nearest[chosen[-1]] = -torch.inf  # rounding must not choose one twice
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(1 - units @ units[chosen[-1]])
    return chosen


def principal_axes(vectors: Tensor, count: int) -> Tensor:
    """Return the first principal axes (count, D) of vectors (V, D), with a positive largest component each."""
    axes: Tensor = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False).Vh[:count]
    return axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
