"""Provide an nn.Module whose misspelled attributes the type checker reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn


class TypedModule(nn.Module):
    """Hide `nn.Module.__getattr__` from the type checker, which would otherwise accept every attribute name."""

    if TYPE_CHECKING:
        __getattr__: None  # type: ignore[assignment, misc]
