"""Any optimizer of PyTorch for a parameter whose rows are independent problems."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.optimizers.adam_on_lion import AdamOnLion
from lightning_prompts.optimizers.lbfgs import BatchedLBFGS


class RowwiseOptimizer(Optimizer):
    """Step every row of a parameter (P, ...) as an optimizer of PyTorch steps that row alone.

    PyTorch's optimizers count the steps of a whole parameter, and some normalize over it. Here, each row is a parameter
    of its own of the inner optimizer. The state is kept as tensors with a row per problem, and `started` says which
    rows have one; a row without it starts with the inner optimizer's initial state.

    Args:
        parameter: Parameter (P, ...).
        build: Returns the optimizer of PyTorch for a list of parameters.
    """

    def __init__(self, parameter: Tensor, build: OptimizerCallable) -> None:
        self.build, self.inner = build, build([torch.zeros([1] * (parameter.dim() - 1))])
        super().__init__([parameter], dict(self.inner.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all rows, if the parameter has a gradient.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        (parameter,) = group["params"]
        if parameter.grad is not None and len(parameter):
            rows = list(parameter.detach().unbind())
            for row, gradient in zip(rows, parameter.grad.unbind(), strict=True):
                row.grad = gradient
            self._step_rows(rows, self.state[parameter], {**group, "params": rows})
        return loss

    def _step_rows(self, rows: list[Tensor], state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Step the rows with the inner optimizer, whose states are views of `state` where there are any."""
        started = state.setdefault("started", torch.zeros(len(rows), dtype=torch.bool))  # not on the device
        values = {name: value.unbind() for name, value in state.items() if name != "started"}
        views = [
            {name: value[place] for name, value in values.items()} if has_state else {}
            for place, has_state in enumerate(started.tolist())
        ]
        states = {
            row: dict(view if has_state else self.build([row]).state[row])  # some build the state with the optimizer
            for row, view, has_state in zip(rows, views, started.tolist(), strict=True)
        }
        self.inner.state = defaultdict(dict, states)
        self.inner.param_groups = [group]
        self.inner.step()
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            for name, value in self.inner.state[row].items():
                if value is view.get(name):  # updated in place, or None
                    continue
                if name not in state:
                    state[name] = value.new_zeros(len(rows), *value.shape)
                state[name][place] = value
        started.fill_(True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        for state in self.state.values():  # loading converts all tensors to the parameter's dtype and device
            state["started"] = state["started"].bool().cpu()


def optimizers() -> list[type[Optimizer]]:
    """Return the classes of optimizers that `--model.optimizer` takes, sorted by name."""
    kinds = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)}
    return sorted({*kinds, AdamOnLion, BatchedLBFGS} - {Optimizer, LBFGS, SparseAdam}, key=lambda kind: kind.__name__)


def optimizer_names() -> list[str]:
    """Return the names of the optimizers that `--model.optimizer` takes."""
    return [kind.__name__ for kind in optimizers()]


def optimizer_settings() -> set[str]:
    """Return the names of the settings of these optimizers."""
    return {name for kind in optimizers() for name in signature(kind).parameters} - {"params"}


def build_optimizer(build: OptimizerCallable, parameter: Tensor) -> Optimizer:
    """Build the optimizer of a parameter (P, ...) whose rows are independent problems.

    Args:
        build: Returns the optimizer of a list of parameters.
        parameter: Parameter (P, ...).
    """
    of_row = build([torch.zeros([1] * (parameter.dim() - 1))])
    return build([parameter]) if isinstance(of_row, AdamOnLion | BatchedLBFGS) else RowwiseOptimizer(parameter, build)


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class and the settings of an optimizer, as a config has them."""
    kind = type(optimizer)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(optimizer.defaults)}


def _in_settings(error: ValueError) -> str:
    """Name the setting in an error of an optimizer, such as `Invalid learning rate: -1.0`."""
    message = first_sentence(error)
    if rate := re.fullmatch(
        r"(?:Invalid learning rate:|Learning rate should be >= 0 but is:|lr must be at least 0, got) (.*)\.", message
    ):
        return f"--model.optimizer.lr must be positive, got {rate[1].removesuffix('.0')}."
    return f"--model.optimizer{'.' if re.match(r'[a-z_]+ must ', message) else ': '}{message}"


def check_optimizer(build: OptimizerCallable, dims: int = 2, closure: bool = False) -> Optimizer:
    """Check the setting `--model.optimizer` before a model is loaded, and return the optimizer of a dummy parameter.

    Args:
        build: Returns the optimizer of a list of parameters.
        dims: Dimensions of a row of the parameter.
        closure: Whether the method evaluates its losses several times per step, as L-BFGS needs it.

    Raises:
        UserError: A setting is out of range, or the optimizer is none that the method can use.
    """
    if not callable(build):
        raise UserError(
            "--model.optimizer must be an optimizer's name, its class_path and init_args, or, as an argument of a "
            f"class, a function such as functools.partial(AdamW, lr=0.1), got {build!r}."
        )
    try:
        optimizer = build([torch.zeros([1] * dims)])
    except ValueError as error:
        raise UserError(_in_settings(error)) from error
    except TypeError as error:
        raise UserError(f"--model.optimizer cannot be built ({first_sentence(error).rstrip('.')}).") from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"--model.optimizer must build an optimizer, got a {type(optimizer).__name__}.")
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS | BatchedLBFGS) and not closure:
        raise UserError(f"--model.optimizer {name} needs several losses per step; give another, such as AdamW.")
    if isinstance(optimizer, LBFGS):
        raise UserError("--model.optimizer LBFGS takes all problems as one; give BatchedLBFGS.")
    if isinstance(optimizer, SparseAdam):
        raise UserError("--model.optimizer SparseAdam needs sparse gradients; give Adam.")
    rate = optimizer.defaults["lr"]
    if not 0 < rate < float("inf"):
        raise UserError(f"--model.optimizer.lr must be positive, got {float(rate):g}.")
    return optimizer
