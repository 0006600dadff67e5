"""What to do when a prompt stops being a number."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)


class NonFiniteGuard(pl.Callback):
    """Takes problems whose prompts have no nearest token back to their best, from where they go on in steps half as long.

    Looks when they are scored, as a look makes the device wait.

    Args:
        most: Times that a problem may go back, before its best prompt so far is its result.
    """

    def __init__(self, most: int = 5) -> None:
        self.most = most

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the prompts."""
        rows = pl_module.due()
        for row in rows[~pl_module.prompt.sound().cpu()[rows]].tolist():
            problem, left = pl_module.problems[row], "stopped being finite or grew beyond 1e18"
            pl_module.jump(torch.tensor([row]), pl_module.best(row)[None])
            pl_module.lowered[row] += 1
            if pl_module.lowered[row] <= self.most:
                log.warning(
                    "The prompt of %s %s at step %d; it goes on from its best, in half as long steps.",
                    *(problem.target, left, pl_module.done[row]),
                )
                continue
            pl_module.end(row)
            if problem.prompt is None:
                problem.status = "failed"
            problem.reason = f"The prompt {left} at step {pl_module.done[row]}, time and again; lower --model.lr."
