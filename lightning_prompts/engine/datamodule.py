"""What all data modules share: which problems are open, in what order they come, and the steps of the wave."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

import pytorch_lightning as pl
from torch import Tensor

from lightning_prompts.distributed import of_all_ranks, sharing
from lightning_prompts.errors import UserError
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

T = TypeVar("T")


class Step(NamedTuple):
    """The addresses of one step: how many steps each of P problems has taken and, where noise is drawn, timesteps (P, N)."""

    steps: Sequence[int]
    timesteps: Tensor


class StepLoader:
    """Gives steps as long as the wave has problems."""

    def __init__(self, data: ProblemData) -> None:
        self.data = data

    def __len__(self) -> int:
        return 10**9  # of a loader without a length Lightning fetches a step ahead, before the wave has changed

    def __iter__(self) -> Iterator[Step]:
        while not self.data.method.batch.exhausted:
            yield self.data.step()


class ProblemData(pl.LightningDataModule, ABC):
    """Problems to search prompts for.

    A problem is read when its search begins, and forgotten when it has ended, so memory does not grow with their number.

    Args:
        seed: Addresses every random draw.
        retry: Search those again that have failed, and of the others only what a checkpoint goes on with.
    """

    steps: int
    given: ClassVar[tuple[str, str]]  # what the problems are made of, and the setting that names it

    def __init__(self, seed: int = 0, retry: bool = False) -> None:
        super().__init__()
        self.seed, self.retry = seed, retry
        self._coming: Generator[Problem, None, None] = (problem for problem in list[Problem]())
        self.arrivals: Iterator[Problem] = self._coming
        self.seen: dict[str, str] = {}  # what to call the problem of each key that has come
        self.skipped = 0  # problems that were finished before
        self._keys: dict[int, str] = {}  # by place among the inputs

    @property
    def method(self) -> PromptMethod:
        """The method in training."""
        return cast("PromptMethod", self.trainer.lightning_module)  # type: ignore[union-attr]

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        trainer: pl.Trainer = self.trainer  # type: ignore[assignment]
        writes = sharing(trainer) == 1 or trainer.is_global_zero
        return RunFolder(trainer.default_root_dir, writes, self.method.result_class)

    @property
    def model_identity(self) -> dict[str, Any]:
        """What of the model makes two problems of one input: its name and, where layers are skipped, how many."""
        backbone = self.method.backbone
        return {"backbone": backbone.name, **({"clip_skip": backbone.clip_skip} if backbone.clip_skip else {})}

    @property
    def keys(self) -> list[str]:
        """Of what was given, in its order, once all of it has come; the same twice has one key."""
        return [self._keys[place] for place in range(self.total)]

    @property
    @abstractmethod
    def total(self) -> int:
        """How many problems were given, to all ranks."""

    @abstractmethod
    def coming(self) -> Generator[Problem, None, None]:
        """This rank's problems in their order, each read when it is asked for; open or failed, but not finished before."""

    @abstractmethod
    def find(self, records: Sequence[Problem]) -> None:
        """Gives records of an earlier process the place that they have among the inputs now, `index`; -1 without one."""

    def unchanged(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems whose inputs are still those that were searched; warn about the others."""
        return list(problems)

    def evict(self, problem: Problem) -> None:
        """Forgets what is remembered of a problem that has left the wave."""

    @abstractmethod
    def step(self) -> Step:
        """The next step of the wave."""

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the problems is this rank's, and of how many; ranks that share the work on each have all."""
        if sharing(self.trainer) > 1:  # type: ignore[arg-type]
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]

    def owns(self, place: int) -> bool:
        """Whether the problem at a place among the inputs is this rank's: every n-th is, with n ranks."""
        number, parts = self.part
        return place % parts == number

    def still_open(self, problem: Problem) -> bool:
        """Whether a problem of a checkpoint is this rank's and has not been finished since."""
        record = self.folder.read(problem.key)
        return self.owns(problem.index) and (record is None or record.status == "open")

    def same(self, find: Callable[[], list[T]]) -> list[T]:
        """What is found, which has to be the same for all ranks.

        Raises:
            UserError: Nothing was found, here or by another rank, or not the same.
        """
        found, error = list[T](), None
        try:
            found = find()
        except UserError as mistake:
            error = mistake
        digest = hashlib.sha256(repr(found).encode(errors="backslashreplace")).hexdigest()
        everyone = of_all_ranks((len(found), digest, error and str(error)))
        if error:
            raise error
        for rank, (count, other, wrong) in enumerate(everyone):
            if wrong:
                raise UserError(f"Rank {rank} has found no {self.given[0]}: {wrong}")
            if other != everyone[0][1]:
                raise UserError(
                    f"The ranks see different {self.given[0]}: rank 0 has {everyone[0][0]} and rank {rank} has {count}"
                    f"{', but not the same' * (count == everyone[0][0])}; let all machines read the same files in {self.given[1]}."
                )
        return found

    def begin(self) -> None:
        """Begins to read, up to the first problem that can be searched.

        Raises:
            UserError: There is none, and never was.
        """
        self.seen, self.skipped, self._keys = {}, 0, {}
        self._coming, come = self.coming(), list[Problem]()
        for problem in self._coming:
            come.append(problem)
            if problem.status != "failed":
                break
        only_failed = bool(come) and come[-1].status == "failed" and not self.skipped
        if only_failed and self.part[1] == 1:
            reason = str(come[0].reason)
            raise UserError(
                reason if self.total == 1 else f"None of the {self.total} {self.given[0]} can be searched: {reason}"
            )
        self.arrivals = _chained(come, self._coming)

    def stop(self) -> None:
        """Ends what reads ahead; its processes would otherwise wait for this one, which waits for them at its end."""
        self._coming.close()

    def teardown(self, stage: str) -> None:
        """Ends what reads ahead."""
        self.stop()

    def on_exception(self, exception: BaseException) -> None:
        """Ends what reads ahead."""
        self.stop()

    def go_on(self, searched: dict[str, str]) -> None:
        """Has what a checkpoint goes on with, names by key, not come another time; the first may have been read already."""
        self.seen |= searched
        coming = self.arrivals
        self.arrivals = (problem for problem in coming if problem.key not in searched)

    def wanted(self, here: Problem, failed: bool = False) -> bool:
        """Whether a problem that comes now is to be searched, from its beginning.

        What is on disk is of an earlier process, or of another rank where the same picture is given twice. Of one that is open and
        that no checkpoint goes on with, the record stays until a better prompt is found than the first.

        Args:
            here: The problem, as new.
            failed: Whether an earlier process has not been able to read it.
        """
        self._keys[here.index] = here.key
        if here.key in self.seen:
            return False
        self.seen[here.key] = here.target
        record = self.folder.read(here.key)
        if record is None:
            return failed or not self.retry
        if record.status == ("failed" if self.retry else "open"):
            return True
        self.skipped += 1
        if record.move_to(here):
            self.folder.save(record)
        return False

    def train_dataloader(self) -> StepLoader:
        """The steps of the wave."""
        return StepLoader(self)

    def test_dataloader(self) -> list[int]:
        """One item: all problems are looked at together."""
        return [0]

    predict_dataloader = test_dataloader

    def val_dataloader(self) -> list[int]:
        """As in `test`; but none in `fit`, where Lightning would validate in the middle of a wave when it is told to stop."""
        return [] if self.trainer.state.fn == "fit" else [0]  # type: ignore[union-attr]


def _chained(first: list[Problem], rest: Iterator[Problem]) -> Iterator[Problem]:
    """As itertools.chain, which would hold on to the first ones."""
    while first:
        yield first.pop(0)
    yield from rest
