"""Log images of the best prompts during the search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl

from lightning_prompts.callbacks.loggers import log_images, supports_images

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod


class SampleGrid(pl.Callback):
    """Log images of the best prompts so far.

    Args:
        every: Steps between grids; 0 for none.
        most: Problems per grid, with an image each, always from the same noise.
    """

    def __init__(self, every: int = 40, most: int = 4) -> None:
        self.every, self.most = every, most

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Log a grid when it is time."""
        step = trainer.fit_loop.total_batch_idx + 1
        if not self.every or step % self.every or not supports_images(trainer.loggers):
            return
        problems = [problem for problem in pl_module.batch.records if problem.prompt][: self.most]
        if problems:
            log_images(trainer.loggers, "samples", [pl_module.preview(problems)], step)
