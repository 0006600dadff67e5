"""Write files in one piece or not at all, and serialize values to JSON."""

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
    """Open a file that replaces `path` in one piece, so that a reader finds the old content or the new.

    Missing folders are created.

    Raises:
        OSError: The file, which the error names, could not be written, and an old one is untouched; or the file system
            lost a part of the new content.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic only within a file system; each writer has its own name.
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
            with suppress(OSError):  # it is gone after the replacement, and the first error is the one to report
                temporary.unlink()
        if (size := path.stat().st_size) != written:  # some network file systems lose data silently
            raise OSError(errno.EIO, f"the file has {size} bytes after {written} were written")
    except OSError as error:  # the error of a full disk names no file, others name the temporary one
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file in one piece, see `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data)


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return the content of a JSON file; NaN and infinities become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=default)
    # File names that are not UTF-8 contain lone surrogates, which JSON escapes with a backslash.
    return (text + "\n").encode(errors="backslashreplace")


def json_line(value: Any) -> bytes:
    """Return a line of a JSONL file; NaN and infinities become null."""
    return (json.dumps(finite(value), ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, also in lists and dictionaries."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
