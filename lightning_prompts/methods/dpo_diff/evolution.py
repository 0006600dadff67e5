"""Random draws, mutation and crossover of word choices (arXiv 2407.01606, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prompts.methods.dpo_diff.space import Choice, Space


def uniform(space: Space, draw: torch.Generator) -> Choice:
    """Draw a word of each slot uniformly."""
    return tuple(int(torch.randint(len(slot.words), (), generator=draw)) for slot in space.slots)


def mutate(parents: Sequence[Choice], space: Space, rate: float, draw: torch.Generator) -> Choice:
    """Draw a parent, and each of its words again with probability `rate`."""
    parent, _ = _pair(parents, draw)
    return _mix(parent, uniform(space, draw), rate, draw)


def cross(parents: Sequence[Choice], draw: torch.Generator) -> Choice:
    """Draw two parents, and each word from either of them."""
    return _mix(*_pair(parents, draw), 0.5, draw)


def _pair(parents: Sequence[Choice], draw: torch.Generator) -> tuple[Choice, Choice]:
    first, second = torch.randperm(len(parents), generator=draw)[:2].tolist()
    return parents[first], parents[second]


def _mix(one: Choice, other: Choice, rate: float, draw: torch.Generator) -> Choice:
    """Replace each word of a choice by that of another with probability `rate`."""
    changed = (torch.rand(len(one), generator=draw) < rate).tolist()
    return tuple(b if change else a for a, b, change in zip(one, other, changed, strict=True))
