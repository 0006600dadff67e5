"""Lists of inputs that a person has written: plain text, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError


def read_text(path: Path) -> str:
    """The text of a list.

    Raises:
        UserError: It cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise UserError(f"The list '{path}' cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"Line {line} of '{path}' is not UTF-8 text; save the list as UTF-8.") from error


def read_rows(path: Path, column: str, header: str) -> Iterator[tuple[int, Any]]:
    """Gives each row of a list with the number of its (last) line.

    Args:
        path: A `.csv`, or JSON values, one a line.
        column: What the header of a `.csv` must have.
        header: Such a header, as an example.

    Raises:
        UserError: The list cannot be read, or a line is malformed.
    """
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        try:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"Line 1 of '{path}' has no column '{column}'; begin with a header such as {header}.")
            for row in reader:
                yield reader.reader.line_num, row  # DictReader's own number stops at blank lines
        except csv.Error as error:
            line = reader.reader.line_num
            raise UserError(f"Line {line} of '{path}' is not valid CSV ({error}); correct it.") from error
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise UserError(f"Line {line} of '{path}' is not valid JSON; write one object a line.") from error
            yield line, row
