"""What to do when a prompt stops being a number."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class NonFiniteGuard(pl.Callback):
    """Takes problems whose embeddings have no nearest token out of the wave; the best prompt so far stays their result."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at every prompt."""
        for row in (~pl_module.prompt.sound().cpu() & pl_module.active).nonzero().squeeze(1).tolist():
            problem = pl_module.problems[row]
            pl_module.active[row] = False
            pl_module.parameter.data[row] = 0
            problem.finish()
            if problem.prompt is None:
                problem.status = "failed"
            problem.reason = (
                f"The prompt stopped being finite or grew beyond 1e18 at step {batch.step}; lower --model.lr."
            )
            trainer.datamodule.folder.save_or_warn(problem)  # type: ignore[attr-defined]
