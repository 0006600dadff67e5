"""Stop a command that no longer owns the folder of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl

from lightning_prompts.errors import UserError
from lightning_prompts.launchers import started_by_lightning
from lightning_prompts.runs.lock import RunLock

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod


class OwnerGuard(pl.Callback):
    """Stop a command if another process took over its run folder, or if the process that started this one is gone.

    Args:
        lock: The lock of the run folder, which the first process holds; None for the others.
    """

    def __init__(self, lock: RunLock | None) -> None:
        self.lock, self.follows = lock, started_by_lightning()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PromptMethod, batch: Step, batch_idx: int) -> None:
        """Check the lock and the parent process before each step.

        Raises:
            UserError: The lock or the parent process is gone.
        """
        self._check("repeat the command with --ckpt_path last to resume the run")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: PromptMethod, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the lock and the parent process before a batch of `validate`."""
        self._check("repeat the command")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: PromptMethod, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the lock and the parent process before a batch of `test`."""
        self._check("repeat the command")

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: PromptMethod, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the lock and the parent process before a prompt of `predict`."""
        self._check("repeat the command")

    def _check(self, advice: str) -> None:
        if self.lock:
            self.lock.check()
        if self.follows and not started_by_lightning():
            raise UserError(f"The process that started this one is gone; {advice}.")
