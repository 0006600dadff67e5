"""Read prompts from the command line, text files, and CSV or JSONL lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_prompts.data.lists import Row, read_lines, read_rows
from lightning_prompts.errors import UserError


class Line(NamedTuple):
    """A prompt, or the error of a line without one.

    Attributes:
        text: The prompt; of a broken line, its place, such as "line 3 of prompts.csv".
        error: Why the line has no prompt, in one sentence; None if it has one.
    """

    text: str
    error: str | None = None


def find_prompts(sources: list[str]) -> list[Line]:
    """Return the prompts of all sources in order and without duplicates, and the broken lines of lists.

    Args:
        sources: Prompts, or paths of text files with one prompt per line, or of CSV or JSONL lists.

    Raises:
        UserError: There is no prompt, one is empty, or a list cannot be read or has only broken lines.
    """
    lines = [line for source in sources for line in _expand(source)]
    if not lines:
        raise UserError("No prompts were given; give --data.prompts a text, or a .txt, .csv or .jsonl file of prompts.")
    return list(dict.fromkeys(lines))


def read_prompts(sources: list[str]) -> list[str]:
    """Return the prompts of all sources in order and without duplicates.

    Args:
        sources: See `find_prompts`.

    Raises:
        UserError: There is no prompt, one is empty, or a list has a broken line.
    """
    lines = find_prompts(sources)
    for line in lines:
        if line.error:
            raise UserError(line.error)
    return [line.text for line in lines]


def _expand(source: str) -> list[Line]:
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        if not source.strip():
            raise UserError("A prompt is empty; write what the image should show.")
        return [Line(" ".join(source.split()))]
    if not path.exists():
        raise UserError(f"There is no list {source!r}; check the path.")
    lines = [line for line in (_line(path, row) for row in _rows(path)) if line.text]
    if lines and all(line.error for line in lines):
        raise UserError(str(lines[0].error))
    return lines


def _rows(path: Path) -> Iterator[Row]:
    return read_lines(path) if path.suffix.lower() == ".txt" else read_rows(path, "prompt", "prompt")


def _line(path: Path, row: Row) -> Line:
    if isinstance(row.value, dict) and "prompt" not in row.value and isinstance(row.value.get("line"), str):
        return Line(row.value["line"], str(row.value.get("reason")))  # a line of failed.jsonl
    value = row.value.get("prompt") if isinstance(row.value, dict) else row.value
    if not row.error and isinstance(value, str):
        return Line(" ".join(value.split()))
    return Line(f"line {row.line} of {path}", row.error or f"Line {row.line} of '{path}' has no text under 'prompt'.")
