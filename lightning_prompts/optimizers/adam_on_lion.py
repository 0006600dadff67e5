"""AdamOnLion: Lion's direction with Adam's step length (arXiv 2308.12059)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.optimizers.adam import RowwiseOptimizer, bias_correction


class AdamOnLion(RowwiseOptimizer):
    """Step along the sign of Lion's update with the length of Adam's step.

    The length is computed per embedding (L, D), the last two dimensions of a parameter (..., L, D), so that problems in
    a batch take the same steps as alone.

    Args:
        params: Parameters of two dimensions or more.
        lr: Step size of Adam.
        betas: Decay rates of Adam's moments.
        eps: Added to the root of Adam's second moment.
        lion_betas: Weight of Lion's momentum in the update, and its decay rate.
        weight_decay: L2 penalty, which is added to the gradient.
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

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take one step along Lion's direction."""
        state = self.state[parameter]
        gradient = gradient + group["weight_decay"] * parameter
        if not state:
            state["step"] = parameter.new_zeros(*parameter.shape[:-2], 1, 1)  # per embedding, since problems join later
            for name in ("mean", "square", "momentum"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        (first, second), (lion_first, lion_second), step = group["betas"], group["lion_betas"], state["step"]
        mean = state["mean"].lerp_(gradient, 1 - first) / bias_correction(step, first)
        square = state["square"].lerp_(gradient.square(), 1 - second) / bias_correction(step, second)
        adam = mean / (square.sqrt() + group["eps"])
        lion = (lion_first * state["momentum"] + (1 - lion_first) * gradient).sign()
        state["momentum"].lerp_(gradient, 1 - lion_second)
        length = adam.norm(dim=(-2, -1), keepdim=True) / lion.norm(dim=(-2, -1), keepdim=True).clamp(min=1)
        parameter -= group["lr"] * length * lion
