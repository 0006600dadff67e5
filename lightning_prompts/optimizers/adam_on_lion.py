"""AdamOnLion: Lion's direction with Adam's step length (arXiv 2308.12059)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class AdamOnLion(Optimizer):
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

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        lion_betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "lion_betas": lion_betas,
            "weight_decay": weight_decay,
        }
        for name in ("lr", "eps", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {defaults[name]}.")
        for name in ("betas", "lion_betas"):
            if not all(0 <= beta < 1 for beta in defaults[name]):
                raise ValueError(f"{name} must be at least 0 and below 1, got {defaults[name]}.")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group)
        return loss

    def _step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
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


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """Return 1 - beta**step, by which Adam divides a moment."""
    return (1 - beta ** step.double()).to(step)  # in float32, a beta near 1 would leave only four digits
