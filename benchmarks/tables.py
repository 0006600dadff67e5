"""CSV files of figures, to which rows are added as they are measured."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """Read the existing rows; numbers become floats."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def add(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows, with numbers to six decimals."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = read(file)
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list((there or rows)[0]), lineterminator="\n")
        if not there:
            writer.writeheader()
        writer.writerows({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
