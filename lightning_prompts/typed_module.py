"""nn.Module for a type checker that reports misspelled attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn


class TypedModule(nn.Module):
    """Hide `nn.Module.__getattr__` from the type checker, to which every name would otherwise be a tensor or a module."""

    if TYPE_CHECKING:
        __getattr__: None  # type: ignore[assignment, misc]
