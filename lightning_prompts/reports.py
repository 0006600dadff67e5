"""What the files of a run say of its problems: entries of `result.json`, lines of JSONL files and rows of a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning_prompts.files import atomic_writer, finite, json_line
from lightning_prompts.problems import MEASURED_ON_REQUEST, Problem, Status, unreadable_key

SCHEMA_VERSION = 1  # of result.json

_PACKAGES = ("lightning_prompts", "torch", "diffusers", "transformers", "pytorch_lightning")
_RESULT_KEYS = (
    *("target", "key", "status", "reason", "prompt", "token_ids"),
    *("validation_loss", "clip_similarity", "heldout_clip_similarity", "initial_validation_loss"),
    *("unet_samples", "seconds", "history"),
)
_CHOICES = (  # of methods that choose words
    *("negative_prompt", "words", "loss_before", "loss_after", "fresh_loss_before", "fresh_loss_after"),
    *("heldout_before", "heldout_after", "similarity", "budget"),
)
_STEERED = (  # of methods that move encoded prompts
    *("metric_before", "metric_after", "fresh_metric_before", "fresh_metric_after"),
    *("values_before", "values_after", "fresh_values_before", "fresh_values_after"),
    *("heldout_before", "heldout_after"),
)
_TOP = 5  # candidates in result.json


def prompt_lines(texts: Iterable[str | None]) -> bytes:
    """A line a prompt, empty without one."""
    return "".join(" ".join((text or "").splitlines()) + "\n" for text in texts).encode(errors="backslashreplace")


def result_line(problem: Problem) -> bytes:
    """The line of a problem in `results.jsonl`."""
    return json_line(result_entry(asdict(problem)))


def failed_line(problem: Problem, paths: Sequence[str] = ()) -> bytes:
    """Return a line that names what has failed, as a list of inputs does: its files, its prompt, or a broken line of a list.

    Args:
        problem: The record.
        paths: Its files as they are from here.
    """
    files = [os.path.abspath(path) for path in paths]
    named = {"file": files[0] if len(files) == 1 else files} if files else {"prompt": problem.target}
    if not files and problem.key == unreadable_key([problem.target]):
        named = {"line": problem.target}
    caption = {"caption": problem.caption} if problem.caption else {}
    return json_line({**named, **caption, "reason": problem.reason})


def write_table(path: Path, problems: Iterable[Problem], rows: int = 1000) -> None:
    """Writes what records hold of texts, numbers and lists of these as a Parquet file, so many rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    columns: dict[str, pa.DataType] = {}
    for name, kind in get_type_hints(Problem).items():
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
        several: list[dict[str, Any]] = []
        for problem in problems:
            several.append({name: _clean(getattr(problem, name)) for name in columns})
            if len(several) == rows:
                writer.write_table(pa.Table.from_pylist(several, schema))
                several.clear()
        writer.write_table(pa.Table.from_pylist(several, schema))


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _clean(value: Any) -> Any:
    """Numbers that are finite, and texts that UTF-8 has."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return [_clean(item) for item in value] if isinstance(value, list) else finite(value)


def result_entry(record: dict[str, Any]) -> dict[str, Any]:
    """What `result.json` has of a record."""
    measured = {name: record[name] for name in MEASURED_ON_REQUEST if record[name] is not None}
    return {name: record[name] for name in _RESULT_KEYS} | _choices(record) | _steered(record) | measured


def _choices(record: dict[str, Any]) -> dict[str, Any]:
    """What a method that chooses words has to tell."""
    if record["loss_before"] is None:
        return {}
    best = sorted(record["candidates"], key=lambda candidate: sum(candidate["losses"]))[:_TOP]
    told = [{**candidate, "losses": [abs(loss) for loss in candidate["losses"]]} for candidate in best]
    return {"original_prompt": record["target"], **{name: record[name] for name in _CHOICES}, "candidates": told}


def _steered(record: dict[str, Any]) -> dict[str, Any]:
    """What a method that moves encoded prompts has to tell."""
    told = {name: record[name] for name in ("target_seed", *_STEERED)} if record["metric_before"] else {}
    told |= {name: record[name] for name in ("moves", "heldout_before", "heldout_after")} if record["moves"] else {}
    return {name: value for name, value in told.items() if value is not None}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a result, without importing them."""
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # such as this project itself, run from its source folder
        return "not installed"
