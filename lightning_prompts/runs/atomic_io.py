"""Files that are written in one piece or not at all, and what they hold of texts and numbers."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Gives a file to write, which comes in its place in one piece: whoever reads it finds the old content or the new.

    Missing folders are created.

    Raises:
        OSError: The file, which the error names, could not be written, and an old one is untouched, or has lost what was written.
    """
    path = Path(path)
    # In the same folder, as a rename is atomic only within a file system; its own name for each writer.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                written = file.tell()
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # it is gone after the replacement, and the first error is the one to hear about
                temporary.unlink()
        if (size := path.stat().st_size) != written:  # network file systems have been seen to lose data silently
            raise OSError(errno.EIO, f"{size} bytes are there after {written} were written")
    except OSError as error:  # that of a full disk names no file, and others the temporary one
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file in one piece, see `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data)


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The content of a JSON file; numbers that JSON does not have become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=default)
    # File names that are not UTF-8 hold lone surrogates, whose backslash form is what JSON calls for.
    return (text + "\n").encode(errors="backslashreplace")


def json_line(value: Any) -> bytes:
    """A line of a JSONL file; numbers that JSON does not have become null."""
    return (json.dumps(finite(value), ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
