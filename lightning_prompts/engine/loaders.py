"""What `validate`, `test` and `predict` take from a run: batches of its records, and the settings of new images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lightning_prompts.sampling.seeding import check_seeds

T = TypeVar("T")


@dataclass(frozen=True)
class PredictSettings:
    """Set which images `predict` generates.

    Args:
        seeds: Seeds of the images of each prompt.
        prompts: Prompts in place of those of the run; None for those of the run.
        negative: Negative prompt in place of those of the run; empty for those of the run.

    Raises:
        UserError: A seed is out of range, or generates the same image as another one.
    """

    seeds: Sequence[int] = (0,)
    prompts: Sequence[str] | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)


class BatchLoader(Generic[T]):
    """Yield batches of items, each read when it is requested.

    There is at least one batch, which may be empty: Lightning calls no hooks of a loop without batches, and in some of
    them the ranks wait for each other.

    Args:
        items: Names of the items.
        size: Largest number of items in a batch.
        read: Returns an item by its name; None if there is no such item anymore.
    """

    def __init__(self, items: Sequence[str], size: int, read: Callable[[str], T | None]) -> None:
        self.batches = [items[begin : begin + size] for begin in range(0, max(len(items), 1), size)]
        self.read = read

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[T]]:
        for batch in self.batches:
            yield [item for name in batch if (item := self.read(name)) is not None]
