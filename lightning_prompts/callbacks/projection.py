"""Snapping embeddings onto the vocabulary between steps."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch


class VocabularyProjection(pl.Callback):
    """Replaces the active problems' embeddings by their nearest tokens' after every n-th step.

    The optimiser's curvature belongs to the point before the jump, so it is forgotten.

    Args:
        every: Steps between projections.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Projects."""
        if (batch.step + 1) % self.every:
            return
        prompt, active = pl_module.prompt, pl_module.active.to(pl_module.device)
        projected = prompt.table[prompt.project()].float()
        prompt.embeddings.copy_(torch.where(active.view(-1, 1, 1), projected, prompt.embeddings))
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "reset_history"):
                optimizer.reset_history(active)
