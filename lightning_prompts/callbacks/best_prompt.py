"""Keep each problem's best prompt, in its record on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import Tensor

from lightning_prompts.callbacks.loggers import log_text

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod


class BestPrompt(pl.Callback):
    """Score the prompts, save those that improved, and finish problems."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PromptMethod, batch: Step, batch_idx: int) -> None:
        """Score initial prompts, and finish resumed problems that already have more steps than the search now takes."""
        self._score(trainer, pl_module, pl_module.batch.where(lambda row: row.active and row.steps == 0))
        if len(over := pl_module.batch.where(lambda row: row.active and row.steps >= pl_module.steps)):
            self._score(trainer, pl_module, over)
            pl_module.finish_done(over)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Score after every n-th step of a problem and after its last one."""
        rows = pl_module.rows_to_score()
        self._score(trainer, pl_module, rows)
        pl_module.finish_done(rows)

    def _score(self, trainer: pl.Trainer, module: PromptMethod, rows: Tensor) -> None:
        better = module.score(rows) if len(rows) else []
        for problem in better:
            trainer.datamodule.folder.save_or_warn(problem)  # type: ignore[attr-defined]
        losses = [problem.validation_loss for problem in module.batch.records if problem.validation_loss is not None]
        if losses and len(rows):
            module.log("validation/loss", sum(losses) / len(losses), batch_size=len(losses))
        if better:
            lines = [f"{problem.target}: {problem.prompt}" for problem in module.batch.records]
            log_text(trainer.loggers, "prompt", lines, trainer.fit_loop.total_batch_idx + 1)
