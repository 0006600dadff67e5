"""The one exception for a person's mistake, and names from files made fit for a message."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the person who runs the program.

    Its message is one sentence that says what was given, what is allowed and what to do. The command line prints it without a
    traceback and exits with code 2. Characters that would act on a terminal are escaped, since names may come from files.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal would act on; white space of any kind becomes a space."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped_markdown(text: str) -> str:
    """Escape the characters of a text that a terminal, HTML or Markdown would act on, so that it is shown as it stands."""
    escaped = re.sub(r"[\\`*_{}\[\]()#+.!-]", r"\\\g<0>", html.escape(printable(text), quote=False))
    return escaped.replace("|", "&#124;").replace("~", "&#126;")  # which Markdown has no escapes for


def shortened(text: str, length: int = 40) -> str:
    """Cut a text that may come from a file to a length, and escape what a terminal would act on."""
    return printable(text if len(text) <= length else f"{text[: length - 1]}…")


def listed(names: Iterable[str], most: int = 8) -> str:
    """Quote names that may come from a file, and count those beyond the first few."""
    quoted = [repr(shortened(name)) for name in names]
    more = [f"{len(quoted) - most} more"] if len(quoted) > most else []
    return " and ".join([", ".join(quoted[:most]), *more])


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error of a library, at most 400 characters."""
    text = re.split(r"(?<=[.!?])\s|\n", str(error).strip())[0].strip() or type(error).__name__
    return text[:400] if text.endswith((".", "!", "?")) else f"{text[:399]}."
