"""L-BFGS for a parameter whose rows are independent problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_prompts.errors import UserError
from lightning_prompts.optimizers.curvature import choose_rows, dot, new_state, newton_direction, store_pairs
from lightning_prompts.optimizers.strong_wolfe import Lines, StrongWolfe, Trials, choose

LineSearch = Literal["strong_wolfe"]


class _FixedStep:
    """A line search that accepts the first step size; has the interface of `StrongWolfe`."""

    def __init__(self, here: Trials) -> None:
        self.t = here.t
        self.result = here

    def begin(self, mask: Tensor, lines: Lines) -> None:
        self.t = torch.where(mask, lines.t, self.t)

    def observe(self, mask: Tensor, new: Trials) -> Tensor:
        self.result = new
        return mask


@dataclass
class _Progress:
    """Progress of the problems within one call of `step`.

    Attributes:
        point: Points accepted so far, (P, N).
        here: Losses and gradients at these points, at t = 0 of the next search line.
        direction: Search directions, (P, N).
        active: The problems that have not stopped, (P,) bool.
        n_iter: Iterations begun in this call, (P,).
        n_eval: Evaluations in this call, (P,).
    """

    point: Tensor
    here: Trials
    direction: Tensor
    active: Tensor
    n_iter: Tensor
    n_eval: Tensor


class BatchedLBFGS(Optimizer):
    """L-BFGS for one parameter of shape (P, ...), where every row is an independent problem.

    Each problem has its own curvature, step sizes and stopping rules, and takes the steps that `torch.optim.LBFGS`
    would take for it alone. The problems do not wait for each other: each evaluation is one trial of every problem, so
    `step` evaluates the closure at most max_eval + 1 times, and rows that stopped earlier stay unchanged.

    A row whose loss, gradient or next point is not finite undoes the step, clears its curvature, stops for this call of
    `step`, and starts along the negative gradient in the next one. The parameter never holds NaN or infinity unless it
    did before.

    The state of each problem is 2 * history_size + 3 vectors of the problem's size, in the parameter's dtype, and a few
    numbers.

    Args:
        params: One parameter of shape (P, ...) in float32 or float64.
        lr: Initial step size of each iteration; in the very first one it is scaled by min(1, 1 / |gradient|_1).
        max_iter: Largest number of iterations per call of `step`.
        max_eval: Largest number of evaluations per problem and call of `step`, which a line search may exceed by one;
            None for max_iter * 5 // 4.
        tolerance_grad: A problem stops when no element of its gradient is larger.
        tolerance_change: A problem stops when its loss or its largest element changes by less.
        history_size: Number of curvature pairs per problem. PyTorch's default of 100 takes ten times the memory.
        line_search_fn: "strong_wolfe", or None for steps of size lr.
        max_step_norm: Largest Euclidean norm of a problem's change in one iteration; None for no limit.
        curvature_eps: A pair of a step s and a gradient change y is skipped unless y.s is larger.

    Raises:
        UserError: The dtype or a setting is not allowed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 10,
        line_search_fn: LineSearch | None = None,
        max_step_norm: float | None = None,
        curvature_eps: float = 1e-10,
    ) -> None:
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "max_step_norm": max_step_norm,
            "curvature_eps": curvature_eps,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)
        if len(self.param_groups) != 1 or len(self.param_groups[0]["params"]) != 1:
            raise ValueError("BatchedLBFGS takes exactly one parameter, with a row per problem.")
        if self._param.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"BatchedLBFGS needs a parameter of torch.float32 or torch.float64, got {self._param.dtype}; convert "
                "it inside the closure."
            )
        if self._param.dim() == 0:
            raise ValueError("BatchedLBFGS needs a parameter of shape (P, ...), got a scalar.")

    needed: Tensor
    """The problems whose losses the running closure must compute, (P,) bool; the others may be any finite numbers."""

    @property
    def _param(self) -> Tensor:
        param: Tensor = self.param_groups[0]["params"][0]
        return param

    @torch.no_grad()
    def step(  # type: ignore[override]  # a closure is needed, and the losses are one per problem
        self, closure: Callable[[], Tensor], active: Tensor | None = None, new_function: bool = False
    ) -> Tensor:
        """Take up to max_iter iterations for every active problem.

        Args:
            closure: Returns the losses (P,) with their graph, and does not call backward.
            active: The problems to update, (P,) bool; None for all. The other rows and their state stay bit-equal.
            new_function: Whether the closure computes another function than in the last call, such as one with other
                noise. The last step is then not used as a curvature pair, since the gradients before and after it
                belong to two functions.

        Returns:
            The losses (P,) at the initial points, detached.
        """
        param, group = self._param, self.param_groups[0]
        if not len(param):
            return param.new_empty(0)
        now = self._start(closure, active)
        losses = now.here.loss
        if new_function:
            state = self._problem_state()
            state["move"] = choose_rows(full_mask(active, param), torch.zeros_like(state["move"]), state["move"])
        search = _FixedStep(now.here) if group["line_search_fn"] is None else StrongWolfe(now.here)
        try:
            self._run(now, search, closure)
        finally:  # the closure may raise at a trial point
            param.copy_(now.point.view_as(param))
        return losses

    def _run(self, now: _Progress, search: StrongWolfe | _FixedStep, closure: Callable[[], Tensor]) -> None:
        """Iterate until all problems have stopped."""
        starting, rounds = now.active, 0
        while True:
            self._begin(now, starting, search)
            trial = self._trial(now, search.t)
            if not bool(now.active.any()):
                return
            rounds += 1
            if isinstance(search, _FixedStep) and rounds == self.param_groups[0]["max_iter"]:
                self._step_problems(now, now.active, search.t)  # the last iteration; the next call evaluates its end
                return
            new = self._evaluate_trial(now, closure, trial, search.t)
            starting = self._accept(now, search.observe(now.active, new), search.result)

    def reset_history(self, mask: Tensor | None = None) -> None:
        """Clear the curvature of problems, such as after their parameters were set from outside.

        Args:
            mask: The problems, (P,) bool; None for all.
        """
        state = self.state.get(self._param)
        if not state:
            return
        mask = full_mask(mask, self._param)
        for tensor in state.values():
            tensor.masked_fill_(mask.view(-1, *[1] * (tensor.dim() - 1)), 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Args:
            state_dict: State of an optimizer for a parameter of the same shape.

        Raises:
            ValueError: The state belongs to a parameter of another shape.
        """
        for saved in state_dict["state"].values():
            if saved and saved["move"].shape != self._flat().shape:
                raise ValueError(
                    f"The saved state is for {tuple(saved['move'].shape)} problems and elements, but the parameter has "
                    f"{tuple(self._flat().shape)}."
                )
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("n_iter", "pairs"):  # loading converts all tensors to the parameter's dtype
                if name in state:
                    state[name] = state[name].long()

    def _flat(self) -> Tensor:
        """Return the parameter as (P, N)."""
        return self._param.detach().flatten(1) if self._param.dim() > 1 else self._param.detach().unsqueeze(1)

    def _problem_state(self) -> dict[str, Tensor]:
        """Return the state of the problems; see `new_state`."""
        state: dict[str, Tensor] = self.state[self._param]
        if not state:
            state.update(new_state(self._flat(), self.param_groups[0]["history_size"]))
        return state

    def _start(self, closure: Callable[[], Tensor], active: Tensor | None) -> _Progress:
        """Evaluate the initial points of a call, and undo the last step where the loss or gradient is not finite."""
        mask, state = full_mask(active, self._param), self._problem_state()
        self.needed = mask
        loss, grad = evaluate(closure, self._param)
        point = self._flat().clone(memory_format=torch.contiguous_format)
        sound = loss.isfinite() & grad.isfinite().all(dim=1)
        own_step = (state["n_iter"] > 0) & (state["point"] + state["move"] == point).all(dim=1)
        point = choose_rows(mask & ~sound & own_step, state["point"], point)
        state["point"] = choose_rows(mask & sound, point, state["point"])

        moving = mask & sound & (grad.abs().amax(dim=1) > self.param_groups[0]["tolerance_grad"])
        zeros, counts = torch.zeros_like(loss), torch.zeros_like(state["n_iter"])
        here = Trials(t=zeros, loss=loss, slope=zeros, grad=grad)
        now = _Progress(point, here, torch.zeros_like(grad), moving, n_iter=counts, n_eval=counts + 1)
        self._reject(now, mask & ~sound)
        return now

    def _begin(self, now: _Progress, starting: Tensor, search: StrongWolfe | _FixedStep) -> None:
        """Begin an iteration of some problems, (P,) bool: update the curvature and choose a direction."""
        if not bool(starting.any()):
            return
        group, state = self.param_groups[0], self._problem_state()
        grad = now.here.grad
        store_pairs(state, starting, grad - state["prev_grad"], state["move"], group["curvature_eps"])
        direction = newton_direction(state, grad)
        slope = dot(grad, direction)
        t = torch.full_like(slope, group["lr"])
        t = torch.where(state["n_iter"] == 0, (1 / grad.abs().sum(dim=1)).clamp(max=1) * t, t)
        t_max = torch.full_like(t, torch.inf)
        if group["max_step_norm"] is not None:
            t_max = group["max_step_norm"] / torch.linalg.vector_norm(direction, dim=1)
        lines = Lines(
            start=Trials(torch.zeros_like(t), now.here.loss, slope, grad),
            t=torch.minimum(t, t_max),
            t_max=t_max,
            size=direction.abs().amax(dim=1),
            budget=group["max_eval"] - now.n_eval,
        )
        state["prev_grad"] = choose_rows(starting, grad, state["prev_grad"])
        state["move"] = choose_rows(starting, torch.zeros_like(grad), state["move"])
        state["n_iter"] += starting
        now.n_iter = now.n_iter + starting
        now.direction = choose_rows(starting, direction, now.direction)
        now.active = now.active & ~(starting & (slope > -group["tolerance_change"]))
        search.begin(starting, lines)

    def _trial(self, now: _Progress, t: Tensor) -> Tensor:
        """Return the points to evaluate next, (P, N); stop problems whose point is not finite."""
        trial = now.point + t.unsqueeze(1) * now.direction
        self._reject(now, now.active & ~trial.isfinite().all(dim=1))
        return choose_rows(now.active, trial, now.point)

    def _evaluate_trial(self, now: _Progress, closure: Callable[[], Tensor], trial: Tensor, t: Tensor) -> Trials:
        """Evaluate the points (P, N) at step sizes t, (P,); stop problems whose loss or gradient is not finite."""
        self._param.copy_(trial.view_as(self._param))
        self.needed = now.active
        loss, grad = evaluate(closure, self._param)
        now.n_eval = now.n_eval + now.active
        self._reject(now, now.active & ~(loss.isfinite() & grad.isfinite().all(dim=1)))
        return Trials(t, loss, dot(grad, now.direction), grad)

    def _step_problems(self, now: _Progress, mask: Tensor, t: Tensor) -> Tensor:
        """Move the problems in a mask, (P,) bool, by t times their directions, and return all moves, (P, N)."""
        state = self._problem_state()
        move: Tensor = t.unsqueeze(1) * now.direction
        now.point = choose_rows(mask, now.point + move, now.point)
        state["move"] = choose_rows(mask, move, state["move"])
        return move

    def _accept(self, now: _Progress, ended: Tensor, found: Trials) -> Tensor:
        """Accept the steps of problems whose line search ended, (P,) bool; return those that begin a new iteration."""
        group, state = self.param_groups[0], self._problem_state()
        move = self._step_problems(now, ended, found.t)
        state["point"] = choose_rows(ended, now.point, state["point"])
        stop = (now.n_iter >= group["max_iter"]) | (now.n_eval >= group["max_eval"])
        stop |= found.grad.abs().amax(dim=1) <= group["tolerance_grad"]
        stop |= move.abs().amax(dim=1) <= group["tolerance_change"]
        stop |= (found.loss - now.here.loss).abs() < group["tolerance_change"]
        now.here = choose(ended, found, now.here)
        now.active = now.active & ~(ended & stop)
        return ended & now.active

    def _reject(self, now: _Progress, mask: Tensor) -> None:
        """Stop the problems in a mask, (P,) bool, at their last points, and clear their curvature."""
        if bool(mask.any()):
            now.active = now.active & ~mask
            self.reset_history(mask)


def full_mask(mask: Tensor | None, param: Tensor) -> Tensor:
    """Check a mask of the problems of a parameter (P, ...), (P,) bool, or return one of all problems."""
    if mask is None:
        return torch.ones(len(param), dtype=torch.bool, device=param.device)
    if mask.dtype != torch.bool or mask.shape != (len(param),):
        raise ValueError(
            f"A mask of problems must be bool of shape ({len(param)},), got {mask.dtype} of {tuple(mask.shape)}."
        )
    return mask.to(param.device)


def evaluate(closure: Callable[[], Tensor], param: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the losses (P,) and gradients (P, N) of a parameter (P, ...)."""
    param.grad = None
    with torch.enable_grad():
        loss = closure()
        if loss.shape != param.shape[:1]:
            raise ValueError(f"The closure must return one loss per problem, ({len(param)},), got {tuple(loss.shape)}.")
        loss.sum().backward()
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    return loss.detach().to(param.dtype, copy=True), grad.reshape(len(param), -1)


def _check_settings(options: dict[str, Any]) -> None:
    """Check the ranges of the settings."""
    lowest = {"max_iter": 1, "max_eval": 1, "history_size": 1, "lr": 0, "tolerance_grad": 0, "tolerance_change": 0}
    for name, low in {**lowest, "curvature_eps": 0}.items():
        if not options[name] >= low:
            raise UserError(f"{name} must be at least {low}, got {options[name]}.")
    if options["max_step_norm"] is not None and not options["max_step_norm"] > 0:
        raise UserError(f"max_step_norm must be above 0, or None for no limit, got {options['max_step_norm']}.")
    if options["line_search_fn"] not in (None, "strong_wolfe"):
        raise UserError(f"line_search_fn must be 'strong_wolfe' or None, got {options['line_search_fn']!r}.")
