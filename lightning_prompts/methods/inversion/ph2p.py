"""PH2P: prompting hard or hardly prompting (arXiv 2312.12416)."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from lightning_prompts.backbones.vocabulary import Metric
from lightning_prompts.callbacks import VocabularyProjection
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.gradient import GradientInverter
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import NotNegative, Positive
from lightning_prompts.unused import refuse_unused


class PH2P(GradientInverter):
    """Optimize token embeddings on the denoising loss at noisy timesteps with L-BFGS, and decode their nearest tokens.

    The noise is fixed within a step and changes between steps, since L-BFGS compares gradients of one function.
    Gradients are taken at the continuous embeddings. At the nearest tokens, as in the released code, the gradient is
    piecewise constant and has no curvature.

    Args:
        metric: Distance that decides which token is nearest.
        optimizer: Optimizer of the embeddings: the paper's L-BFGS, whose iterations cost one evaluation of all samples
            each, or another such as Adam for many small steps on new noise each (docs/ph2p.md).
        projection: When embeddings are replaced with those of their nearest tokens: `final` for scoring only, which
            finds the most; `delayed` after every `project_every` steps too; `immediate` in every evaluation, straight
            through. The paper's text can be read as `final` or as `delayed` (docs/ph2p.md has the figures).
        project_every: Steps between delayed projections.
        restart_every: Steps between restarts from the best prompt with half of its tokens replaced by random ones,
            since gradients alone do not leave a prompt that is almost right; 0 for none, as in the paper.
        **kwargs: See `Inverter`.
    """

    def __init__(
        self,
        *,
        metric: Metric = "euclidean",
        optimizer: OptimizerCallable = lambda params: BatchedLBFGS(params, lr=1.0, max_iter=10, history_size=10),
        projection: Literal["final", "delayed", "immediate"] = "final",
        project_every: Positive = 1,
        restart_every: NotNegative = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.prompt.metric = metric
        if projection != "delayed":
            refuse_unused(PH2P, f"with --model.projection {projection}", {"project_every": project_every})
        self.projection, self.project_every, self.restart_every = projection, project_every, restart_every
        self.straight_through = projection == "immediate"

    def configure_callbacks(self) -> list[pl.Callback]:
        """See `PromptMethod.configure_callbacks`; projection comes after the guard and before scoring."""
        callbacks = super().configure_callbacks()
        if self.projection == "delayed":
            callbacks.insert(1, VocabularyProjection(self.project_every))
        return callbacks

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take one optimizer step on this step's noise, after a restart if one is due."""
        if self.restart_every:
            self._restart(
                [row for row in rows.tolist() if batch.steps[row] and batch.steps[row] % self.restart_every == 0]
            )
        super().step(batch, rows)

    def _restart(self, rows: list[int]) -> None:
        """Restart from the best prompts, with half of their tokens replaced by random ones."""
        if not rows:
            return
        steps = [self.batch[row].steps for row in rows]
        token_ids = self.random_tokens(torch.tensor(rows), steps)
        for place, (row, step) in enumerate(zip(rows, steps, strict=True)):
            problem = self.batch[row].record
            if problem.token_ids:
                draw = generator(self.data.seed, f"{problem.key}/kept", step, 0)
                order = torch.randperm(token_ids.shape[1], generator=draw)
                kept = order[: len(order) // 2]
                token_ids[place, kept] = torch.tensor(problem.token_ids)[kept].to(token_ids)
        self.batch.reset_rows(torch.tensor(rows), self.prompt.table[token_ids].float())

    def texts(self, rows: Tensor) -> list[str] | None:
        """Return the nearest tokens' texts for the text encoders that are not searched; None without such encoders.

        They are fixed within a step, as the function that L-BFGS minimizes must be.
        """
        if not self.backbone.other_text_encoders or self.straight_through:
            return None
        return self.prompt.texts(self.prompt.nearest(rows.to(self.device, non_blocking=True)))
