"""PH2P: prompting hard or hardly prompting (arXiv 2312.12416)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones.vocabulary import Metric
from lightning_prompts.callbacks import VocabularyProjection
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.base import Inverter, Samples
from lightning_prompts.optimizers import BatchedAdam, BatchedLBFGS
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.types import NotNegative, Positive, Rate
from lightning_prompts.unused import refuse_unused


class PH2P(Inverter):
    """Quasi-Newton steps on the denoising loss at noisy timesteps, with projection after each step.

    The noise is fixed within a step and drawn anew for the next one: L-BFGS compares gradients of one function. The closures
    of a step evaluate the continuous embeddings; fed with gradients at the nearest tokens, as the released code's hook does,
    the gradient is piecewise constant and there is no curvature to find.

    Args:
        metric: Distance by which embeddings are replaced with tokens.
        optimizer: `lbfgs` (the paper's), or `adam` or `sgd`: many small steps, each of one iteration on new noise (docs/ph2p.md).
        lr: Step size.
        max_iter: Iterations of L-BFGS per step; each costs one evaluation of all samples.
        history_size: Curvature pairs that L-BFGS keeps.
        line_search: `strong_wolfe` or None, of L-BFGS.
        max_step_norm: Cap on how far one iteration of L-BFGS moves a prompt.
        projection: `delayed` (after each step), `immediate` (straight through, within the closure) or `final` (scored only).
        continue_from: After a delayed projection go on from the `continuous` embeddings, which finds more, or from the
            `projected` ones; the paper's text admits both readings (docs/ph2p.md has the figures).
        project_every: Steps between projections that go on from the projected embeddings.
        restart_every: Steps after which the search begins again at the best prompt with half of its tokens drawn anew, as
            gradients alone do not leave a prompt that is nearly right; 0 for never, as in the paper.
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
        projection: Literal["delayed", "immediate", "final"] = "delayed",
        continue_from: Literal["projected", "continuous"] = "continuous",
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
            refuse_unused(PH2P, f"with --model.projection {projection}", {"continue_from": continue_from})
        if projection != "delayed" or continue_from != "projected":
            refuse_unused(PH2P, "unless --model.continue_from is projected", {"project_every": project_every})
        self.optimizer, self.lr = optimizer, float(lr)
        self.settings: dict[str, Any] = {
            "lr": self.lr,
            "max_iter": int(max_iter),  # the command line's numbers have a type that a safe checkpoint cannot hold
            "history_size": int(history_size),
            "line_search_fn": line_search,
            "max_step_norm": max_step_norm,
        }
        self.projection, self.continue_from = projection, continue_from
        self.project_every, self.restart_every = project_every, restart_every

    def configure_callbacks(self) -> list[pl.Callback]:
        """Projection comes after what is no number has been taken out, and before scoring."""
        callbacks = super().configure_callbacks()
        if self.projection == "delayed" and self.continue_from == "projected":
            callbacks.insert(1, VocabularyProjection(self.project_every))
        return callbacks

    def step(self, batch: Step, rows: Tensor) -> None:
        """One step on this step's noise: up to `max_iter` iterations of L-BFGS, or one of Adam or SGD."""
        if self.restart_every:
            self._restart(
                [row for row in rows.tolist() if batch.steps[row] and batch.steps[row] % self.restart_every == 0]
            )
        optimizer: Any = self.optimizers()
        samples, texts = self.samples(rows, batch), self.nearest_texts(rows)
        if self.optimizer != "lbfgs":
            loss = self.losses(rows, samples, texts)
            self.step_active(loss, rows)
        else:
            everyone = torch.zeros(len(self.batch.records), dtype=torch.bool)
            everyone[rows] = True

            def losses() -> Tensor:
                """Losses (P,), of which those of the problems that the optimiser needs are computed."""
                among = optimizer.optimizer.needed.cpu()[rows].nonzero().squeeze(1)
                some = self.losses(rows[among], samples[among], texts and [texts[i] for i in among.tolist()])
                return some.new_zeros(len(everyone)).index_put((rows[among].to(self.device),), some)

            loss = optimizer.step(closure=losses, active=everyone.to(self.device), new_function=True)[rows]
        self.log_step(batch, rows, loss=loss)

    def losses(self, rows: Tensor, samples: Samples, texts: Sequence[str] | None = None) -> Tensor:
        """Losses (Q,) of the problems `rows` (Q,), with the texts that encoders read which are not searched."""
        ids, embeddings = self.prompt(self.to_device(rows), straight_through=self.projection == "immediate")
        return self.loss(rows, ids, embeddings, samples, texts)

    def nearest_texts(self, rows: Tensor) -> list[str] | None:
        """The nearest tokens' texts at the beginning of a step, for encoders that are not searched; None where there are none.

        Free embeddings spell no text. That of their nearest tokens is what is scored, and stays the same within a step, whose
        losses have to be those of one function.
        """
        if not self.backbone.others or self.projection == "immediate":
            return None
        return self.prompt.texts(self.prompt.nearest(self.to_device(rows)))

    def _restart(self, rows: list[int]) -> None:
        """Begins again at the best prompts, half of whose tokens are drawn anew."""
        if not rows:
            return
        steps = [self.batch[row].steps for row in rows]
        drawn = self.random_tokens(torch.tensor(rows), steps)
        for place, (row, step) in enumerate(zip(rows, steps, strict=True)):
            if self.batch[row].record.token_ids:
                order = torch.randperm(
                    drawn.shape[1], generator=generator(self.data.seed, f"{self.batch[row].record.key}/kept", step, 0)
                )
                kept = order[: len(order) // 2]
                drawn[place, kept] = torch.tensor(self.batch[row].record.token_ids)[kept].to(drawn)
        self.reset_rows(torch.tensor(rows), self.prompt.table[drawn].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Batched L-BFGS, one curvature history a problem, Adam or SGD."""
        if self.optimizer == "adam":
            return BatchedAdam([self.prompt.embeddings], lr=self.lr)
        if self.optimizer == "sgd":
            return torch.optim.SGD([self.prompt.embeddings], lr=self.lr)
        return BatchedLBFGS([self.prompt.embeddings], **self.settings)
