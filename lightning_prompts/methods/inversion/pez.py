"""PEZ: hard prompts made easy (arXiv 2302.03668)."""

from __future__ import annotations

from typing import Any

import torch

from lightning_prompts.backbones.vocabulary import Metric
from lightning_prompts.methods.inversion.gradient import GradientInverter
from lightning_prompts.optimizers import BatchedAdam
from lightning_prompts.setting_types import Rate


class PEZ(GradientInverter):
    """Take gradients at the nearest tokens' embeddings, and apply them to continuous ones (algorithm 1).

    The denoising loss is the paper's Stable Diffusion variant; its main one, the cosine of prompt and images, is
    `loss_weights={"denoising": 0, "clip": 1}`.

    Args:
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        metric: Distance that decides which token is nearest.
        **kwargs: See `Inverter`.
    """

    straight_through = True

    def __init__(self, *, lr: Rate = 0.1, weight_decay: float = 0.1, metric: Metric = "cosine", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompt.metric = metric
        self.lr, self.weight_decay = float(lr), weight_decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, as in the released code."""
        return BatchedAdam([self.prompt.embeddings], lr=self.lr, weight_decay=self.weight_decay)
