"""Work on many samples in calls of as many as the memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from lightning_prompts.errors import UserError
from lightning_prompts.ranks import gathered, shared

log = logging.getLogger(__name__)

T = TypeVar("T")

ALL = 2**31  # more samples than there ever are


class Microbatch:
    """How many samples a call takes; half as many from then on whenever the device runs out of memory.

    Args:
        size: Samples of a call; None for as many as the memory holds, for which the first calls are halved.
    """

    def __init__(self, size: int | None) -> None:
        self.fitted = size is None
        self.size = self.asked = ALL if size is None else int(size)
        self.most = 0  # samples that a call has taken
        self.ranks = 1  # among which the samples are divided

    def over(self, samples: int, work: Callable[[torch.Tensor], T], device: torch.device | None = None) -> T:
        """What `work` gives for the numbers (b,) of the samples of each call, which are on the device, as of one call.

        These are tensors (b, ...), or tuples or dictionaries of them. With more ranks than one each works on its share, see `shared`,
        and gets what the others have found. Work that has run out of memory is done again, so it must leave nothing behind before it
        ends. Where it calls `over` itself, each rank does that part alone: the others are at other samples.

        Raises:
            UserError: The memory does not hold a single sample.
        """
        if self.ranks == 1:
            return self._over(torch.arange(samples, device=device), work)
        own, share = shared(samples, self.asked)
        ranks, self.ranks = self.ranks, 1
        try:
            found = self._over(torch.arange(own.start, own.stop, device=device), work)
        finally:
            self.ranks = ranks
        return gathered(found, share, samples)

    def _over(self, numbers: torch.Tensor, work: Callable[[torch.Tensor], T]) -> T:
        given: list[T] = []
        begun = 0
        while begun < len(numbers):
            some = numbers[begun : begun + self.size]
            try:
                given.append(work(some))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise UserError(OUT_OF_MEMORY) from error
            else:
                begun, self.most = begun + len(some), max(self.most, len(some))
                continue
            # Only here is the error gone, and with it what its traceback has held.
            self.size = len(some) // 2
            torch.cuda.empty_cache()
            log.warning("The memory holds no %d samples at once; going on with %d.", len(some), self.size)
        whole: T = pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *given)
        return whole


OUT_OF_MEMORY = (
    "The device is out of memory; lower --model.microbatch, or give --model.gradient_checkpointing true, --model.cpu_offload true "
    "or --model.dtype bfloat16."
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no more memory to give."""
    said = (
        "can't allocate memory",
        "not enough memory",
        "backend out of memory",
    )  # by the CPU, on Windows, and by Apple's
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in said)
    )
