"""PEZ: hard prompts made easy (arXiv 2302.03668)."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable

from lightning_prompts.backbones.vocabulary import Metric
from lightning_prompts.methods.inversion.gradient import GradientInverter


class PEZ(GradientInverter):
    """Take gradients at the nearest tokens' embeddings, and apply them to continuous ones (algorithm 1).

    The denoising loss is the paper's Stable Diffusion variant; its main one, the cosine of prompt and images, is
    `loss_weights={"denoising": 0, "clip": 1}`.

    Args:
        optimizer: Optimizer of the embeddings; AdamW is that of the released code.
        metric: Distance that decides which token is nearest.
        **kwargs: See `Inverter`.
    """

    straight_through = True

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
        metric: Metric = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.prompt.metric = metric
