"""Whole numbers that settings take; the command line refuses others."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    NotNegative: TypeAlias = int
    Positive: TypeAlias = int
else:
    from jsonargparse.typing import NonNegativeInt as NotNegative
    from jsonargparse.typing import PositiveInt as Positive

__all__ = ["NotNegative", "Positive"]
