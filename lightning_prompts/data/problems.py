"""What all data modules share: the records of the problems, and the steps of a wave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import Tensor

from lightning_prompts.problems import Problem, RunFolder


class Step(NamedTuple):
    """The addresses of one step: its number and, where noise is drawn, the timesteps (P, N) of the wave's problems."""

    step: int
    timesteps: Tensor


class StepLoader:
    """Gives the steps of a wave from where it is; a resumed run puts it where the wave was."""

    def __init__(self, data: ProblemData) -> None:
        self.data, self.step = data, 0

    def __len__(self) -> int:
        return self.data.steps

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.data.steps:
            self.step += 1
            yield self.data.step(self.step - 1)
        self.step = 0


class ProblemData(pl.LightningDataModule, ABC):
    """Problems to search prompts for.

    Args:
        seed: Addresses every random draw.
    """

    steps: int
    given: str  # "... that are not among" what a person has named
    loader: StepLoader

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.records: dict[str, Problem] = {}
        self.keys: list[str] = []  # of what was given, in its order; the same twice has one record

    @property
    def method(self) -> Any:
        """The method in training."""
        return self.trainer.lightning_module  # type: ignore[union-attr]

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.trainer.default_root_dir)  # type: ignore[union-attr]

    @abstractmethod
    def step(self, number: int) -> Step:
        """A step of the wave."""

    def save(self) -> None:
        """Writes this rank's records when a search begins or goes on."""
        for problem in self.own():
            self.folder.save(problem)

    def own(self) -> list[Problem]:
        """The problems of this rank: every n-th, with n ranks."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        return list(self.records.values())[rank::ranks]

    def train_dataloader(self) -> StepLoader:
        """The steps of a wave."""
        self.loader = StepLoader(self)
        return self.loader

    def test_dataloader(self) -> list[int]:
        """One item: all problems are looked at together."""
        return [0]

    predict_dataloader = test_dataloader

    def val_dataloader(self) -> list[int]:
        """As in `test`; but none in `fit`, where Lightning would validate in the middle of a wave when it is told to stop."""
        return [] if self.trainer.state.fn == "fit" else [0]  # type: ignore[union-attr]
