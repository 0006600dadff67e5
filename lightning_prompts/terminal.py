"""The one door to the terminal.

Texts may come from files. What is printed acts on no terminal and forges no line; and a terminal that has other characters, is
closed or is a file on a full disk ends no search.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from contextlib import suppress
from typing import TextIO

from lightning_prompts.errors import printable


def say(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines, each of which stays one line.

    Args:
        *lines: The lines, in which any characters may stand.
        stream: Where to; None for standard output.
    """
    stream = stream or sys.stdout
    try:
        print("\n".join(map(printable, lines)), file=stream, flush=True)
    except OSError:
        _silence(stream)


def prepare() -> None:
    """Have all that this process logs go through this door, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever characters the terminal has
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.raiseExceptions = False  # a line that cannot be written is lost, and no traceback takes its place
    logging.getLogger("lightning_prompts").setLevel(logging.INFO)
    reports = logging.getLogger("pytorch_lightning.profilers")
    reports.handlers, reports.propagate = [_Report()], False
    reports.setLevel(logging.INFO)
    threading.excepthook = _tell_of_thread


def close() -> None:
    """Write what is left, so that the interpreter has nothing to complain of when it exits."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


class _Printable(logging.Formatter):
    """A formatter whose messages are one line that acts on nothing."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback."""
        return printable(super().formatMessage(record))


class _Report(logging.Handler):
    """Print the report of `--trainer.profiler`, the one message of many lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print its lines."""
        say(*record.getMessage().splitlines())


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread but for a full disk, which whoever waits for the thread hears of."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Have a stream that nothing can be written to lead nowhere."""
    with suppress(OSError):  # it is no file, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
