"""The record of each problem and the folder that holds them: the only code that writes results.

A run is a set of independent problems. Each has one small file that only its owner writes, and always in one piece, so a run that
ends in any way leaves the best prompts found so far. `result.json` and `prompt.txt` are merged from these files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal, TypedDict, get_args, get_type_hints

import yaml

from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

# "not improved" is finished, too, but the prompt is no better than the one that the search started from.
Status = Literal["open", "done", "not improved", "failed"]

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
_MEASURED_ON_REQUEST = (  # in result.json only where there is a number
    *("clip_text_similarity", "diversity", "lpips"),
    *("word_recall", "dictionary_words", "special_characters", "perplexity"),
)


class Better(TypedDict):
    """A prompt that was the best when it was found."""

    unet_samples: int
    validation_loss: float
    prompt: str


class Candidate(TypedDict):
    """A prompt that was drawn and judged."""

    prompt: str
    negative_prompt: str
    choice: list[int]  # of each slot the word's number
    losses: list[float]  # what is minimised, by seed: of an attack the negative distances
    budget: float  # generations spent by then


class Move(TypedDict):
    """Where a person has gone: on the arc to a text."""

    text: str
    candidate: int  # its number in its round, from 0
    strength: float  # how far it went, 1 is all the way
    others: int  # rounds without a move before it


@dataclass
class Problem:
    """One independent problem and the best that was found for it so far. Losses are better lower, similarities higher."""

    key: str  # 16 hexadecimal digits, the hash of the content and of the settings that matter; names the record's file
    target: str  # what to show a person: a file name, a folder or a prompt
    paths: list[str] = field(default_factory=list)
    caption: str | None = None
    index: int = 0  # place among the inputs, which is the order of results
    status: Status = "open"
    reason: str | None = None  # one sentence, why it is "not improved" or "failed"
    prompt: str | None = None
    token_ids: list[int] | None = None
    embedding: list[list[float]] | None = None  # (M, D) of a prompt that is no text: what its pseudo-word stands for
    validation_loss: float | None = None
    initial_validation_loss: float | None = None  # of the prompt that the search started from
    clip_similarity: float | None = None
    heldout_clip_similarity: float | None = None  # by a CLIP that took no part in the search
    clip_text_similarity: float | None = None  # of the prompt and the target's pictures
    diversity: float | None = None  # of the pictures that the prompt draws
    lpips: float | None = None
    word_recall: float | None = None  # of the target's caption
    dictionary_words: float | None = None  # shares of the prompt's words and characters
    special_characters: float | None = None
    perplexity: float | None = None
    negative_prompt: str | None = None  # found by methods that search one
    words: list[list[str]] | None = None  # of each slot its name and what was chosen
    loss_before: list[float] | None = None  # of the person's prompt, by seed
    loss_after: list[float] | None = None
    fresh_loss_before: list[float] | None = None  # on seeds that the search has not seen
    fresh_loss_after: list[float] | None = None
    heldout_before: list[float] | None = (
        None  # similarity of fresh pictures and the person's prompt, by the held-out CLIP
    )
    heldout_after: list[float] | None = None
    target_seed: int | None = None  # whose picture is to come from every seed
    metric_before: list[float] | None = None  # of the person's prompt, by seed
    metric_after: list[float] | None = None
    fresh_metric_before: list[float] | None = None  # on seeds that the search has not seen
    fresh_metric_after: list[float] | None = None
    values_before: dict[str, list[float]] | None = None  # the same of each objective, watched ones too, by name
    values_after: dict[str, list[float]] | None = None
    fresh_values_before: dict[str, list[float]] | None = None
    fresh_values_after: dict[str, list[float]] | None = None
    moves: list[Move] = field(default_factory=list)  # of a person who chooses, oldest first
    others: int = 0  # rounds since then in which none of the candidates was liked
    budget: float | None = None  # generations that the search has spent
    similarity: float | None = None  # of the prompt to the person's, by the sentence encoder
    candidates: list[Candidate] = field(default_factory=list)  # evaluated, in their order
    unet_samples: int = 0  # forward and backward counted each
    seconds: float = 0.0
    history: list[Better] = field(default_factory=list)  # of the best prompt, oldest first
    stamps: list[str] = field(default_factory=list)  # of each file, by which it is known again without being read

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"The status {self.status!r} is unknown; use one of {get_args(Status)}.")

    @property
    def shown(self) -> str:
        """The prompt for a person's eyes, with the negative one if there is any."""
        return (self.prompt or "") + (f" | without {self.negative_prompt}" if self.negative_prompt else "")

    def keep(
        self, prompt: str, loss: float, token_ids: list[int] | None = None, embedding: list[list[float]] | None = None
    ) -> None:
        """Takes a better prompt."""
        self.prompt, self.validation_loss, self.token_ids, self.embedding = prompt, loss, token_ids, embedding
        self.history.append({"unet_samples": self.unet_samples, "validation_loss": loss, "prompt": prompt})

    def move_to(self, here: Problem) -> bool:
        """Takes over what the inputs say now: the pictures may have moved or been renamed, and others come before them.

        Returns:
            Whether anything is new.
        """
        names = ("target", "paths", "stamps", "caption", "index")
        new = [name for name in names if getattr(self, name) != getattr(here, name)]
        for name in new:
            setattr(self, name, getattr(here, name))
        return bool(new)

    def forget_prompt(self) -> None:
        """Takes away the best prompt, so that the next one is kept whatever its loss."""
        self.prompt = self.validation_loss = self.token_ids = self.embedding = None
        self.history.clear()

    def forget_scores(self) -> None:
        """Takes away what was measured when the search had ended, perhaps of another prompt or by another scorer."""
        for name in ("clip_similarity", "heldout_clip_similarity", *_MEASURED_ON_REQUEST):
            setattr(self, name, None)

    def finish(self) -> None:
        """Sets the final status from the two losses; without any, a problem is done, and one that failed stays so."""
        if self.status == "failed":
            return
        loss, initial = _finite(self.validation_loss), _finite(self.initial_validation_loss)
        self.status, self.reason = "done", None
        if loss is None and self.validation_loss is not None:
            self.status, self.reason = "failed", "The validation loss of the prompt is not a finite number."
        elif loss is None and initial is not None:
            self.status = "failed"
            self.reason = "No prompt was found that is read again as the same tokens and holds no blocked word."
        elif loss is None and self.initial_validation_loss is not None:
            self.status = "failed"
            self.reason = "The validation loss is not a finite number from the start; try --model.dtype float32."
        elif loss is not None and initial is not None and loss >= initial:
            self.status = "not improved"
            self.reason = (
                f"The best prompt's validation loss {loss:.6g} is no lower than the initial one's {initial:.6g}."
            )


class RunFolder:
    """The folder of a run, usually `runs/<name>/`, and where things are in it; it need not exist.

    Args:
        path: Where it is.
        writes: Whether this process writes to it; of ranks that search the same problems only the first does.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
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
            UserError: The folder holds a run that is not to be resumed, is a file or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"The run folder {self.path} is a file; give another --run.")
        begun = any(self.problems.glob("*.json")) or self.generations.exists()
        foreign = self.config.exists() and not self.problems.is_dir()
        # A search that was stopped before its first record leaves a config and no records.
        if not resume and (begun or foreign):
            hint = "give --ckpt_path last to go on with it or another --run" if search else "give another --run"
            raise UserError(f"The folder {self.path} already holds a run; {hint}.")
        try:
            for left in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):  # by a process that was killed
                left.unlink()
            for folder in (self.path, self.problems, self.checkpoints) if search else (self.path,):
                atomic_write(folder / ".write-test", b"test")
                (folder / ".write-test").unlink()
        except OSError as error:
            hint = "give another --run, or free space or permit writing there"
            raise UserError(
                f"The run folder {self.path} cannot be written ({error.strerror or error}); {hint}."
            ) from error

    def discard(self) -> None:
        """Deletes the folder if no search has begun in it."""
        if not any(self.problems.glob("*.json")):
            shutil.rmtree(self.path, ignore_errors=True)

    def save(self, problem: Problem) -> None:
        """Writes the record of a problem; after an OSError, such as a full disk, its previous state is still there."""
        self.write(self.problems / f"{problem.key}.json", to_json(asdict(problem)))

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
            log.warning("The record of %s could not be written (%s); the run goes on.", problem.target, error)

    def embeds_of(self, key: str) -> Path:
        """The file of the best encoded prompt of a problem."""
        return self.problems / f"{key}.safetensors"

    def save_embeds(self, key: str, content: bytes) -> None:
        """Writes the best encoded prompt of a problem, or warns, as the search is worth more than this write."""
        try:
            self.write(self.embeds_of(key), content)
        except OSError as error:
            log.warning("The embeddings of %s could not be written (%s); the run goes on.", key, error)

    def has(self, key: str) -> bool:
        """Whether there is a record of a problem."""
        return (self.problems / f"{key}.json").exists()

    def read(self, key: str) -> Problem | None:
        """The record of a problem, if there is one."""
        return _read_record(self.problems / f"{key}.json") if self.has(key) else None

    def records(self) -> Iterator[Problem]:
        """Reads one record after the other; what is no record is left out with a warning."""
        for file in self.problems.glob("*.json"):
            if problem := _read_record(file):
                yield problem

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

    def tell(self, problem: Problem, rank: int = 0) -> None:
        """Adds a line about a problem that is finished; when all are, `write_result` writes them in their order."""
        if not self.writes:
            return
        try:
            with self.lines_of(rank).open("ab") as file:
                file.write(_line(problem))
        except OSError as error:
            log.warning("The line of %s could not be written (%s); the run goes on.", problem.target, error)

    def lines_of(self, rank: int) -> Path:
        """Where a rank adds the lines of its problems."""
        return self.lines if rank == 0 else self.path / f"results-rank{rank}.jsonl"

    def write_lines(self) -> None:
        """Writes the lines of all problems that are finished; those of earlier ranks are among them."""
        with atomic_writer(self.lines) as file:
            for problem in self.ordered():
                if problem.status != "open":
                    file.write(_line(problem))

    def write_result(
        self, method: str, backbone: str, seed: int, settings: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """Merges all records into `result.json`, `results.jsonl`, `results.parquet`, `failed.jsonl` and `prompt.txt`.

        The latter has one line a problem, empty without a prompt; so has `negative_prompt.txt`, if the method searches negative
        prompts. No more than a thousand records are held at a time.
        """
        head = {
            "schema_version": SCHEMA_VERSION,
            "method": method,
            "backbone": backbone,
            "seed": seed,
            "settings": settings,
            "versions": versions,
        }
        prompts, negatives, failed = list[str | None](), list[str | None](), list[bytes]()
        with atomic_writer(self.result) as file:
            # str: a path or a dtype among the settings must not cost the results at the end of a run.
            file.write(to_json(head, default=str)[: -len("\n}\n")] + b',\n  "problems": [')
            for number, problem in enumerate(self.ordered()):
                entry = to_json(_result_entry(asdict(problem))).rstrip().replace(b"\n", b"\n    ")
                file.write((b",\n    " if number else b"\n    ") + entry)
                prompts.append(problem.prompt)
                negatives.append(problem.negative_prompt)
                if problem.status == "failed":
                    failed.append(_failed_line(problem))
            file.write(b"\n  ]\n}\n" if prompts else b"]\n}\n")
        self.write_lines()
        write_table(self.table, self.ordered())
        atomic_write(self.prompt, _lines(prompts))
        if any(negative is not None for negative in negatives):
            atomic_write(self.negative_prompt, _lines(negatives))
        if failed:
            atomic_write(self.failed, b"".join(failed))
        else:
            self.failed.unlink(missing_ok=True)


def _lines(texts: Iterable[str | None]) -> bytes:
    return "".join(" ".join((text or "").splitlines()) + "\n" for text in texts).encode(errors="backslashreplace")


def _line(problem: Problem) -> bytes:
    """The line of a problem in `results.jsonl`."""
    return _compact(_result_entry(asdict(problem)))


def _failed_line(problem: Problem) -> bytes:
    """A line that names what has failed, as a list of inputs does."""
    files = [os.path.abspath(path) for path in problem.paths]
    named = {"file": files[0] if len(files) == 1 else files} if files else {"prompt": problem.target}
    caption = {"caption": problem.caption} if problem.caption else {}
    return _compact({**named, **caption, "reason": problem.reason})


def _compact(value: Any) -> bytes:
    return (json.dumps(_finite(value), ensure_ascii=False) + "\n").encode(errors="backslashreplace")


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
    return [_clean(item) for item in value] if isinstance(value, list) else _finite(value)


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Gives a file to write, which comes in its place in one piece: whoever reads it finds the old content or the new.

    Missing folders are created.

    Raises:
        OSError: The file could not be written, and an old one is untouched, or has lost what was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only within a file system; its own name for each writer.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is gone after the replacement, and the first error is the one to hear about
            temporary.unlink()
    if (size := path.stat().st_size) != written:  # network file systems have been seen to lose data silently
        raise OSError(f"{path} has {size} bytes after {written} were written")


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file in one piece, see `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a result, without importing them."""
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # such as this project itself, run from its source folder
        return "not installed"


def _read_record(file: Path) -> Problem | None:
    """Returns the record, or None with a warning if the file, written by someone else, is none."""
    try:
        problem = Problem(**json.loads(file.read_bytes()))
        if problem.key != file.stem:
            raise ValueError(f"it has the key {problem.key}")
    except (ValueError, TypeError) as error:
        warnings.warn(f"{file} is not the record of a problem and is ignored: {error}", stacklevel=3)
        return None
    return problem


def _result_entry(record: dict[str, Any]) -> dict[str, Any]:
    measured = {name: record[name] for name in _MEASURED_ON_REQUEST if record[name] is not None}
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


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The content of a JSON file; numbers that JSON does not have become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=default)
    # File names that are not UTF-8 hold lone surrogates, whose backslash form is what JSON calls for.
    return (text + "\n").encode(errors="backslashreplace")


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
