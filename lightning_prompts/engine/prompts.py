"""The data module of methods that change a user's prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, cast

import torch

from lightning_prompts.data.prompts import Line, find_prompts
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem, unreadable_key

if TYPE_CHECKING:
    from lightning_prompts.methods import DPODiff
    from lightning_prompts.methods.steering.base import Steering


class Prompts(ProblemData):
    """Prompts to find better or adversarial words, or embeddings, for; one problem each.

    Args:
        prompts: A prompt; a text file with one prompt per line; a CSV or JSONL list with the column or key `prompt`; or
            a list of these.
        seed: Seed of every random draw.
        retry: Search only the failed problems again, and those that a checkpoint resumes.
    """

    given = ("prompts", "--data.prompts")

    def __init__(self, prompts: str | list[str], seed: int = 0, retry: bool = False) -> None:
        super().__init__(seed, retry)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self._lines: list[Line] = []

    @property
    def method(self) -> DPODiff | Steering:
        """The method that changes the prompts."""
        return cast("DPODiff | Steering", super().method)

    def step(self) -> Step:
        """Return the next step of the batch; without timesteps, since the method has its own noise."""
        return Step(self.method.batch.steps, torch.empty(len(self.method.batch), 0, dtype=torch.long))

    def setup(self, stage: str) -> None:
        """Read the prompts, and delete the records of broken lines that the user has corrected."""
        if stage == "fit":
            self._lines = self.same(lambda: find_prompts(self.prompts))
            broken = {unreadable_key([line.text]) for line in self._lines if line.error}
            for record in self.folder.records():
                if record.key == unreadable_key([record.target]) and record.key not in broken:
                    self.folder.delete(record.key)
            self.begin()

    @property
    def total(self) -> int:
        """The number of problems: of each prompt, one per entry of the method's `identities`."""
        return len(self._lines) * len(self.method.identities)

    def coming(self) -> Generator[Problem, None, None]:
        """Yield this rank's prompts; see `ProblemData.coming`."""
        for problem, error in self._problems():
            if self.owns(problem.index) and self.wanted(problem):
                try:
                    if error:
                        raise UserError(error)
                    self.method.check(problem.target)
                except UserError as mistake:
                    problem.status, problem.reason = "failed", str(mistake)
                yield problem

    def find(self, records: Sequence[Problem]) -> None:
        """Find the prompts of records; see `ProblemData.find`."""
        current = {problem.key: problem for problem, _ in self._problems()} if records else {}
        for record in records:
            record.index = -1
            if problem := current.get(record.key):
                record.move_to(problem)

    def _problems(self) -> Iterator[tuple[Problem, str | None]]:
        """Yield every problem, without results, and the error of its line."""
        result_class = self.method.result_class
        recorded = {field.name for field in fields(result_class)}  # such as the target seed
        pairs = itertools.product(self._lines, self.method.identities)
        for index, ((prompt, error), identity) in enumerate(pairs):
            settings = {"prompt": prompt, **self.model_identity, **identity}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            key = unreadable_key([prompt]) if error else key
            values = {name: value for name, value in identity.items() if name in recorded}
            yield Problem(key, prompt, index=index, result=result_class(**values)), error
