"""What a wave holds with a row a problem: cut out, filled up and joined, also when other ranks go on than have begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def fitted(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows (Q, ...) in another shape (Q, *shape): cut off, or filled up with zeros, at the end of each axis."""
    if rows.shape[1:] == torch.Size(shape):
        return rows
    new = rows.new_zeros(len(rows), *shape)
    common = tuple(slice(min(*sizes)) for sizes in zip(rows.shape, new.shape, strict=True))
    new[common] = rows[common]
    return new


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows (Q_i, ...) of several shapes as (Q, ...), filled up with zeros to the largest."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist() if parts[0].dim() > 1 else []
    return torch.cat([fitted(part, shape) for part in parts])


def merged(checkpoints: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A checkpoint with the problems of several ranks' that are still searched; of one that several have, where it has come farthest.

    Args:
        checkpoints: What the ranks have saved; the first one's other contents are kept.
        wanted: Says of a problem's record whether it goes on here.
    """
    farthest: dict[str, tuple[int, int, int]] = {}  # steps, checkpoint and row, by key
    for number, checkpoint in enumerate(checkpoints):
        wave = checkpoint["wave"]
        for row, record in enumerate(wave["records"]):
            here = (wave["done"][row], number, row)
            if wave["active"][row] and wanted(record) and farthest.get(record["key"], here) <= here:
                farthest[record["key"]] = here
    kept: list[list[int]] = [[] for _ in checkpoints]
    for _, number, row in sorted(farthest.values(), key=lambda place: place[1:]):
        kept[number].append(row)
    rows = [torch.tensor(some, dtype=torch.long) for some in kept]
    whole = dict(checkpoints[0])
    whole["wave"] = {
        name: [part["wave"][name][row] for part, some in zip(checkpoints, kept, strict=True) for row in some]
        if isinstance(values, list)
        else values
        for name, values in whole["wave"].items()
    }
    whole["state_dict"] = _tensors([part["state_dict"] for part in checkpoints], rows)
    states = [part["optimizer_states"] for part in checkpoints]
    for place, first in enumerate(whole["optimizer_states"]):
        if not first:  # the method has no optimizer
            continue
        several = [state[place]["state"] for state in states]
        named = {key: _tensors([some[key] for some in several], rows) for key in several[0] if all(several)}
        whole["optimizer_states"] = [*whole["optimizer_states"]]
        whole["optimizer_states"][place] = {**first, "state": named}
    return whole


def _tensors(parts: Sequence[dict[str, Any]], rows: Sequence[Tensor]) -> dict[str, Any]:
    """Of each tensor with a row a problem the rows that are kept; of others the first one's."""
    return {
        name: joined([part[name][some] for part, some in zip(parts, rows, strict=True)])
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in parts[0].items()
    }
