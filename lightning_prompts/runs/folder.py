"""The folder of a run, with a file for the record of each problem: the only code that writes results.

A run is a set of independent problems. Each has one small file that only its owner writes, and always in one piece, so a run that
ends in any way leaves the best prompts found so far. `result.json` and `prompt.txt` are merged from these files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lightning_prompts.data.shards import exists
from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import atomic_write, atomic_writer, json_line, to_json
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.runs.record import MethodResult, Problem, checked
from lightning_prompts.runs.reports import (
    SCHEMA_VERSION,
    failed_line,
    prompt_lines,
    result_entry,
    result_line,
    write_table,
)

log = logging.getLogger(__name__)

PATHS = {  # settings that may name a file or folder
    *("images", "negative_images", "backbone", "config", "clip", "start", "dictionary", "sentence_encoder"),
    *("reference", "wants", "lpips_weights", "scorer", "language_model"),
}

RECORD_VERSION = 2
"""Version of the records' layout. A record of another version is refused, since its fields may mean something else."""


class RunFolder:
    """The folder of a run, usually `runs/<name>/`, and where things are in it; it need not exist.

    Args:
        path: Where it is.
        writes: Whether this process writes to it; of ranks that search the same problems only the first does.
        result_class: Class of the results that the run's method records; with the default they stay dictionaries.
    """

    def __init__(
        self, path: str | os.PathLike[str], writes: bool = True, result_class: type[MethodResult] = MethodResult
    ) -> None:
        self.path, self.writes, self.result_class = Path(path), writes, result_class
        self.problems = self.path / "problems"
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.result = self.path / "result.json"
        self.lines = self.path / "results.jsonl"  # while a search goes on, of rank 0's problems
        self.table = self.path / "results.parquet"
        self.failed = self.path / "failed.jsonl"
        self.prompt = self.path / "prompt.txt"
        self.negative_prompt = self.path / "negative_prompt.txt"
        self.grid = self.path / "grid.png"
        self.words = self.path / "words.png"
        self.embedding = self.path / "embedding.safetensors"
        self.embeddings = self.path / "embeddings"  # in the layout of other tools, a file a pseudo-word
        self.prompt_embeds = self.path / "prompt_embeds.safetensors"
        self.generations = self.path / "generations.json"  # of a mix of two runs

    @staticmethod
    def name(method: str, now: datetime) -> str:
        """Returns the default name of a run, such as `2026-11-20_14-03-22_ph2p`, which is safe in paths and shells."""
        return f"{now:%Y-%m-%d_%H-%M-%S}_{re.sub(r'[^a-z0-9._-]+', '-', method.lower())}"

    def prepare(self, resume: bool, search: bool = True) -> None:
        """Creates the folders and tries whether they can be written, before any time is spent.

        To be called by one process before any other writes, whose records it would otherwise take for an earlier run.

        Args:
            resume: Whether to go on with the run that the folder holds.
            search: Whether there will be records and checkpoints, which a mix of runs has none of.

        Raises:
            UserError: The folder holds a run that is not to be resumed or that cannot be read, is a file or cannot be written.
        """
        self._check_kind()
        begun = any(self.problems.glob("*.json")) or self.generations.exists()
        foreign = self.config.exists() and not self.problems.is_dir()
        # A search that was stopped before its first record leaves a config and no records.
        if not resume and (begun or foreign):
            hint = "give --ckpt_path last to go on with it or another --run" if search else "give another --run"
            raise UserError(f"The folder {self.path} already holds a run; {hint}.")
        self.check()
        self.check_writable(*((self.problems, self.checkpoints) if search else ()))

    def check_writable(self, *folders: Path, instead: str = "give another --run") -> None:
        """Try whether the run's folder, and folders in it, can be written, before any time is spent.

        Args:
            *folders: The folders in it.
            instead: What the error advises beside making room or giving permission.

        Raises:
            UserError: They cannot.
        """
        try:
            for left in self._left_over():
                left.unlink()
            for folder in (self.path, *folders):
                atomic_write(folder / ".write-test", b"test")
                (folder / ".write-test").unlink()
        except OSError as error:
            raise self._not_writable(error, instead) from error

    @contextmanager
    def locked(self) -> Iterator[RunLock]:
        """Hold the folder for this process and those that search with it, see `RunLock`.

        Raises:
            UserError: Another process works in the folder, or it is a file or cannot be written.
        """
        self._check_kind()
        with ExitStack() as held:
            try:
                lock = held.enter_context(RunLock(self.path))
            except OSError as error:
                raise self._not_writable(error) from error
            yield lock

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"The run folder {self.path} is a file; give another --run.")

    def _not_writable(self, error: OSError, instead: str = "give another --run") -> UserError:
        return UserError(
            f"The run folder {self.path} cannot be written ({error.strerror or error}); {instead}, or free space or permit writing "
            "there."
        )

    def _left_over(self) -> list[Path]:
        """The files that processes which were killed have left in the middle of a write, or of taking over the lock."""
        return [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp"), *self.path.glob(".lock.*")]

    def discard(self) -> None:
        """Delete the folder if no search has begun in it; of a locked one everything but the lock, which deletes the rest."""
        if any(self.problems.glob("*.json")):
            return
        for left in self.path.glob("*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif not left.name.startswith(".lock"):
                with suppress(OSError):
                    left.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def save(self, problem: Problem) -> None:
        """Writes the record of a problem; after an OSError, such as a full disk, its previous state is still there."""
        self.write(self.problems / f"{problem.key}.json", to_json({"version": RECORD_VERSION, **asdict(problem)}))

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file of the run in one piece, see `atomic_writer`."""
        if self.writes:
            atomic_write(path, content)

    def forget(self, key: str) -> bool:
        """Deletes a record; tells whether there was one."""
        there = self.has(key)
        if there and self.writes:
            (self.problems / f"{key}.json").unlink(missing_ok=True)
        return there

    def save_or_warn(self, problem: Problem) -> None:
        """Writes a record in the middle of a search, which is worth more than this write: the next one tries again."""
        try:
            self.save(problem)
        except OSError as error:
            log.warning("The record of %s could not be written (%s); the run continues.", problem.target, error)

    def embeds_of(self, key: str) -> Path:
        """The file of the best encoded prompt of a problem."""
        return self.problems / f"{key}.safetensors"

    def drawn_of(self, key: str) -> Path:
        """The file of what a problem's prompt draws."""
        return self.problems / f"{key}.png"

    def save_embeds(self, key: str, content: bytes) -> None:
        """Writes the best encoded prompt of a problem, or warns, as the search is worth more than this write."""
        self._write_or_warn(self.embeds_of(key), content, "embeddings")

    def save_drawn(self, key: str, content: bytes) -> None:
        """Writes what a problem's prompt draws, or warns."""
        self._write_or_warn(self.drawn_of(key), content, "pictures")

    def _write_or_warn(self, path: Path, content: bytes, what: str) -> None:
        try:
            self.write(path, content)
        except OSError as error:
            log.warning("The %s of %s could not be written (%s); the run continues.", what, path.stem, error)

    def has(self, key: str) -> bool:
        """Whether there is a record of a problem."""
        return (self.problems / f"{key}.json").exists()

    def read(self, key: str) -> Problem | None:
        """Read the record of a problem; None if there is none.

        Raises:
            UserError: The record cannot be read.
        """
        return _read_record(self.problems / f"{key}.json", self.result_class) if self.has(key) else None

    def records(self) -> Iterator[Problem]:
        """Read one record after the other.

        Raises:
            UserError: A record cannot be read.
        """
        for file in self.problems.glob("*.json"):
            yield _read_record(file, self.result_class)

    def check(self) -> None:
        """Make sure that nothing that was found is missing, before anything is computed or written.

        Raises:
            UserError: A record cannot be read, or `result.json` has a prompt of which there is no record.
        """
        if self.problems.exists() and not self.problems.is_dir():
            raise UserError(f"{self.problems} must be a folder of records, and is a file; restore it.")
        self._check_complete({problem.key for problem in self.records()})

    def _check_complete(self, keys: set[str]) -> None:
        """Refuse to replace `result.json` by results without some of its prompts."""
        if lost := sorted(self._result_keys() - keys):
            more = f" and {len(lost) - 1} more records" if len(lost) > 1 else ""
            raise UserError(
                f"{self.result} has the result of {lost[0]}, but {self.problems / lost[0]}.json{more} is missing; restore it, or "
                f"rename {self.result.name} to continue without it."
            )

    def _result_keys(self) -> set[str]:
        """Return the keys of the problems for which `result.json` has a prompt; none if it is missing or damaged."""
        keys: set[str] = set()
        with suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError, AttributeError):
            content = json.loads(self.result.read_bytes())
            if content.get("schema_version") == SCHEMA_VERSION:
                keys = {entry["key"] for entry in content["problems"] if entry["prompt"]}
        return keys

    def ordered(self) -> Iterator[Problem]:
        """As `records`, in the order of the inputs; no more than one is held at a time."""
        for _, key in sorted((problem.index, problem.key) for problem in self.records()):
            if problem := self.read(key):
                yield problem

    def load(self) -> dict[str, Problem]:
        """All records by key, in the order of the inputs."""
        return {problem.key: problem for problem in self.ordered()}

    def found(self) -> Iterator[Problem]:
        """The records that have a prompt, in the order of the inputs."""
        return (problem for problem in self.ordered() if problem.prompt and problem.status != "failed")

    def saved_config(self) -> Path:
        """The file of the settings of a run that has begun; a UserError where there is none."""
        if not self.config.exists():
            raise UserError(
                f"There is no run in {self.path} (it has no config.yaml); give the folder of an earlier fit."
            )
        return self.config

    def saved_settings(self) -> dict[str, Any]:
        """The settings of a run that has begun: `model` and `data`, each with its `init_args`; a UserError without any."""
        path = self.saved_config()
        try:
            config = yaml.safe_load(path.read_bytes())
            return {part: {**config[part], "init_args": {**config[part]["init_args"]}} for part in ("model", "data")}
        except (yaml.YAMLError, KeyError, TypeError):
            raise UserError(f"{path} is not the config of a run; give the folder of an earlier fit.") from None

    @cached_property
    def origin(self) -> Path:
        """The folder that relative paths of the saved settings and records start at: where `fit` ran."""
        with suppress(OSError, UnicodeDecodeError):
            if start := re.match(r"# relative paths start at: (.+)\n", self.config.read_text(encoding="utf-8")):
                return self.path / str(json.loads(start[1]))
        return Path()

    def with_origin(self, config: str) -> str:
        """Add to a config where its relative paths start; relative to the run's folder, so that both can be moved together."""
        start = os.path.relpath(Path.cwd(), self.path.resolve())
        return f"# relative paths start at: {json.dumps(start)}\n{config}"

    def located(self, path: str) -> str:
        """Return a path of the saved settings or of a record as it is from here."""
        if os.path.isabs(path) or not self.origin.is_dir() or self.origin.resolve() == Path.cwd():
            return path
        there = os.path.relpath(self.origin / path)
        return path if exists(path) and not exists(there) else there

    def moved_settings(self) -> dict[str, Any]:
        """Return those of the saved settings that name files or folders which have another path from here."""
        config = yaml.safe_load(self.config.read_bytes())
        moved = {
            name: value for name in PATHS & config.keys() if (value := self._moved(name, config[name])) != config[name]
        }
        for part in ("model", "data"):
            settings = config[part]["init_args"]
            others = {
                name: value for name in settings if (value := self._moved(name, settings[name])) != settings[name]
            }
            moved |= {part: {"init_args": others}} if others else {}
        return moved

    def _moved(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._moved(name if key == "name" else key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._moved(name, item) for item in value]
        if name not in PATHS or not isinstance(value, str) or value == "emoji":
            return value
        # What is no file there may be a model's name or a text.
        return there if (there := self.located(value)) != value and os.path.exists(there.partition("#")[0]) else value

    def hard_prompts(self) -> list[Problem]:
        """The records that have a prompt, in the order of the inputs; a UserError where there is none or it is no text."""
        self.saved_config()
        found = list(self.found())
        if not found:
            raise UserError(f"The run {self.path} has no prompt yet; let its fit go on or give another run.")
        if any(problem.token_ids is None for problem in found):
            raise UserError(
                f"The run {self.path} has found embeddings, as textual inversion does, and a prompt of tokens is needed; "
                "give a run of another method."
            )
        return found

    def append_line(self, problem: Problem, rank: int = 0) -> None:
        """Adds a line about a problem that is finished; when all are, `write_result` writes them in their order."""
        if not self.writes:
            return
        try:
            with self.lines_of(rank).open("ab") as file:
                file.write(result_line(problem, self.result_class))
        except OSError as error:
            log.warning("The line of %s could not be written (%s); the run continues.", problem.target, error)

    def lines_of(self, rank: int) -> Path:
        """Where a rank adds the lines of its problems."""
        return self.lines if rank == 0 else self.path / f"results-rank{rank}.jsonl"

    def write_lines(self) -> None:
        """Writes the lines of all problems that are finished; those of earlier ranks are among them."""
        with atomic_writer(self.lines) as file:
            for problem in self.ordered():
                if problem.status != "open":
                    file.write(result_line(problem, self.result_class))

    def write_result(
        self, method: str, backbone: str, seed: int, settings: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """Merges all records into `result.json`, `results.jsonl`, `results.parquet`, `failed.jsonl` and `prompt.txt`.

        The latter has one line a problem, empty without a prompt; so has `negative_prompt.txt`, if the method searches negative
        prompts. No more than a thousand records are held at a time.

        Raises:
            UserError: A record cannot be read, or the old `result.json` has a prompt of which there is no record. No file has changed.
        """
        self._check_complete({file.stem for file in self.problems.glob("*.json")})
        head = {
            "schema_version": SCHEMA_VERSION,
            "method": method,
            "backbone": backbone,
            "seed": seed,
            "settings": settings,
            "versions": versions,
        }
        prompts, negatives, failed = list[str | None](), list[str | None](), list[bytes]()
        with atomic_writer(self.result) as file, atomic_writer(self.lines) as lines:

            def told() -> Iterator[Problem]:
                """Each problem, when it has been written to the other files: thousands of records are read once."""
                for number, problem in enumerate(self.ordered()):
                    entry = result_entry(problem, self.result_class)
                    indented = to_json(entry).rstrip().replace(b"\n", b"\n    ")
                    file.write((b",\n    " if number else b"\n    ") + indented)
                    if problem.status != "open":
                        lines.write(json_line(entry))
                    if problem.status == "failed":
                        failed.append(failed_line(problem, list(map(self.located, problem.paths))))
                    prompts.append(problem.prompt)
                    negatives.append(problem.negative_prompt)
                    yield problem

            # str: a path or a dtype among the settings must not cost the results at the end of a run.
            file.write(to_json(head, default=str)[: -len("\n}\n")] + b',\n  "problems": [')
            write_table(self.table, told(), self.result_class)
            file.write(b"\n  ]\n}\n" if prompts else b"]\n}\n")
        atomic_write(self.prompt, prompt_lines(prompts))
        if any(negative is not None for negative in negatives):
            atomic_write(self.negative_prompt, prompt_lines(negatives))
        if failed:
            atomic_write(self.failed, b"".join(failed))
        else:
            self.failed.unlink(missing_ok=True)


def _read_record(file: Path, result_class: type[MethodResult]) -> Problem:
    """Read a record and check the type of each field.

    Raises:
        UserError: The file is not a record of this version.
    """
    try:
        content = json.loads(file.read_bytes())
        version = content.pop("version")
        if version != RECORD_VERSION:
            newer = isinstance(version, int) and version > RECORD_VERSION
            raise UserError(
                f"The record {file} has the version {str(version)[:20]!r}, and this program reads version {RECORD_VERSION}; "
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
            f"The record {file} cannot be read ({_reason(error)}); restore it, or delete it to search this problem again."
        ) from error
    return problem


def _reason(error: Exception) -> str:
    """Describe why a record is none, in a few words."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])[:80]}: {first['msg']}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not valid JSON, as if cut short"
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:100] or type(error).__name__
