"""Invert images by hill climbing: replace random tokens, and keep a replacement that lowers the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.inversion.samples import Samples
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import Positive


class HillClimbing(Inverter):
    """Replace random tokens of each prompt by random others, and keep the replacement if it lowers the loss.

    Args:
        n_replace: Tokens that a proposal replaces.
        **kwargs: See `Inverter`.
    """

    moves_embeddings = False  # only tokens, whose loss needs no gradient

    def __init__(self, *, n_replace: Positive = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_replace = int(n_replace)

    @torch.no_grad()
    def step(self, batch: Step, rows: Tensor) -> None:
        """Compare a proposal with the current prompt, on the same samples, for the problems `rows` (Q,)."""
        samples, on_device = self.samples(rows, batch), rows.to(self.device)
        current = self.prompt.project()[on_device]
        proposed = self._propose(batch, rows, current)
        before, after = self._losses(rows, current, samples), self._losses(rows, proposed, samples)
        accepted = torch.where((after < before).unsqueeze(1), proposed, current)
        self.prompt.embeddings.data[on_device] = self.prompt.table[accepted].float()
        self.log_step(batch, rows, loss=torch.minimum(before, after))

    def _propose(self, batch: Step, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Return prompts (Q, M) that differ from the current ones in `n_replace` tokens."""
        steps = [batch.steps[row] for row in rows.tolist()]
        drawn, keep = self.random_tokens(rows, steps), torch.ones_like(token_ids, dtype=torch.bool)
        for q, problem in enumerate(self.records(rows)):
            # A draw depends on the seed, the problem and the step alone, so that resuming and batching do not change
            # it.
            draw = generator(self.data.seed, f"{problem.key}/hill climbing", steps[q], 0)
            keep[q, torch.randperm(token_ids.shape[1], generator=draw)[: self.n_replace]] = False
        return torch.where(keep, token_ids, drawn)

    def _losses(self, rows: Tensor, token_ids: Tensor, samples: Samples) -> Tensor:
        """Compute the losses (Q,) of prompts (Q, M)."""
        ids = self.prompt.ids(token_ids)
        return self.loss(rows, ids, self.prompt.table[ids], samples)
