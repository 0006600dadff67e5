"""The folder of a run, with a file for the record of each problem.

A run is a set of independent problems. Each has one small file that only its rank writes, and always in one piece, so a
run that ends in any way leaves the best prompts so far. `result_files` merges the records into the results.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.runs.record import MethodResult, Problem
from lightning_prompts.runs.record_io import dump_record, load_record
from lightning_prompts.runs.reports import SCHEMA_VERSION
from lightning_prompts.runs.saved_settings import SavedSettings

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run, usually `runs/<name>/`, and the files in it; it need not exist.

    Args:
        path: The folder.
        writes: Whether this process writes to it; of ranks that search the same problems only the first does.
        result_class: Class of the method's results; with the default they are read as dictionaries.
    """

    def __init__(
        self, path: str | os.PathLike[str], writes: bool = True, result_class: type[MethodResult] = MethodResult
    ) -> None:
        self.path, self.writes, self.result_class = Path(path), writes, result_class
        self.problems = self.path / "problems"
        self.checkpoints = self.path / "checkpoints"
        self.saved = SavedSettings(self.path)
        self.config = self.saved.file
        self.result = self.path / "result.json"
        self.lines = self.path / "results.jsonl"  # while a search runs, of rank 0's problems
        self.table = self.path / "results.parquet"
        self.failed = self.path / "failed.jsonl"
        self.prompt = self.path / "prompt.txt"
        self.negative_prompt = self.path / "negative_prompt.txt"
        self.grid = self.path / "grid.png"
        self.words = self.path / "words.png"
        self.embedding = self.path / "embedding.safetensors"
        self.embeddings = self.path / "embeddings"  # in the layout of other tools, one file per pseudo-word
        self.prompt_embeds = self.path / "prompt_embeds.safetensors"
        self.generations = self.path / "generations.json"  # of a mix of two runs

    @staticmethod
    def name(method: str, now: datetime) -> str:
        """Return the default name of a run, such as `2026-11-20_14-03-22_ph2p`, which is safe in paths and shells."""
        return f"{now:%Y-%m-%d_%H-%M-%S}_{re.sub(r'[^a-z0-9._-]+', '-', method.lower())}"

    def prepare(self, resume: bool, search: bool = True) -> None:
        """Create the folders and test that they can be written, before the search spends any time.

        One process must call this before any other writes, or it would take their records for those of an earlier run.

        Args:
            resume: Whether to resume the run in the folder.
            search: Whether there will be records and checkpoints; a mix of runs has neither.

        Raises:
            UserError: The folder has a run that is not to be resumed or cannot be read, is a file, or cannot be
                written.
        """
        self._check_kind()
        begun = any(self.problems.glob("*.json")) or self.generations.exists()
        # A search that was stopped before its first record leaves a config and an empty folder of records.
        foreign = self.config.exists() and not self.problems.is_dir()
        if not resume and (begun or foreign):
            hint = "give --ckpt_path last to resume it or another --run" if search else "give another --run"
            raise UserError(f"The folder {self.path} already holds a run; {hint}.")
        self.check()
        self.check_writable(*((self.problems, self.checkpoints) if search else ()))

    def check_writable(self, *folders: Path, instead: str = "give another --run") -> None:
        """Test that the run's folder, and folders in it, can be written.

        Args:
            *folders: The folders in it.
            instead: What the error advises besides freeing space or permitting writing.

        Raises:
            UserError: A folder cannot be written.
        """
        try:
            for file in self._temporary_files():
                file.unlink()
            for folder in (self.path, *folders):
                atomic_write(folder / ".write-test", b"test")
                (folder / ".write-test").unlink()
        except OSError as error:
            raise self._not_writable(error, instead) from error

    @contextmanager
    def locked(self) -> Iterator[RunLock]:
        """Lock the folder for this process and those that search with it, see `RunLock`.

        Raises:
            UserError: Another process uses the folder, or it is a file or cannot be written.
        """
        self._check_kind()
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(RunLock(self.path))
            except OSError as error:
                raise self._not_writable(error) from error
            yield lock

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"The run folder {self.path} is a file; give another --run.")

    def _not_writable(self, error: OSError, instead: str = "give another --run") -> UserError:
        return UserError(
            f"The run folder {self.path} cannot be written ({error.strerror or error}); {instead}, or free space or "
            "permit writing there."
        )

    def _temporary_files(self) -> list[Path]:
        """List what killed processes left behind in the middle of a write, or of taking over the lock."""
        return [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp"), *self.path.glob(".lock.*")]

    def discard(self) -> None:
        """Delete the folder if it has no records, except for the lock file, which `RunLock` removes."""
        if any(self.problems.glob("*.json")):
            return
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not path.name.startswith(".lock"):
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def save(self, problem: Problem) -> None:
        """Write the record of a problem; an OSError, such as a full disk, leaves its previous state."""
        self.write(self.problems / f"{problem.key}.json", dump_record(problem))

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the run in one piece, see `atomic_writer`."""
        if self.writes:
            atomic_write(path, content)

    def delete(self, key: str) -> bool:
        """Delete a record; return whether there was one."""
        existed = self.has(key)
        if existed and self.writes:
            (self.problems / f"{key}.json").unlink(missing_ok=True)
        return existed

    def save_or_warn(self, problem: Problem) -> None:
        """Write a record during a search, or warn; the search continues and saves the record again later."""
        try:
            self.save(problem)
        except OSError as error:
            log.warning("The record of %s could not be written (%s); the run continues.", problem.target, error)

    def embeds_of(self, key: str) -> Path:
        """Return the file of a problem's best encoded prompt."""
        return self.problems / f"{key}.safetensors"

    def image_of(self, key: str) -> Path:
        """Return the file of the images of a problem's prompt, side by side."""
        return self.problems / f"{key}.png"

    def save_embeds(self, key: str, content: bytes) -> None:
        """Write a problem's best encoded prompt, or warn and continue."""
        self._write_or_warn(self.embeds_of(key), content, "embeddings")

    def save_image(self, key: str, content: bytes) -> None:
        """Write the images of a problem's prompt, or warn and continue."""
        self._write_or_warn(self.image_of(key), content, "images")

    def _write_or_warn(self, path: Path, content: bytes, what: str) -> None:
        try:
            self.write(path, content)
        except OSError as error:
            log.warning("The %s of %s could not be written (%s); the run continues.", what, path.stem, error)

    def has(self, key: str) -> bool:
        """Return whether a problem has a record."""
        return (self.problems / f"{key}.json").exists()

    def read(self, key: str) -> Problem | None:
        """Read the record of a problem; return None if it has none.

        Raises:
            UserError: The record cannot be read.
        """
        return load_record(self.problems / f"{key}.json", self.result_class) if self.has(key) else None

    def records(self) -> Iterator[Problem]:
        """Yield all records, in no order.

        Raises:
            UserError: A record cannot be read.
        """
        for file in self.problems.glob("*.json"):
            yield load_record(file, self.result_class)

    def check(self) -> None:
        """Make sure that no result is missing, before anything is computed or written.

        Raises:
            UserError: A record cannot be read, or `result.json` has a prompt without a record.
        """
        if self.problems.exists() and not self.problems.is_dir():
            raise UserError(f"{self.problems} must be a folder of records, and is a file; restore it.")
        self.check_complete({problem.key for problem in self.records()})

    def check_complete(self, keys: set[str]) -> None:
        """Refuse to replace `result.json` by results that lack some of its prompts.

        Args:
            keys: The keys of the records.

        Raises:
            UserError: `result.json` has a prompt without a record.
        """
        if lost := sorted(self._result_keys() - keys):
            more = f" and {len(lost) - 1} more records" if len(lost) > 1 else ""
            raise UserError(
                f"{self.result} has the result of {lost[0]}, but {self.problems / lost[0]}.json{more} is missing; "
                f"restore it, or rename {self.result.name} to continue without it."
            )

    def _result_keys(self) -> set[str]:
        """Return the keys of the problems with a prompt in `result.json`; none if it is missing or damaged."""
        keys: set[str] = set()
        with suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError, AttributeError):
            content = json.loads(self.result.read_bytes())
            if content.get("schema_version") == SCHEMA_VERSION:
                keys = {entry["key"] for entry in content["problems"] if entry["prompt"]}
        return keys

    def ordered(self) -> Iterator[Problem]:
        """Yield all records in the order of the inputs, with one in memory at a time."""
        for _, key in sorted((problem.index, problem.key) for problem in self.records()):
            if problem := self.read(key):
                yield problem

    def load(self) -> dict[str, Problem]:
        """Return all records by key, in the order of the inputs."""
        return {problem.key: problem for problem in self.ordered()}

    def with_prompt(self) -> Iterator[Problem]:
        """Yield the records that have a prompt, in the order of the inputs."""
        return (problem for problem in self.ordered() if problem.prompt and problem.status != "failed")

    def hard_prompts(self) -> list[Problem]:
        """Return the records that have a prompt, in the order of the inputs.

        Raises:
            UserError: There is no run or no prompt, or a prompt is not text.
        """
        self.saved.check()
        found = list(self.with_prompt())
        if not found:
            raise UserError(f"The run {self.path} has no prompt yet; resume its search or give another run.")
        if any(problem.token_ids is None for problem in found):
            raise UserError(
                f"The run {self.path} has embeddings instead of a prompt of tokens, as after textual inversion; give a "
                "run of another method."
            )
        return found

    def lines_of(self, rank: int) -> Path:
        """Return the file of a rank's result lines while a search runs."""
        return self.lines if rank == 0 else self.path / f"results-rank{rank}.jsonl"
