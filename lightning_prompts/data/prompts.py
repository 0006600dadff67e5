"""Prompts of a person, to go on from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_prompts.data.images import content_key
from lightning_prompts.data.lists import Row, read_lines, read_rows
from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.problems import Problem


class Prompts(ProblemData):
    """Prompts to find better or adversarial words, or embeddings, for; one problem each.

    Args:
        prompts: A prompt; a text file with one a line; a CSV or JSONL list with the column or key `prompt`; or a list of these.
        seed: Addresses every random draw.
    """

    given = "prompts that are not among --data.prompts"

    def __init__(self, prompts: str | list[str], seed: int = 0) -> None:
        super().__init__(seed)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts

    @property
    def steps(self) -> int:  # type: ignore[override]
        """As many as the method takes at most."""
        return int(self.method.steps)

    def step(self, number: int) -> Step:
        """A step, whose noise is the method's."""
        return Step(number, torch.empty(len(self.method.problems), 0, dtype=torch.long))

    def setup(self, stage: str) -> None:
        """Reads the prompts; what is done is skipped, and a broken line of a list becomes a failed record."""
        known, self.records, self.keys = self.folder.load(), {}, []
        lines = find_prompts(self.prompts)
        alone = sum(not line.error for line in lines) == 1
        for line, identity in itertools.product(lines, self.method.identities):
            problem = self._failed(line) if line.error else self._problem(line.text, identity, known, stage, alone)
            self.records.setdefault(problem.key, problem)
            self.keys.append(problem.key)
        for key, problem in known.items():  # of a line that has been corrected
            if stage == "fit" and key not in self.records and key == _unreadable(problem.target):
                self.folder.forget(key)

    def _problem(
        self, prompt: str, identity: dict[str, Any], known: dict[str, Problem], stage: str, alone: bool
    ) -> Problem:
        settings = {"prompt": prompt, "backbone": self.method.backbone.name, **identity}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        here = Problem(key, prompt, index=len(self.records), target_seed=identity.get("target_seed"))
        problem = known.get(key, here)
        problem.move_to(here)
        if problem.status == "failed":
            problem.status, problem.reason = "open", None
        try:
            if stage == "fit" and problem.status == "open":
                self.method.check(prompt)
        except UserError as error:
            if alone:
                raise
            problem.status, problem.reason = "failed", str(error)
        return problem

    def _failed(self, line: Line) -> Problem:
        return Problem(_unreadable(line.text), line.text, index=len(self.records), status="failed", reason=line.error)


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
    value = row.value.get("prompt") if isinstance(row.value, dict) else row.value
    if not row.error and isinstance(value, str):
        return Line(" ".join(value.split()))
    return Line(f"line {row.line} of {path}", row.error or f"Line {row.line} of '{path}' has no text under 'prompt'.")


def _unreadable(where: str) -> str:
    return content_key([], {"unreadable": [where]})
