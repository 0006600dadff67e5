"""Keeping the best prompt, on disk from the first scoring on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl

from lightning_prompts.problems import Problem


class BestPrompt(pl.Callback):
    """Scores the decoded prompts, saves what got better, and lets finished problems go.

    Args:
        every: Steps between scorings.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Scores the initial prompts before the first step."""
        if batch.step == 0 and pl_module.active.any():
            self._keep(trainer, pl_module, pl_module.score(), batch.step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Scores after every n-th step and after the last one."""
        last = batch.step + 1 == pl_module.data.steps
        if not pl_module.active.any() or ((batch.step + 1) % self.every and not last):
            return
        self._keep(trainer, pl_module, pl_module.score(), batch.step + 1)
        self._retire(trainer, pl_module, last)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ends a wave whose steps have become fewer since it began."""
        if pl_module.active.any() and not trainer.should_stop:
            self._keep(trainer, pl_module, pl_module.score(), pl_module.data.steps)
            self._retire(trainer, pl_module, last=True)

    def _retire(self, trainer: pl.Trainer, module: Any, last: bool) -> None:
        for problem in module.retire(last):
            trainer.datamodule.folder.save_or_warn(problem)  # type: ignore[attr-defined]

    def _keep(self, trainer: pl.Trainer, module: Any, better: Sequence[Problem], step: int) -> None:
        for problem in better:
            trainer.datamodule.folder.save_or_warn(problem)  # type: ignore[attr-defined]
        losses = [problem.validation_loss for problem in module.problems if problem.validation_loss is not None]
        if losses:
            module.log("validation/loss", sum(losses) / len(losses), batch_size=len(losses))
        if trainer.logger and better:
            text = "\n\n".join(f"{problem.target}: {problem.prompt}" for problem in module.problems)
            trainer.logger.experiment.add_text("prompt", text, step)  # type: ignore[attr-defined]
