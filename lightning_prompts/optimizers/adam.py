"""Adam over the rows of one parameter, each row a problem of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class OfRows(torch.optim.Optimizer, ABC):
    """An optimiser that says how a parameter moves along its gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step down the gradients.

        Args:
            closure: Computes the loss, and the gradients with it.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Moves a parameter, by the settings of its group."""


class BatchedAdam(OfRows):
    """Adam and AdamW (arXiv 1412.6980, 1711.05101) that count the steps of every row for itself.

    PyTorch's count those of the parameter, so that a problem which joins others would not take the steps that it takes alone.

    Args:
        params: Parameters of shape (P, ...).
        lr: Step size.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Of AdamW's kind, which is not part of the gradient.
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

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """See `OfRows`."""
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = parameter.new_zeros(len(parameter))
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        seen = [unbiased(state["step"], beta).view(-1, *[1] * (parameter.dim() - 1)) for beta in (first, second)]
        size = (state["square"] / seen[1]).sqrt() + group["eps"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter -= group["lr"] * (state["mean"] / seen[0]) / size


def unbiased(step: Tensor, beta: float) -> Tensor:
    """What a moment has seen of the gradients after so many steps, 1 - beta**step."""
    return (1 - beta ** step.double()).to(step)  # in single precision a beta near one would leave four digits
