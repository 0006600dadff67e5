"""Prompts of a person, to go on from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from lightning_prompts.data.lists import Row, read_lines, read_rows
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem, unreadable_key

if TYPE_CHECKING:
    from lightning_prompts.methods import DPODiff
    from lightning_prompts.methods.steering.base import Steering


class Prompts(ProblemData):
    """Prompts to find better or adversarial words, or embeddings, for; one problem each.

    Args:
        prompts: A prompt; a text file with one a line; a CSV or JSONL list with the column or key `prompt`; or a list of these.
        seed: Addresses every random draw.
        retry: Search those again that have failed, and of the others only what a checkpoint goes on with.
    """

    given = ("prompts", "--data.prompts")

    def __init__(self, prompts: str | list[str], seed: int = 0, retry: bool = False) -> None:
        super().__init__(seed, retry)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self._read: list[Line] = []

    @property
    def method(self) -> DPODiff | Steering:
        """The method in training."""
        return cast("DPODiff | Steering", super().method)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """As many as the method takes at most."""
        return int(self.method.steps)

    def step(self) -> Step:
        """A step, whose noise is the method's."""
        return Step(self.method.batch.steps, torch.empty(len(self.method.batch), 0, dtype=torch.long))

    def setup(self, stage: str) -> None:
        """Reads the prompts, and forgets what was wrong with lines that have been corrected."""
        if stage == "fit":
            self._read = self.same(lambda: find_prompts(self.prompts))
            given = {unreadable_key([line.text]) for line in self._read if line.error}
            for record in self.folder.records():
                if record.key == unreadable_key([record.target]) and record.key not in given:
                    self.folder.forget(record.key)
            self.begin()

    @property
    def total(self) -> int:
        """As many as there are prompts, each as often as the method makes a problem of it."""
        return len(self._read) * len(self.method.identities)

    def coming(self) -> Generator[Problem, None, None]:
        """See `ProblemData.coming`."""
        for problem, wrong in self._given():
            if self.owns(problem.index) and self.wanted(problem):
                try:
                    if wrong:
                        raise UserError(wrong)
                    self.method.check(problem.target)
                except UserError as error:
                    problem.status, problem.reason = "failed", str(error)
                yield problem

    def find(self, records: Sequence[Problem]) -> None:
        """See `ProblemData.find`."""
        given = {here.key: here for here, _ in self._given()} if records else {}
        for problem in records:
            problem.index = -1
            if here := given.get(problem.key):
                problem.move_to(here)

    def _given(self) -> Iterator[tuple[Problem, str | None]]:
        """Every problem as new, and what is wrong with it."""
        result_class = self.method.result_class
        named = {field.name for field in fields(result_class)}  # such as the target seed
        pairs = itertools.product(self._read, self.method.identities)
        for index, ((prompt, error), identity) in enumerate(pairs):
            settings = {"prompt": prompt, **self.model_identity, **identity}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            key = unreadable_key([prompt]) if error else key
            own = {name: value for name, value in identity.items() if name in named}
            yield Problem(key, prompt, index=index, result=result_class(**own)), error


class Line(NamedTuple):
    """A prompt, or why a line of a list has none, in one sentence.

    Attributes:
        text: The prompt, or where the broken line is.
        error: What is wrong with the line.
    """

    text: str
    error: str | None = None


def find_prompts(sources: list[str]) -> list[Line]:
    """The prompts that a person names, each once, in their order, and the broken lines of lists.

    Raises:
        UserError: There is no prompt, one is empty, or a list cannot be read or has only broken lines.
    """
    lines = [line for source in sources for line in _expand(source)]
    if not lines:
        raise UserError("No prompts were given; give --data.prompts a text, or a .txt, .csv or .jsonl file of prompts.")
    return list(dict.fromkeys(lines))


def read_prompts(sources: list[str]) -> list[str]:
    """The prompts that a person names, each once, in their order.

    Raises:
        UserError: There is none, one is empty, or a list has a broken line.
    """
    lines = find_prompts(sources)
    for line in lines:
        if line.error:
            raise UserError(line.error)
    return [line.text for line in lines]


def _expand(source: str) -> list[Line]:
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        if not source.strip():
            raise UserError("A prompt is empty; write what the picture is to show.")
        return [Line(" ".join(source.split()))]
    if not path.exists():
        raise UserError(f"There is no list {source!r}; check the path.")
    lines = [line for line in (_listed(path, row) for row in _rows(path)) if line.text]
    if lines and all(line.error for line in lines):
        raise UserError(str(lines[0].error))
    return lines


def _rows(path: Path) -> Iterator[Row]:
    return read_lines(path) if path.suffix.lower() == ".txt" else read_rows(path, "prompt", "prompt")


def _listed(path: Path, row: Row) -> Line:
    if isinstance(row.value, dict) and "prompt" not in row.value and isinstance(row.value.get("line"), str):
        return Line(row.value["line"], str(row.value.get("reason")))  # of a list of what has failed
    value = row.value.get("prompt") if isinstance(row.value, dict) else row.value
    if not row.error and isinstance(value, str):
        return Line(" ".join(value.split()))
    return Line(f"line {row.line} of {path}", row.error or f"Line {row.line} of '{path}' has no text under 'prompt'.")
