"""Read and write the file of a record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import to_json
from lightning_prompts.runs.record import MethodResult, Problem, checked

RECORD_VERSION = 2
"""Version of the records' layout. A record of another version is refused, since its fields may mean something else."""


def dump_record(problem: Problem) -> bytes:
    """Return the content of a record's file."""
    return to_json({"version": RECORD_VERSION, **asdict(problem)})


def load_record(file: Path, result_class: type[MethodResult]) -> Problem:
    """Read a record and check the type of each field.

    Args:
        file: The record's file, named after its key.
        result_class: Class of the method's result.

    Raises:
        UserError: The file is not a record of this version.
    """
    try:
        content = json.loads(file.read_bytes())
        version = content.pop("version")
        if version != RECORD_VERSION:
            newer = isinstance(version, int) and version > RECORD_VERSION
            raise UserError(
                f"The record {file} has the version {str(version)[:20]!r}, and this program reads version "
                f"{RECORD_VERSION}; "
                + ("use the newer program that wrote it." if newer else "use the program that wrote it.")
            )
        result = content.pop("result", None)
        problem: Problem = checked(Problem, content)
        problem.result = result_class.read(result)
        if problem.key != file.stem:
            raise ValueError(f"its key is {problem.key!r}")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The record {file} cannot be read ({_reason(error)}); restore it, or delete it to search this problem "
            "again."
        ) from error
    return problem


def _reason(error: Exception) -> str:
    """Summarize in a few words why a file is not a record."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])[:80]}: {first['msg']}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not valid JSON, as if cut short"
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:100] or type(error).__name__
