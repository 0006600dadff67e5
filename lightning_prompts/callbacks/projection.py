"""Project embeddings onto the vocabulary between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytorch_lightning as pl
import torch

from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings


class VocabularyProjection(pl.Callback):
    """Replace the embeddings of active problems with those of their nearest tokens after every n-th step of each.

    The optimizer's state belongs to the embeddings before the projection, so it is cleared.

    Args:
        every: Steps between projections.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def setup(self, trainer: pl.Trainer, pl_module: PromptMethod, stage: str) -> None:
        """Refuse a method without token embeddings."""
        if not hasattr(pl_module.prompt, "project"):
            raise UserError(
                f"VocabularyProjection projects token embeddings, and {type(pl_module).__name__} has none; remove the "
                "callback."
            )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Project the problems that are due; a row that is not finite is left to `NonFiniteGuard`."""
        prompt = cast("TokenEmbeddings", pl_module.prompt)
        rows = pl_module.batch.where(lambda row: row.active and row.steps % self.every == 0)
        rows = rows[prompt.is_finite().cpu()[rows]]
        if len(rows):
            pl_module.batch.reset_rows(rows, prompt.table[prompt.project()[rows.to(pl_module.device)]])
