"""Adam for parameters whose rows are independent problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RowwiseOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of parameters (P, ...), whose rows are independent problems."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

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
                    self.update(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter in place, with the settings of its group."""


class BatchedAdam(RowwiseOptimizer):
    """Adam and AdamW (arXiv 1412.6980, 1711.05101) with a step counter per row.

    PyTorch counts the steps of the whole parameter, so a problem that joins the batch later would take other steps than
    alone.

    Args:
        params: Parameters of shape (P, ...).
        lr: Step size.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take one step of Adam."""
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = parameter.new_zeros(len(parameter))
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        mean, square = (
            state[name] / bias_correction(state["step"], beta).view(-1, *[1] * (parameter.dim() - 1))
            for name, beta in (("mean", first), ("square", second))
        )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter -= group["lr"] * mean / (square.sqrt() + group["eps"])


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """Return 1 - beta**step, by which Adam divides a moment."""
    return (1 - beta ** step.double()).to(step)  # in float32, a beta near 1 would leave only four digits
