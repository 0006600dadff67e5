"""Read lists of inputs that a user wrote: plain text, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_prompts.errors import UserError


class Row(NamedTuple):
    """A row of a list: the number of its line, and its value or an error in one sentence."""

    line: int
    value: Any = None
    error: str | None = None


def read_lines(path: Path) -> Iterator[Row]:
    """Yield each line of a text file that is not blank.

    Raises:
        UserError: The list cannot be read.
    """
    for line, content in enumerate(_read(path).splitlines(), start=1):
        if content.strip():
            yield Row(line, content, _encoding_error(path, line, content))


def read_rows(path: Path, column: str, header: str) -> Iterator[Row]:
    """Yield each row of a list with the number of its last line; a broken row has an error.

    Args:
        path: A `.csv` file, or one with a JSON value per line.
        column: The column that the header of a `.csv` must have.
        header: An example of such a header, for the error message.

    Raises:
        UserError: The list cannot be read, or its header lacks the column.
    """
    text = _read(path)
    if path.suffix.lower() == ".csv":
        yield from _read_table(path, text, column, header)
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            error = _encoding_error(path, line, content)
            value = None
            try:
                value = None if error else json.loads(content)
            except (ValueError, RecursionError):
                error = f"Line {line} of '{path}' is not valid JSON; write one object per line."
            yield Row(line, value, error)


def _read_table(path: Path, text: str, column: str, header: str) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise UserError(_malformed(path, 1, error)) from error
    if wrong := _encoding_error(path, 1, "".join(names)):
        raise UserError(wrong)
    if column not in names:
        raise UserError(f"Line 1 of '{path}' has no column '{column}'; begin with a header such as {header}.")
    read = reader.line_num
    while read < len(lines):
        before = read
        reader = csv.reader(itertools.islice(lines, before, None), strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                read = before + reader.line_num
                if cells:
                    row = dict(itertools.zip_longest(names, cells))  # surplus cells have the key None
                    yield Row(read, row, _encoding_error(path, read, "".join(cells)))
        except csv.Error as error:
            read += 1  # not the reader's position, since a lone quote swallows all lines up to the next quote
            yield Row(read, None, _malformed(path, read, error))


def _malformed(path: Path, line: int, error: csv.Error) -> str:
    return f"Line {line} of '{path}' is not valid CSV ({error}); correct it."


def _read(path: Path) -> str:
    try:
        # Spreadsheets write a byte order mark; `_encoding_error` finds the lines that are not UTF-8.
        return path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"The list '{path}' cannot be read ({error.strerror}); check its permissions.") from error


def _encoding_error(path: Path, line: int, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"Line {line} of '{path}' is not UTF-8 text; save the list as UTF-8."
    return None
