"""Types of numeric settings, whose ranges the command line checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

MOST = 2**31 - 1
"""Largest value of whole numbers, which count steps, samples or tokens."""

LEAST = {"Positive": 1, "NotNegative": 0}
"""Smallest value of the types of whole numbers below."""

IN_WORDS = {
    "str": "a text",
    "int": "a whole number",
    "Rate": "a finite number above 0",
    "Weight": "a finite number from 0 on",
    **{name: f"a whole number from {least} on" for name, least in LEAST.items()},
}
"""Descriptions of the types in error messages, by name."""

if TYPE_CHECKING:
    NotNegative: TypeAlias = int
    Positive: TypeAlias = int
    Byte: TypeAlias = int
    Rate: TypeAlias = float
    Weight: TypeAlias = float
else:
    from jsonargparse.typing import restricted_number_type

    NotNegative = restricted_number_type("NotNegative", int, [(">=", LEAST["NotNegative"]), ("<=", MOST)])
    Positive = restricted_number_type("Positive", int, [(">=", LEAST["Positive"]), ("<=", MOST)])
    Byte = restricted_number_type("Byte", int, [(">=", 0), ("<=", 255)])
    Rate = restricted_number_type("Rate", float, [(">", 0), ("<", float("inf"))])
    Weight = restricted_number_type("Weight", float, [(">=", 0), ("<", float("inf"))])

__all__ = ["IN_WORDS", "LEAST", "MOST", "Byte", "NotNegative", "Positive", "Rate", "Weight"]
