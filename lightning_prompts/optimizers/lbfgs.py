"""L-BFGS over the rows of one parameter, each row a problem of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_prompts.errors import UserError
from lightning_prompts.optimizers.curvature import choose_rows, dot, new_state, newton_direction, remember
from lightning_prompts.optimizers.strong_wolfe import Lines, StrongWolfe, Trials, choose

LineSearch = Literal["strong_wolfe"]


class _FixedStep:
    """A search that takes the first step size it is given; the counterpart of `StrongWolfe`."""

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
    """Where the problems stand within one call of `step`.

    Attributes:
        point: The points accepted so far, (P, N).
        here: Loss and gradient there, at t = 0 of the next search line.
        direction: Directions of the search lines, (P, N).
        going: The problems that still move, (P,) bool.
        n_iter: Iterations begun in this call, (P,).
        n_eval: Evaluations made in this call, (P,).
    """

    point: Tensor
    here: Trials
    direction: Tensor
    going: Tensor
    n_iter: Tensor
    n_eval: Tensor


class BatchedLBFGS(Optimizer):
    """L-BFGS over one parameter of shape (P, ...), where every row is an independent problem.

    Each problem has its own curvature, step sizes and stopping rules, and moves as `torch.optim.LBFGS` would move it
    alone. The problems do not wait for each other: one evaluation moves each of them one trial forward, so `step`
    evaluates the closure max_eval + 1 times at most, and rows that stopped earlier stay where they are.

    A row whose loss, gradient or next point is not finite takes back that step and forgets its curvature; it stops for
    this call of `step` and begins anew, down the gradient, in the next one. The parameter never holds NaN or infinity
    unless it did before.

    The state of each problem is 2 * history_size + 3 vectors as long as the problem, in the parameter's dtype, and a
    few numbers.

    Args:
        params: One parameter of shape (P, ...) in float32 or float64.
        lr: Step size that each iteration tries first; the very first one is scaled by min(1, 1 / |gradient|_1).
        max_iter: Largest number of iterations per call of `step`.
        max_eval: Largest number of evaluations per problem and call of `step`, which a line search may exceed by one;
            by default max_iter * 5 // 4.
        tolerance_grad: A problem stops when no element of its gradient is larger.
        tolerance_change: A problem stops when its loss or its largest element changes by less.
        history_size: Number of curvature pairs kept per problem. PyTorch's default is 100, which takes ten times the
            memory.
        line_search_fn: None takes steps of size lr, "strong_wolfe" searches for a good step size.
        max_step_norm: Largest Euclidean norm of the change of a problem in one iteration; None for no limit.
        curvature_eps: A pair of a step s and a change of gradient y is skipped unless y.s is larger.

    Raises:
        UserError: If the dtype or a number is not allowed.
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
        _check_options(defaults)
        super().__init__(params, defaults)
        if len(self.param_groups) != 1 or len(self.param_groups[0]["params"]) != 1:
            raise ValueError("BatchedLBFGS takes exactly one parameter, whose rows are the problems.")
        if self._param.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"The parameter is of {self._param.dtype}, but BatchedLBFGS needs torch.float32 or torch.float64; "
                "keep it in one of these and convert it inside the closure."
            )
        if self._param.dim() == 0:
            raise ValueError("BatchedLBFGS needs a parameter of shape (P, ...), but it has no axis.")

    needed: Tensor
    """While the closure runs: the problems whose losses are used, (P,) bool; of the others it may return anything finite."""

    @property
    def _param(self) -> Tensor:
        param: Tensor = self.param_groups[0]["params"][0]
        return param

    @torch.no_grad()
    def step(  # type: ignore[override]  # a closure is needed, and the losses are one per problem
        self, closure: Callable[[], Tensor], active: Tensor | None = None, new_function: bool = False
    ) -> Tensor:
        """Moves every active problem by up to max_iter iterations.

        Args:
            closure: Returns the loss of each problem, (P,), with its graph. It does not call backward; the gradient is
                set to None before each call and calculated after it.
            active: The problems that may move, (P,) bool; None for all. The other rows stay the same bit for bit, and
                so does their state.
            new_function: The closure is of another function than in the last call, such as one with other noise. The last
                move is then no curvature pair, because the gradients before and after it are of two functions.

        Returns:
            The losses at the points where the call began, (P,), detached.
        """
        param, group = self._param, self.param_groups[0]
        if not len(param):
            return param.new_empty(0)
        now = self._start(closure, active)
        losses = now.here.loss
        if new_function:
            state = self._problem_state()
            state["move"] = choose_rows(self._mask(active), torch.zeros_like(state["move"]), state["move"])
        search = _FixedStep(now.here) if group["line_search_fn"] is None else StrongWolfe(now.here)
        try:
            self._run(now, search, closure)
        finally:  # the closure may raise at a trial point
            param.copy_(now.point.view_as(param))
        return losses

    def _run(self, now: _Progress, search: StrongWolfe | _FixedStep, closure: Callable[[], Tensor]) -> None:
        """Moves the problems until all have stopped."""
        fresh, rounds = now.going, 0
        while True:
            self._begin(now, fresh, search)
            trial = self._trial(now, search.t)
            if not bool(now.going.any()):
                return
            rounds += 1
            if isinstance(search, _FixedStep) and rounds == self.param_groups[0]["max_iter"]:
                self._move(now, now.going, search.t)  # the last iteration of all; its end is evaluated by the next call
                return
            new = self._look(now, closure, trial, search.t)
            fresh = self._accept(now, search.observe(now.going, new), search.result)

    def reset_history(self, mask: Tensor | None = None) -> None:
        """Forgets the curvature of problems, as is right after something else has moved their points.

        Args:
            mask: The problems, (P,) bool; None for all.
        """
        state = self.state.get(self._param)
        if not state:
            return
        mask = self._mask(mask)
        for name, tensor in state.items():
            tensor.masked_fill_(mask.view(-1, *[1] * (tensor.dim() - 1)), 1 if name == "scale" else 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state_dict: The state of an optimizer of a parameter of the same shape.

        Raises:
            ValueError: If it belongs to a parameter of another shape.
        """
        for saved in state_dict["state"].values():
            if saved and saved["move"].shape != self._flat().shape:
                shapes = f"{tuple(saved['move'].shape)}, but the parameter's are {tuple(self._flat().shape)}"
                raise ValueError(f"The state's numbers of problems and of their elements are {shapes}.")
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("n_iter", "pairs"):  # loading converts all tensors to the parameter's dtype
                if name in state:
                    state[name] = state[name].long()

    def _flat(self) -> Tensor:
        """The parameter as (P, N)."""
        return self._param.detach().flatten(1) if self._param.dim() > 1 else self._param.detach().unsqueeze(1)

    def _mask(self, mask: Tensor | None) -> Tensor:
        """Checks a mask of problems, (P,) bool; all problems without one."""
        count = len(self._param)
        if mask is None:
            return torch.ones(count, dtype=torch.bool, device=self._param.device)
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(
                f"A mask of problems is bool of shape ({count},), not {mask.dtype} of {tuple(mask.shape)}."
            )
        return mask.to(self._param.device)

    def _problem_state(self) -> dict[str, Tensor]:
        """The state of the problems, see `new_state`."""
        state: dict[str, Tensor] = self.state[self._param]
        if not state:
            state.update(new_state(self._flat(), self.param_groups[0]["history_size"]))
        return state

    def _evaluate(self, closure: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Losses (P,) and gradients (P, N) at the parameter."""
        param = self._param
        param.grad = None
        with torch.enable_grad():
            loss = closure()
            if loss.shape != param.shape[:1]:
                raise ValueError(f"The closure returns one loss per problem, ({len(param)},), not {tuple(loss.shape)}.")
            loss.sum().backward()
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        return loss.detach().to(param.dtype, copy=True), grad.reshape(len(param), -1)

    def _start(self, closure: Callable[[], Tensor], active: Tensor | None) -> _Progress:
        """Evaluates the points that a call begins with; takes back a last step that turns out not to be finite."""
        mask, state = self._mask(active), self._problem_state()
        self.needed = mask
        loss, grad = self._evaluate(closure)
        point = self._flat().clone(memory_format=torch.contiguous_format)
        sound = loss.isfinite() & grad.isfinite().all(dim=1)
        own_step = (state["n_iter"] > 0) & (state["point"] + state["move"] == point).all(dim=1)
        point = choose_rows(mask & ~sound & own_step, state["point"], point)
        state["point"] = choose_rows(mask & sound, point, state["point"])

        going = mask & sound & (grad.abs().amax(dim=1) > self.param_groups[0]["tolerance_grad"])
        zeros, counts = torch.zeros_like(loss), torch.zeros_like(state["n_iter"])
        here = Trials(t=zeros, loss=loss, slope=zeros, grad=grad)
        now = _Progress(point, here, torch.zeros_like(grad), going, n_iter=counts, n_eval=counts + 1)
        self._reject(now, mask & ~sound)
        return now

    def _begin(self, now: _Progress, fresh: Tensor, search: StrongWolfe | _FixedStep) -> None:
        """Begins an iteration of some problems, (P,) bool: updates the curvature and sets off in a new direction."""
        if not bool(fresh.any()):
            return
        group, state = self.param_groups[0], self._problem_state()
        grad = now.here.grad
        remember(state, fresh, grad - state["prev_grad"], state["move"], group["curvature_eps"])
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
        state["prev_grad"] = choose_rows(fresh, grad, state["prev_grad"])
        state["move"] = choose_rows(fresh, torch.zeros_like(grad), state["move"])
        state["n_iter"] += fresh
        now.n_iter = now.n_iter + fresh
        now.direction = choose_rows(fresh, direction, now.direction)
        now.going = now.going & ~(fresh & (slope > -group["tolerance_change"]))
        search.begin(fresh, lines)

    def _trial(self, now: _Progress, t: Tensor) -> Tensor:
        """The points to evaluate next, (P, N); a problem whose point would not be finite is rejected."""
        trial = now.point + t.unsqueeze(1) * now.direction
        self._reject(now, now.going & ~trial.isfinite().all(dim=1))
        return choose_rows(now.going, trial, now.point)

    def _look(self, now: _Progress, closure: Callable[[], Tensor], trial: Tensor, t: Tensor) -> Trials:
        """Evaluates the points (P, N) that are at step sizes t, (P,); what is not finite is rejected."""
        self._param.copy_(trial.view_as(self._param))
        self.needed = now.going
        loss, grad = self._evaluate(closure)
        now.n_eval = now.n_eval + now.going
        self._reject(now, now.going & ~(loss.isfinite() & grad.isfinite().all(dim=1)))
        return Trials(t, loss, dot(grad, now.direction), grad)

    def _move(self, now: _Progress, mask: Tensor, t: Tensor) -> Tensor:
        """Moves the problems in a mask, (P,) bool, by t times their directions; returns all moves, (P, N)."""
        state = self._problem_state()
        move: Tensor = t.unsqueeze(1) * now.direction
        now.point = choose_rows(mask, now.point + move, now.point)
        state["move"] = choose_rows(mask, move, state["move"])
        return move

    def _accept(self, now: _Progress, ended: Tensor, found: Trials) -> Tensor:
        """Moves problems whose search ended, (P,) bool, and stops some; returns those that go on to a new iteration."""
        group, state = self.param_groups[0], self._problem_state()
        move = self._move(now, ended, found.t)
        state["point"] = choose_rows(ended, now.point, state["point"])
        stop = (now.n_iter >= group["max_iter"]) | (now.n_eval >= group["max_eval"])
        stop |= found.grad.abs().amax(dim=1) <= group["tolerance_grad"]
        stop |= move.abs().amax(dim=1) <= group["tolerance_change"]
        stop |= (found.loss - now.here.loss).abs() < group["tolerance_change"]
        now.here = choose(ended, found, now.here)
        now.going = now.going & ~(ended & stop)
        return ended & now.going

    def _reject(self, now: _Progress, mask: Tensor) -> None:
        """Stops the problems in a mask, (P,) bool, at their last points and clears their curvature."""
        if bool(mask.any()):
            now.going = now.going & ~mask
            self.reset_history(mask)


def _check_options(options: dict[str, Any]) -> None:
    """Refuses numbers outside their range."""
    lowest = {"max_iter": 1, "max_eval": 1, "history_size": 1, "lr": 0, "tolerance_grad": 0, "tolerance_change": 0}
    for name, low in {**lowest, "curvature_eps": 0}.items():
        if not options[name] >= low:
            raise UserError(f"{name} is {options[name]}, but it is at least {low}.")
    if options["max_step_norm"] is not None and not options["max_step_norm"] > 0:
        raise UserError(f"max_step_norm is {options['max_step_norm']}, but it is more than 0, or None for no limit.")
    if options["line_search_fn"] not in (None, "strong_wolfe"):
        raise UserError(f"line_search_fn is {options['line_search_fn']!r}; use 'strong_wolfe' or None.")
