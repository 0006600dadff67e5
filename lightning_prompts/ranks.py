"""Several processes, each with its own problems: `--trainer.devices 2 --trainer.strategy problems`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry


def own_rank() -> int:
    """This process's number, known before Lightning is set up: launchers pass it in the environment."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


class ProblemParallel(DDPStrategy):
    """Ranks do not speak to each other between start and end.

    Each has as many problems as fall to it, takes as many steps as these need and writes its own checkpoints; records by key are
    the only exchange. So nothing is wrapped, reduced or waited for, until rank 0 merges the results.
    """

    strategy_name = "problems"

    def __init__(self, **kwargs: Any) -> None:
        # Rank 0 waits for the others at the end, however long they take.
        super().__init__(
            process_group_backend=kwargs.pop("process_group_backend", None), timeout=timedelta(days=30), **kwargs
        )

    def setup(self, trainer: pl.Trainer) -> None:
        """Has no rank tell the others at each step whether it was told to stop: they may be at different steps."""
        super().setup(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def configure_ddp(self) -> None:
        """Leaves the module as it is: there is no gradient to exchange."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Does not wait."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Keeps one's own."""
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps one's own."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decides alone."""
        return decision

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every rank saves its own."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


def wait_for_all() -> None:
    """Waits until every rank has come here; returns at once where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


if ProblemParallel.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(ProblemParallel.strategy_name, ProblemParallel, description=ProblemParallel.__doc__)
