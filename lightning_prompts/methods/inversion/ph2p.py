"""PH2P: prompting hard or hardly prompting (arXiv 2312.12416)."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones.vocabulary import Metric
from lightning_prompts.callbacks import VocabularyProjection
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.gradient import GradientInverter
from lightning_prompts.optimizers import BatchedAdam, BatchedLBFGS
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import NotNegative, Positive, Rate
from lightning_prompts.unused import refuse_unused


class PH2P(GradientInverter):
    """Optimize token embeddings on the denoising loss at noisy timesteps with L-BFGS, and decode their nearest tokens.

    The noise is fixed within a step and changes between steps, since L-BFGS compares gradients of one function.
    Gradients are taken at the continuous embeddings. At the nearest tokens, as in the released code, the gradient is
    piecewise constant and has no curvature.

    Args:
        metric: Distance that decides which token is nearest.
        optimizer: The paper's `lbfgs`, or `adam` or `sgd` for many small steps on new noise each (docs/ph2p.md).
        lr: Learning rate.
        max_iter: Iterations of L-BFGS per step; each costs one evaluation of all samples.
        history_size: Curvature pairs that L-BFGS keeps.
        line_search: Line search of L-BFGS, `strong_wolfe` or None.
        max_step_norm: Largest distance that one iteration of L-BFGS moves a prompt; None for any.
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
        optimizer: Literal["lbfgs", "adam", "sgd"] = "lbfgs",
        lr: Rate = 1.0,
        max_iter: Positive = 10,
        history_size: Positive = 10,
        line_search: Literal["strong_wolfe"] | None = None,
        max_step_norm: float | None = None,
        projection: Literal["final", "delayed", "immediate"] = "final",
        project_every: Positive = 1,
        restart_every: NotNegative = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prompt.metric = metric
        if optimizer != "lbfgs":
            of_lbfgs = {"max_iter": max_iter, "history_size": history_size, "line_search": line_search,
                        "max_step_norm": max_step_norm}  # fmt: skip
            refuse_unused(PH2P, f"with --model.optimizer {optimizer}", of_lbfgs)
        if projection != "delayed":
            refuse_unused(PH2P, f"with --model.projection {projection}", {"project_every": project_every})
        self.optimizer, self.lr = optimizer, float(lr)
        self.settings: dict[str, Any] = {
            "lr": self.lr,
            "max_iter": int(max_iter),  # the command line's numbers have a type that a safe checkpoint cannot hold
            "history_size": int(history_size),
            "line_search_fn": line_search,
            "max_step_norm": max_step_norm,
        }
        self.projection, self.project_every, self.restart_every = projection, project_every, restart_every
        self.straight_through = projection == "immediate"

    def configure_callbacks(self) -> list[pl.Callback]:
        """See `PromptMethod.configure_callbacks`; projection comes after the guard and before scoring."""
        callbacks = super().configure_callbacks()
        if self.projection == "delayed":
            callbacks.insert(1, VocabularyProjection(self.project_every))
        return callbacks

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take up to `max_iter` iterations of L-BFGS, or one of Adam or SGD, on this step's noise."""
        if self.restart_every:
            self._restart(
                [row for row in rows.tolist() if batch.steps[row] and batch.steps[row] % self.restart_every == 0]
            )
        if self.optimizer == "lbfgs":
            self._lbfgs_step(batch, rows)
        else:
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

    def _lbfgs_step(self, batch: Step, rows: Tensor) -> None:
        """Take up to `max_iter` iterations of L-BFGS on one function: the losses on this step's samples."""
        optimizer: Any = self.optimizers()
        samples, texts = self.samples(rows, batch), self.texts(rows)
        active = torch.zeros(len(self.batch), dtype=torch.bool)
        active[rows] = True

        def closure() -> Tensor:
            """Compute the losses (P,) of the problems that the optimizer needs; the others are 0."""
            needed = optimizer.optimizer.needed.cpu()[rows].nonzero().squeeze(1)
            losses = self.losses(rows[needed], samples[needed], texts and [texts[i] for i in needed.tolist()])
            return losses.new_zeros(len(active)).index_put((rows[needed].to(self.device),), losses)

        loss = optimizer.step(closure=closure, active=active.to(self.device), new_function=True)
        self.log_step(batch, rows, loss=loss[rows])

    def texts(self, rows: Tensor) -> list[str] | None:
        """Return the nearest tokens' texts for the text encoders that are not searched; None without such encoders.

        They are fixed within a step, as the function that L-BFGS minimizes must be.
        """
        if not self.backbone.other_text_encoders or self.straight_through:
            return None
        return self.prompt.texts(self.prompt.nearest(rows.to(self.device, non_blocking=True)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return batched L-BFGS, with one curvature history per problem, Adam or SGD."""
        if self.optimizer == "adam":
            return BatchedAdam([self.prompt.embeddings], lr=self.lr)
        if self.optimizer == "sgd":
            return torch.optim.SGD([self.prompt.embeddings], lr=self.lr)
        return BatchedLBFGS([self.prompt.embeddings], **self.settings)
