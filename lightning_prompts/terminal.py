"""Print to the terminal safely.

Control characters are escaped, since texts may come from files. A terminal that is closed, lacks characters, or is a
file on a full disk does not interrupt a search.
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
    """Print lines, with line breaks and control characters inside them escaped.

    Args:
        *lines: The lines.
        stream: Where to print; None for standard output.
    """
    stream = stream or sys.stdout
    try:
        print("\n".join(map(printable, lines)), file=stream, flush=True)
    except OSError:
        _silence(stream)


def prepare() -> None:
    """Configure logging, standard output and standard error of this process in the same way."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.raiseExceptions = False  # print no traceback for a log line that cannot be written
    logging.getLogger("lightning_prompts").setLevel(logging.INFO)
    reports = logging.getLogger("pytorch_lightning.profilers")
    reports.handlers, reports.propagate = [_Report()], False
    reports.setLevel(logging.INFO)
    threading.excepthook = _print_thread_error


def close() -> None:
    """Flush the streams, so that the interpreter reports no error at exit."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


class _Printable(logging.Formatter):
    """Format messages as one line, with control characters escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback."""
        return printable(super().formatMessage(record))


class _Report(logging.Handler):
    """Print the report of `--trainer.profiler`, the only message of many lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the lines of a report."""
        say(*record.getMessage().splitlines())


def _print_thread_error(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for an OSError such as a full disk, which the waiting thread reports."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to to the null device."""
    with suppress(OSError):  # it has no file descriptor, as in a notebook
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
