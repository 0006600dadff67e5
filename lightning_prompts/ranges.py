"""Numbers that settings take; the command line refuses others."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

MOST = 2**31 - 1
"""Largest whole number of a setting, which counts steps, samples or tokens."""

if TYPE_CHECKING:
    NotNegative: TypeAlias = int
    Positive: TypeAlias = int
    Byte: TypeAlias = int
    Rate: TypeAlias = float
else:
    from jsonargparse.typing import restricted_number_type

    NotNegative = restricted_number_type("NotNegative", int, [(">=", 0), ("<=", MOST)])
    Positive = restricted_number_type("Positive", int, [(">=", 1), ("<=", MOST)])
    Byte = restricted_number_type("Byte", int, [(">=", 0), ("<=", 255)])
    Rate = restricted_number_type("Rate", float, [(">", 0), ("<", float("inf"))])

__all__ = ["MOST", "Byte", "NotNegative", "Positive", "Rate"]
