"""Write the records of a run to `result.json`, `results.jsonl`, `results.parquet`, `failed.jsonl`, `prompt.txt`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_prompts.runs.atomic_io import atomic_write, atomic_writer, json_line, to_json
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.reports import (
    SCHEMA_VERSION,
    failed_line,
    prompt_lines,
    result_entry,
    result_line,
    write_table,
)

log = logging.getLogger(__name__)


def append_line(folder: RunFolder, problem: Problem, rank: int = 0) -> None:
    """Append the line of a finished problem to a rank's `results.jsonl`; `write_results` puts all lines in order."""
    if not folder.writes:
        return
    try:
        with folder.lines_of(rank).open("ab") as file:
            file.write(result_line(problem, folder.result_class))
    except OSError as error:
        log.warning("The line of %s could not be written (%s); the run continues.", problem.target, error)


def write_lines(folder: RunFolder) -> None:
    """Write the lines of all finished problems, including those of other ranks in an earlier run."""
    with atomic_writer(folder.lines) as file:
        for problem in folder.ordered():
            if problem.status != "open":
                file.write(result_line(problem, folder.result_class))


def write_results(
    folder: RunFolder, method: str, backbone: str, seed: int, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write the results of all problems, with at most a thousand records in memory.

    `prompt.txt` has one line per problem, empty if it has no prompt. So has `negative_prompt.txt`, which is written if
    a problem has a negative prompt.

    Args:
        folder: The run's folder.
        method: Class name of the method.
        backbone: Name of the model.
        seed: Seed of the run.
        settings: Settings of the run.
        versions: Versions by package.

    Raises:
        UserError: A record cannot be read, or the old `result.json` has a prompt without a record. No file has changed.
    """
    folder.check_complete({file.stem for file in folder.problems.glob("*.json")})
    head = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "backbone": backbone,
        "seed": seed,
        "settings": settings,
        "versions": versions,
    }
    prompts, negatives, failed = list[str | None](), list[str | None](), list[bytes]()
    with atomic_writer(folder.result) as file, atomic_writer(folder.lines) as lines:

        def written() -> Iterator[Problem]:
            """Yield each problem after writing it to the other files, so that each record is read once."""
            for number, problem in enumerate(folder.ordered()):
                entry = result_entry(problem, folder.result_class)
                indented = to_json(entry).rstrip().replace(b"\n", b"\n    ")
                file.write((b",\n    " if number else b"\n    ") + indented)
                if problem.status != "open":
                    lines.write(json_line(entry))
                if problem.status == "failed":
                    failed.append(failed_line(problem, list(map(folder.saved.located, problem.paths))))
                prompts.append(problem.prompt)
                negatives.append(problem.negative_prompt)
                yield problem

        # str: a path or a dtype among the settings must not cost the results at the end of a run.
        file.write(to_json(head, default=str)[: -len("\n}\n")] + b',\n  "problems": [')
        write_table(folder.table, written(), folder.result_class)
        file.write(b"\n  ]\n}\n" if prompts else b"]\n}\n")
    atomic_write(folder.prompt, prompt_lines(prompts))
    if any(negative is not None for negative in negatives):
        atomic_write(folder.negative_prompt, prompt_lines(negatives))
    if failed:
        atomic_write(folder.failed, b"".join(failed))
    else:
        folder.failed.unlink(missing_ok=True)
