"""Convert records to entries of `result.json`, lines of JSONL files, and rows of a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning_prompts.runs.atomic_io import atomic_writer, finite, json_line
from lightning_prompts.runs.record import MethodResult, Problem, Status, unreadable_key

SCHEMA_VERSION = 1  # of result.json

_PACKAGES = ("lightning_prompts", "torch", "diffusers", "transformers", "pytorch_lightning")
_RESULT_KEYS = (
    *("target", "key", "status", "reason", "prompt", "token_ids"),
    *("validation_loss", "initial_validation_loss", "unet_samples", "seconds", "history"),
)


def prompt_lines(texts: Iterable[str | None]) -> bytes:
    """Return one line per prompt, empty where there is none."""
    return "".join(" ".join((text or "").splitlines()) + "\n" for text in texts).encode(errors="backslashreplace")


def result_line(problem: Problem, result_class: type[MethodResult]) -> bytes:
    """Return the line of a problem in `results.jsonl`."""
    return json_line(result_entry(problem, result_class))


def failed_line(problem: Problem, paths: Sequence[str] = ()) -> bytes:
    """Return the line of a failed problem in `failed.jsonl`, which can be given as a list of inputs again.

    The line has the problem's files, its prompt, or the broken line of a list.

    Args:
        problem: The record.
        paths: Its files, relative to the current folder.
    """
    files = [os.path.abspath(path) for path in paths]
    source = {"file": files[0] if len(files) == 1 else files} if files else {"prompt": problem.target}
    if not files and problem.key == unreadable_key([problem.target]):
        source = {"line": problem.target}
    caption = {"caption": problem.caption} if problem.caption else {}
    return json_line({**source, **caption, "reason": problem.reason})


def write_table(
    path: Path, problems: Iterable[Problem], result_class: type[MethodResult] = MethodResult, rows: int = 1000
) -> None:
    """Write a Parquet file with the fields of records that are texts, numbers, or lists of these.

    Args:
        path: The file.
        problems: The records.
        result_class: Class of the method's results.
        rows: Records in memory at a time.
    """
    import pyarrow as pa
    from pyarrow import parquet

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    columns: dict[str, pa.DataType] = {}
    own = get_type_hints(result_class)  # the method's fields
    for name, kind in (get_type_hints(Problem) | own).items():
        kind = next((part for part in get_args(kind) if part is not type(None)), kind) if _optional(kind) else kind
        if kind in plain:
            columns[name] = plain[kind]
        elif kind == Status:
            columns[name] = pa.string()
        elif getattr(kind, "__origin__", None) is list and get_args(kind)[0] in plain:
            columns[name] = pa.list_(plain[get_args(kind)[0]])
    del columns["stamps"]
    schema = pa.schema(list(columns.items()))
    with atomic_writer(path) as file, parquet.ParquetWriter(file, schema) as writer:
        chunk: list[dict[str, Any]] = []
        for problem in problems:
            result = result_class.of(problem)
            chunk.append({name: _clean(getattr(result if name in own else problem, name)) for name in columns})
            if len(chunk) == rows:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk.clear()
        writer.write_table(pa.Table.from_pylist(chunk, schema))


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _clean(value: Any) -> Any:
    """Replace NaN and infinities by None, and escape what UTF-8 cannot encode."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return [_clean(item) for item in value] if isinstance(value, list) else finite(value)


def result_entry(problem: Problem, result_class: type[MethodResult]) -> dict[str, Any]:
    """Return the entry of a problem in `result.json`: the common fields and those of the method."""
    common = {name: getattr(problem, name) for name in _RESULT_KEYS}
    return common | result_class.of(problem).entry(problem)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results, without importing them."""
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # such as this project itself, run from its source folder
        return "not installed"
