"""Who may go on writing to the folder of a run."""

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
    """Ends a search whose folder another process has taken over, or whose first process, which holds it for all, is lost.

    Args:
        lock: What this process holds; None for processes after the first.
    """

    def __init__(self, lock: RunLock | None) -> None:
        self.lock, self.follows = lock, started_by_lightning()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PromptMethod, batch: Step, batch_idx: int) -> None:
        """Look before each step."""
        if self.lock:
            self.lock.check()
        if self.follows and not started_by_lightning():
            raise UserError(
                "The process that started this one is gone; the same command with --ckpt_path last resumes the run."
            )
