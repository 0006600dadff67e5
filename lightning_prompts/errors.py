"""The exception for a user's mistakes, and escaping of text in messages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user.

    The message says what was given, what is allowed and what to do. The command line prints it without a traceback and
    exits with code 2. Control characters are escaped, since names may come from files.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape control characters, and replace white space of any kind by spaces."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped_markdown(text: str) -> str:
    """Escape control characters and the markup of HTML and Markdown."""
    escaped = re.sub(r"[\\`*_{}\[\]()#+.!-]", r"\\\g<0>", html.escape(printable(text), quote=False))
    return escaped.replace("|", "&#124;").replace("~", "&#126;")  # Markdown has no backslash escape for these


def shortened(text: str, length: int = 40) -> str:
    """Truncate a text to a length, and escape its control characters."""
    return printable(text if len(text) <= length else f"{text[: length - 1]}…")


def listed(names: Iterable[str], most: int = 8) -> str:
    """Quote the first `most` names, and count the rest."""
    quoted = [repr(shortened(name)) for name in names]
    more = [f"{len(quoted) - most} more"] if len(quoted) > most else []
    return " and ".join([", ".join(quoted[:most]), *more])


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's error, cut at 400 characters."""
    text = re.split(r"(?<=[.!?])\s|\n", str(error).strip())[0].strip() or type(error).__name__
    return text[:400] if text.endswith((".", "!", "?")) else f"{text[:399]}."


def import_failure(error: Exception) -> str:
    """Return the class and the first sentence of an error that the import of another package raised."""
    return f"{type(error).__name__}: {first_sentence(error).rstrip('.')}"
