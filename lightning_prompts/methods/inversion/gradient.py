"""The gradient step that PEZ, PH2P and TextualInversion share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.inversion.samples import Samples
from lightning_prompts.optimizers import BatchedLBFGS, build_optimizer, check_optimizer


class GradientInverter(Inverter):
    """Move the token embeddings along the gradient of the losses.

    Args:
        optimizer: Returns the optimizer of a list of parameters.
        **kwargs: See `Inverter`.

    Attributes:
        straight_through: Whether the gradient is taken at the embeddings of the nearest tokens and applied to the
            continuous ones.
    """

    straight_through: bool = False

    def __init__(self, *, optimizer: OptimizerCallable, **kwargs: Any) -> None:
        example = check_optimizer(optimizer, closure=True)
        super().__init__(**kwargs)
        self.optimizer, self.uses_lbfgs = optimizer, isinstance(example, BatchedLBFGS)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, which treats each problem as if it were alone."""
        return build_optimizer(self.optimizer, self.prompt.embeddings)

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take one optimizer step on the losses of this step's samples."""
        samples, texts = self.samples(rows, batch), self.texts(rows)
        if self.uses_lbfgs:
            loss = self._lbfgs_step(rows, samples, texts)
        else:
            loss = self.losses(rows, samples, texts)
            self.step_active(loss, rows)
        self.log_step(batch, rows, loss=loss)

    def _lbfgs_step(self, rows: Tensor, samples: Samples, texts: Sequence[str] | None) -> Tensor:
        """Take up to `max_iter` iterations of L-BFGS on one function, and return the initial losses (Q,)."""
        optimizer: Any = self.optimizers()
        active = torch.zeros(len(self.batch), dtype=torch.bool)
        active[rows] = True

        def closure() -> Tensor:
            """Compute the losses (P,) of the problems that the optimizer needs; the others are 0."""
            needed = optimizer.optimizer.needed.cpu()[rows].nonzero().squeeze(1)
            losses = self.losses(rows[needed], samples[needed], texts and [texts[i] for i in needed.tolist()])
            return losses.new_zeros(len(active)).index_put((rows[needed].to(self.device),), losses)

        loss: Tensor = optimizer.step(closure=closure, active=active.to(self.device), new_function=True)
        return loss[rows]

    def losses(self, rows: Tensor, samples: Samples, texts: Sequence[str] | None) -> Tensor:
        """Compute the losses (Q,) of the current prompts of the problems `rows` (Q,); see `Inverter.loss`."""
        ids, embeddings = self.prompt(rows.to(self.device, non_blocking=True), straight_through=self.straight_through)
        return self.loss(rows, ids, embeddings, samples, texts)

    def texts(self, rows: Tensor) -> list[str] | None:
        """Return Q texts for the text encoders that are not searched; None for the text of the tokens."""
        return None
