"""Prompts of a person, to go on from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_prompts.data.lists import read_rows, read_text
from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.problems import Problem


class Prompts(ProblemData):
    """Prompts to find better or adversarial words, or embeddings, for; one problem each.

    Args:
        prompts: A prompt; a text file with one a line; a CSV or JSONL list with the column or key `prompt`; or a list of these.
        seed: Addresses every random draw.
        retry: Search those again that have failed, and no others.
    """

    given = ("prompts", "--data.prompts")

    def __init__(self, prompts: str | list[str], seed: int = 0, retry: bool = False) -> None:
        super().__init__(seed, retry)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self._read: list[str] = []

    @property
    def steps(self) -> int:  # type: ignore[override]
        """As many as the method takes at most."""
        return int(self.method.steps)

    def step(self) -> Step:
        """A step, whose noise is the method's."""
        return Step(list(self.method.done), torch.empty(len(self.method.problems), 0, dtype=torch.long))

    def setup(self, stage: str) -> None:
        """Reads the prompts."""
        if stage == "fit":
            self._read = read_prompts(self.prompts)
            self.begin()

    @property
    def total(self) -> int:
        """As many as there are prompts, each as often as the method makes a problem of it."""
        return len(self._read) * len(self.method.identities)

    def coming(self) -> Iterator[Problem]:
        """See `ProblemData.coming`."""
        for here in self._given():
            if self.owns(here.index) and (problem := self.known(here)):
                try:
                    self.method.check(problem.target)
                except UserError as error:
                    problem.status, problem.reason = "failed", str(error)
                yield problem

    def find(self, records: Sequence[Problem]) -> None:
        """See `ProblemData.find`."""
        given = {here.key: here for here in self._given()} if records else {}
        for problem in records:
            problem.index = -1
            if here := given.get(problem.key):
                problem.move_to(here)

    def _given(self) -> Iterator[Problem]:
        """Every problem as new."""
        pairs = itertools.product(self._read, self.method.identities)
        for index, (prompt, identity) in enumerate(pairs):
            settings = {"prompt": prompt, "backbone": self.method.backbone.name, **identity}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            yield Problem(key, prompt, index=index, target_seed=identity.get("target_seed"))


def read_prompts(sources: list[str]) -> list[str]:
    """The prompts that a person names, each once, in their order.

    Raises:
        UserError: There is none, one is empty, or a list is malformed.
    """
    prompts = [prompt for source in sources for prompt in _expand(source)]
    if not prompts:
        raise UserError("No prompts were given; give --data.prompts a text, or a .txt, .csv or .jsonl file of prompts.")
    return list(dict.fromkeys(prompts))


def _expand(source: str) -> list[str]:
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        if not source.strip():
            raise UserError("A prompt is empty; write what the picture is to show.")
        return [" ".join(source.split())]
    if not path.exists():
        raise UserError(f"There is no list {source!r}; check the path.")
    prompts = read_text(path).splitlines() if path.suffix.lower() == ".txt" else _listed(path)
    return [" ".join(prompt.split()) for prompt in prompts if prompt.strip()]


def _listed(path: Path) -> list[str]:
    prompts = []
    for line, row in read_rows(path, "prompt", "prompt"):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"Line {line} of '{path}' has no text under 'prompt'.")
        prompts.append(prompt)
    return prompts
