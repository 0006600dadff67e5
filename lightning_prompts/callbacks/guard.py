"""Recover prompts that are no longer finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch

from lightning_prompts.optimizers import BatchedLBFGS

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)


class NonFiniteGuard(pl.Callback):
    """Reset problems that are not finite to their best prompt, and halve their step size.

    A problem is reset if its prompt is not finite or too large for a nearest token, or if its gradient was not finite
    in any step since the last scoring. It is checked only when it is scored, since reading these values synchronizes
    the device.

    Args:
        most: Resets of a problem before it is finished with its best prompt so far.
    """

    def __init__(self, most: int = 5) -> None:
        self.most = most

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Check the prompts to score, and the steps that were skipped."""
        rows = pl_module.rows_to_score()
        here = pl_module.batch
        sound, skipped = pl_module.prompt.is_finite().cpu()[rows], here.skipped.cpu()[rows]
        here.skipped[rows.to(here.skipped.device)] = 0
        for row, is_sound, steps in zip(rows.tolist(), sound.tolist(), skipped.tolist(), strict=True):
            target, step = here[row].record.target, here[row].steps
            if steps:
                log.warning(
                    "The gradient of %s was not finite in %d of the steps up to %d, which were skipped.",
                    target,
                    steps,
                    step,
                )
            if not is_sound:
                self._reset(pl_module, row, "The prompt stopped being finite or grew beyond 1e18")
            elif steps >= pl_module.score_every_n_steps:
                self._reset(pl_module, row, "The gradient was not finite")

    def _reset(self, module: PromptMethod, row: int, reason: str) -> None:
        problem, step = module.batch[row].record, module.batch[row].steps
        module.batch.reset_rows(torch.tensor([row]), module.best_params(row)[None])
        module.batch[row].halvings += 1
        if module.batch[row].halvings <= self.most:
            lbfgs = any(isinstance(optimizer, BatchedLBFGS) for optimizer in module.trainer.optimizers)
            how = "" if lbfgs else " with half the step size"  # the history of L-BFGS requires whole steps
            log.warning("%s for %s at step %d; continuing from its best prompt%s.", reason, problem.target, step, how)
            return
        module.batch.finish(row)
        if problem.status != "failed":
            problem.reason = f"{reason} at step {step}, for the {self.most + 1}th time; lower --model.optimizer.lr."
