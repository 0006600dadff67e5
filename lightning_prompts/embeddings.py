"""Pure functions on encoded prompts: what lies between two, what leads from one to another, and which tokens are near."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lerp(a: Tensor, b: Tensor, value: float | Tensor) -> Tensor:
    """The point at `value` on the straight line from a (..., D) at 0 to b (..., D) at 1."""
    return a + value * (b - a)


def slerp(a: Tensor, b: Tensor, value: float | Tensor) -> Tensor:
    """The point at `value` on the arc from a at 0 to b at 1, row by row (arXiv 2308.12059, section 3).

    The direction turns evenly along the great circle, and the length changes evenly. For rows of one length this is the paper's
    formula; for others that one is not bounded where the rows are nearly opposite. Between opposite rows, which many arcs join,
    it is always the same one; from or to a row of zeros it is a straight line.

    Args:
        a: Rows (..., D).
        b: Rows (..., D).
        value: A number, or a tensor that is broadcast to (..., 1).

    Returns:
        Rows (..., D); gradients flow to all three.
    """
    lengths = [x.norm(dim=-1, keepdim=True) for x in (a, b)]
    one, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = 2 * torch.atan2((one - other).norm(dim=-1, keepdim=True), (one + other).norm(dim=-1, keepdim=True))
    across = _without(other, one)
    sine, tiny = across.norm(dim=-1, keepdim=True), 8 * torch.finfo(across.dtype).eps
    axis = F.one_hot(one.abs().argmin(-1), one.shape[-1]).to(one)
    across = torch.where(sine > tiny, across / sine.clamp(min=tiny), axis)
    across = F.normalize(_without(across, one), dim=-1)  # again, as little but rounding errors may have been left
    turned = torch.cos(value * angle) * one + torch.sin(value * angle) * across
    known = (lengths[0] > 0) & (lengths[1] > 0)
    return torch.where(known, lerp(lengths[0], lengths[1], value) * turned, lerp(a, b, value))


def _without(rows: Tensor, unit: Tensor) -> Tensor:
    """Rows (..., D) less what of them lies along unit rows (..., D)."""
    return rows - (rows * unit).sum(-1, keepdim=True) * unit


def transfer(embeds: Tensor, before: Tensor, after: Tensor, strength: float = 1.0) -> Tensor:
    """Embeddings (..., D) with the difference that leads from others (..., D) to a third (..., D), at a strength."""
    return embeds + strength * (after - before)


def shift(embeds: Tensor, like: Tensor) -> Tensor:
    """Moves embeddings (..., L, D) to the mean and the standard deviation of others (..., L, D), each over its L D numbers.

    Rows that are zeros in the others are padding, which counts for nothing and stays what it is.
    """
    counts = (like != 0).any(-1, keepdim=True)
    (mean, std), (wanted_mean, wanted_std) = (_mean_and_std(x, counts) for x in (embeds, like))
    return torch.where(counts, (embeds - mean) / std * wanted_std + wanted_mean, embeds)


def _mean_and_std(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Over those rows of (..., L, D) that count, (..., L, 1)."""
    numbers = counts.sum(-2, keepdim=True) * x.shape[-1]
    mean = (x * counts).sum((-2, -1), keepdim=True) / numbers
    square = ((x - mean) * counts).square().sum((-2, -1), keepdim=True)
    return mean, (square / (numbers - 1)).sqrt()


def farthest(vectors: Tensor, count: int, first: int = 0) -> list[int]:
    """Numbers of `count` of V vectors (V, D), each the one whose least distance, one minus the cosine, from those before is largest.

    Args:
        vectors: What to choose from.
        count: How many; at most V.
        first: Which one to begin with.
    """
    units = F.normalize(vectors, dim=-1)
    chosen, nearest = [first], 1 - units @ units[first]
    while len(chosen) < count:
        nearest[chosen[-1]] = -torch.inf  # rounding must not choose one twice
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(1 - units @ units[chosen[-1]])
    return chosen


def principal_axes(vectors: Tensor, count: int) -> Tensor:
    """Directions (count, D), of length 1, in which vectors (V, D) differ most; the largest number of each is above 0."""
    axes: Tensor = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False).Vh[:count]
    return axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()


def nearest_rows(rows: Tensor, table: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """The tokens whose rows in a table are most similar to some rows, by the cosine.

    Args:
        rows: Embeddings (..., D).
        table: A row a token, (V, D): the text encoder's own table for embeddings before it, encoded tokens for those after.
        count: K, how many tokens.

    Returns:
        Token ids (..., K), the most similar first, and their cosines (..., K).
    """
    cosines = F.normalize(rows, dim=-1) @ F.normalize(table, dim=-1).T
    found = cosines.topk(count, dim=-1)
    return found.indices, found.values
