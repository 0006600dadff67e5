"""The base class of all data modules: the open problems, in order, and the steps of the batch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.distributed import all_gather_object, num_sample_ranks
from lightning_prompts.engine.loaders import BatchLoader, PredictSettings
from lightning_prompts.errors import UserError
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

T = TypeVar("T")


class Step(NamedTuple):
    """One step of the batch: the steps taken by each of P problems, and timesteps (P, N) of the denoising loss."""

    steps: Sequence[int]
    timesteps: Tensor

    def by_step(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """Group the problems `rows` (Q,) by the number of steps that they have taken."""
        steps = torch.tensor(self.steps)[rows]
        return [(int(step), rows[steps == step]) for step in steps.unique()]


class StepLoader:
    """Yield steps until no problem is left to search."""

    def __init__(self, data: ProblemData) -> None:
        self.data = data

    def __len__(self) -> int:
        return 10**9  # from a loader without a length, Lightning would fetch a step before the batch is refilled

    def __iter__(self) -> Iterator[Step]:
        while not self.data.method.batch.exhausted:
            yield self.data.step()


class ProblemData(pl.LightningDataModule, ABC):
    """Feed problems to a method.

    A problem is read when its search begins and released when it ends, so memory does not grow with the number of
    problems.

    Args:
        seed: Seed of every random draw.
        retry: Search only the failed problems again, and those that a checkpoint resumes.
    """

    given: ClassVar[tuple[str, str]]  # what the inputs are called, and the setting that names them

    def __init__(self, seed: int = 0, retry: bool = False) -> None:
        super().__init__()
        self.seed, self.retry = seed, retry
        self.predict_settings = PredictSettings()
        self._coming: Generator[Problem, None, None] = (problem for problem in list[Problem]())
        self.arrivals: Iterator[Problem] = self._coming
        self.seen: dict[str, str] = {}  # names of the problems so far, by key
        self.skipped = 0  # problems that an earlier run finished
        self._keys: dict[int, str] = {}  # by index among the inputs

    @property
    def method(self) -> PromptMethod:
        """The method that the Trainer runs."""
        return cast("PromptMethod", self.trainer.lightning_module)  # type: ignore[union-attr]

    @property
    def folder(self) -> RunFolder:
        """Return the folder of the run."""
        trainer: pl.Trainer = self.trainer  # type: ignore[assignment]
        writes = num_sample_ranks(trainer) == 1 or trainer.is_global_zero
        return RunFolder(trainer.default_root_dir, writes, self.method.result_class)

    @property
    def model_identity(self) -> dict[str, Any]:
        """The settings of the model that are part of a problem's key: its name and, where set, `clip_skip`."""
        backbone = self.method.backbone
        return {"backbone": backbone.name, **({"clip_skip": backbone.clip_skip} if backbone.clip_skip else {})}

    @property
    def keys(self) -> list[str]:
        """The key of each input, in order, once all have been read; equal inputs share a key."""
        return [self._keys[place] for place in range(self.total)]

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of inputs on all ranks."""

    @abstractmethod
    def coming(self) -> Generator[Problem, None, None]:
        """Yield this rank's unfinished problems in order, and read each when it is requested."""

    @abstractmethod
    def find(self, records: Sequence[Problem]) -> None:
        """Set `index` of records to their place among the current inputs; -1 if they are not among them."""

    def unchanged(self, problems: Sequence[Problem], warn: bool = True) -> list[Problem]:
        """Return the problems whose inputs are still those that were searched; by default warn about the others."""
        return list(problems)

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""

    @abstractmethod
    def step(self) -> Step:
        """Return the next step of the batch."""

    @property
    def part(self) -> tuple[int, int]:
        """Return this rank's part of the problems and the number of parts, which is 1 if ranks divide the samples."""
        if num_sample_ranks(self.trainer) > 1:  # type: ignore[arg-type]
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]

    def owns(self, place: int) -> bool:
        """Return whether the input with an index is this rank's: with n ranks, every n-th is."""
        number, parts = self.part
        return place % parts == number

    def still_open(self, problem: Problem) -> bool:
        """Return whether a problem of a checkpoint is this rank's and not finished since."""
        record = self.folder.read(problem.key)
        return self.owns(problem.index) and (record is None or record.status == "open")

    def same(self, find: Callable[[], list[T]]) -> list[T]:
        """Find inputs, and check that all ranks find the same.

        Raises:
            UserError: This rank or another one found none, or they differ.
        """
        found, error = list[T](), None
        try:
            found = find()
        except UserError as mistake:
            error = mistake
        digest = hashlib.sha256(repr(found).encode(errors="backslashreplace")).hexdigest()
        everyone = all_gather_object((len(found), digest, error and str(error)))
        if error:
            raise error
        for rank, (count, other, wrong) in enumerate(everyone):
            if wrong:
                raise UserError(f"Rank {rank} found no {self.given[0]}: {wrong}")
            if other != everyone[0][1]:
                raise UserError(
                    f"The ranks see different {self.given[0]}: rank 0 has {everyone[0][0]} and rank {rank} has {count}"
                    f"{', but not the same' * (count == everyone[0][0])}; let all machines read the same files in "
                    f"{self.given[1]}."
                )
        return found

    def begin(self) -> None:
        """Start reading, up to the first problem that can be searched.

        Raises:
            UserError: There is none, and an earlier run finished none either.
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
        """Stop reading ahead; its worker processes and this one would otherwise wait for each other at exit."""
        self._coming.close()

    def teardown(self, stage: str) -> None:
        """Stop reading ahead at the end."""
        self.stop()

    def on_exception(self, exception: BaseException) -> None:
        """Stop reading ahead after an error."""
        self.stop()

    def resume(self, searched: dict[str, str]) -> None:
        """Leave out the problems that a checkpoint resumes, by key; the first may have been read already."""
        self.seen |= searched
        coming = self.arrivals
        self.arrivals = (problem for problem in coming if problem.key not in searched)

    def wanted(self, here: Problem, failed: bool = False) -> bool:
        """Return whether to search a problem from the beginning.

        A record on disk is from an earlier run, or from another rank if an image is given twice. An open one that no
        checkpoint resumes is searched again; its record stays until the new search improves on its first prompt.

        Args:
            here: The problem, without results.
            failed: Whether an earlier run failed to read it.
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
        """Return the steps of the batch."""
        return StepLoader(self)

    def test_dataloader(self) -> BatchLoader[Problem]:
        """Return this rank's share of the run's records that have a prompt, up to `batch_size` at a time."""
        return BatchLoader(self._own_keys(), self.method.batch_size, self.folder.read)

    def val_dataloader(self) -> BatchLoader[Problem] | list[BatchLoader[Problem]]:
        """Return the records as `test` does; nothing in `fit`, where Lightning would validate after an interruption."""
        return [] if self.trainer.state.fn == "fit" else self.test_dataloader()  # type: ignore[union-attr]

    def predict_dataloader(self) -> BatchLoader[Problem | str]:
        """Return this rank's share of the prompts of `predict_settings`, or of the run's records, one at a time.

        Raises:
            UserError: The run has no prompts.
        """
        prompts = self.predict_settings.prompts
        if prompts is None and not any(self.folder.with_prompt()):
            raise UserError("This run has no prompts yet; run `fit` first, or give --prompts.")
        if prompts is None:
            return BatchLoader(self._own_keys(), 1, self.folder.read)
        own = [prompt for place, prompt in enumerate(dict.fromkeys(prompts)) if self.owns(place)]
        return BatchLoader(own, 1, str)

    def _own_keys(self) -> list[str]:
        """Return the keys of this rank's share of the run's records that have a prompt: with n ranks, every n-th."""
        return [record.key for place, record in enumerate(self.folder.with_prompt()) if self.owns(place)]

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        """Move the timesteps of a step to the device, and keep records, of which Lightning would copy each field."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if isinstance(batch, Step) else batch


def _chained(first: list[Problem], rest: Iterator[Problem]) -> Iterator[Problem]:
    """Chain as itertools does, but release each item, which itertools.chain keeps."""
    while first:
        yield first.pop(0)
    yield from rest
