"""The direction of Lion at the length of Adam (arXiv 2308.12059)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.optimizers.adam import OfRows, unbiased


class AdamOnLion(OfRows):
    """Steps along the signs of Lion's momentum, as long as Adam's step would be.

    Each embedding (L, D), the last two dimensions of a parameter (..., L, D), has a length of its own, so that problems beside
    each other take the steps that they would take alone.

    Args:
        params: Parameters of two dimensions or more.
        lr: Factor of Adam's step.
        betas: Of Adam's moments.
        eps: What is added to the root of Adam's second moment.
        lion_betas: Share of Lion's momentum in the direction, and how much of it stays.
        weight_decay: Of the L2 kind, which is added to the gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        lion_betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "lion_betas": lion_betas, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """See `OfRows`."""
        state = self.state[parameter]
        gradient = gradient + group["weight_decay"] * parameter
        if not state:
            state["step"] = parameter.new_zeros(
                *parameter.shape[:-2], 1, 1
            )  # of each embedding, as problems join others
            for name in ("mean", "square", "momentum"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        (first, second), (share, stays), step = group["betas"], group["lion_betas"], state["step"]
        mean = state["mean"].lerp_(gradient, 1 - first) / unbiased(step, first)
        square = state["square"].lerp_(gradient.square(), 1 - second) / unbiased(step, second)
        adam = mean / (square.sqrt() + group["eps"])
        lion = (share * state["momentum"] + (1 - share) * gradient).sign()
        state["momentum"].lerp_(gradient, 1 - stays)
        length = adam.norm(dim=(-2, -1), keepdim=True) / lion.norm(dim=(-2, -1), keepdim=True).clamp(min=1)
        parameter -= group["lr"] * length * lion
