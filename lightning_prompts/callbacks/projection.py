"""Snapping embeddings onto the vocabulary between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch

from lightning_prompts.prompts import TokenEmbeddings

if TYPE_CHECKING:
    from lightning_prompts.data.problems import Step
    from lightning_prompts.methods import PromptMethod


class VocabularyProjection(pl.Callback):
    """Replaces the embeddings of active problems by their nearest tokens' after every n-th step of each.

    The optimiser's curvature belongs to the point before the jump, so it is forgotten.

    Args:
        every: Steps between projections.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Projects."""
        prompt = pl_module.prompt
        assert isinstance(prompt, TokenEmbeddings)
        rows = pl_module.batch.where(lambda row: row.active and row.steps % self.every == 0)
        rows = rows[prompt.sound().cpu()[rows]]
        if len(rows):
            pl_module.reset_rows(rows, prompt.table[prompt.project()[rows.to(pl_module.device)]])
