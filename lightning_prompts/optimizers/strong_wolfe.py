"""The line search for the strong Wolfe conditions, batched over independent problems.

Each problem first brackets a good step, then zooms into the bracket, in its own phase: each evaluation is one trial of
    every problem,
so no problem waits for another one's search.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_ARMIJO = 1e-4  # c1 of the sufficient decrease condition
_CURVATURE = 0.9  # c2 of the curvature condition
_SMALLEST = 1e-9  # bracket width times the direction's largest element, below which a search ends


@dataclass(frozen=True)
class Trials:
    """An evaluated point on the search line of each problem.

    Attributes:
        t: Step sizes, (P,); the point is `start + t * direction`.
        loss: Losses, (P,).
        slope: Derivatives along the direction, (P,).
        grad: Gradients, (P, N).
    """

    t: Tensor
    loss: Tensor
    slope: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Lines:
    """The initial values of each problem's line search.

    Attributes:
        start: Initial points, at t = 0.
        t: Initial step sizes, (P,).
        t_max: Largest step sizes allowed, (P,).
        size: Largest absolute elements of the directions, (P,).
        budget: Evaluations allowed after the first one, (P,) integers.
    """

    start: Trials
    t: Tensor
    t_max: Tensor
    size: Tensor
    budget: Tensor


def choose(mask: Tensor, yes: Trials, no: Trials) -> Trials:
    """Take the problems in a mask, (P,) bool, from `yes` and the others from `no`."""
    picked = {}
    for name in (field.name for field in fields(Trials)):
        a, b = getattr(yes, name), getattr(no, name)
        picked[name] = torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)
    return Trials(**picked)


def cubic_minimum(a: Trials, b: Trials, low: Tensor, high: Tensor) -> Tensor:
    """Minimize the cubic through two trials' losses and slopes within bounds; take their midpoint without a minimum.

    Args:
        a: Trials at one end.
        b: Trials at the other end.
        low: Lower bounds, (P,).
        high: Upper bounds, (P,).

    Returns:
        Step sizes, (P,), in [low, high].
    """
    swapped = a.t > b.t
    left_t, right_t = torch.where(swapped, b.t, a.t), torch.where(swapped, a.t, b.t)
    left_slope, right_slope = torch.where(swapped, b.slope, a.slope), torch.where(swapped, a.slope, b.slope)
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1**2 - a.slope * b.slope
    d2 = square.clamp(min=0).sqrt()
    t = right_t - (right_t - left_t) * ((right_slope + d2 - d1) / (right_slope - left_slope + 2 * d2))
    exists = (square >= 0) & ~t.isnan()  # ends that coincide make NaN
    return torch.where(exists, torch.minimum(torch.maximum(t, low), high), (low + high) / 2)


class StrongWolfe:
    """Line searches of P problems, with the steps of `torch.optim.LBFGS`.

    `begin` starts the searches of some problems, `t` holds the step sizes to evaluate next, and `observe` takes the
    results. The search of a problem ends at a step that satisfies the strong Wolfe conditions, or at the best end of
    its bracket when the bracket is too small or the budget is used up; one that still descends at its largest step size
    ends there.

    Attributes:
        t: Step sizes to evaluate next, (P,).
    """

    def __init__(self, here: Trials) -> None:
        """Prepare searches for trials with the shapes, dtype and device of `here`."""
        self.t = torch.zeros_like(here.t)
        self._start = self._first = self._second = here
        self._t_max = self._size = torch.zeros_like(here.t)
        self._budget = self._count = torch.zeros_like(here.t, dtype=torch.int64)
        # The bracket is between `first` and `second`; before there is one, `first` is the previous trial.
        self._zooming = torch.zeros_like(here.t, dtype=torch.bool)
        self._first_is_low = torch.ones_like(self._zooming)
        self._near_end = torch.zeros_like(self._zooming)  # whether the last trial was close to an end of the bracket

    @property
    def result(self) -> Trials:
        """The best end of each bracket: the result of a search that has ended."""
        return choose(self._first_is_low, self._first, self._second)

    def begin(self, mask: Tensor, lines: Lines) -> None:
        """Start the searches of the problems in a mask, (P,) bool; the others continue."""
        self._start = choose(mask, lines.start, self._start)
        self._first = choose(mask, lines.start, self._first)
        self.t = torch.where(mask, lines.t, self.t)
        self._t_max = torch.where(mask, lines.t_max, self._t_max)
        self._size = torch.where(mask, lines.size, self._size)
        self._budget = torch.where(mask, lines.budget, self._budget)
        self._count = self._count.masked_fill(mask, -1)  # the first evaluation does not count
        self._zooming = self._zooming & ~mask
        self._near_end = self._near_end & ~mask

    def observe(self, mask: Tensor, new: Trials) -> Tensor:
        """Process the evaluation at `t` and set the next `t`.

        Args:
            mask: The problems that are searching, (P,) bool; the others' values are ignored.
            new: The evaluation at `t`, finite where the mask is set.

        Returns:
            The problems whose search ended with this evaluation, (P,) bool.
        """
        self._count = self._count + mask
        spent = self._count >= self._budget
        searching, zooming = mask & ~self._zooming, mask & self._zooming
        ended = self._exhaust(searching & spent, new) | self._bracket(searching & ~spent, new)
        ended = ended | self._zoom(zooming, new) | (zooming & spent)
        zooming = mask & self._zooming & ~ended
        small = zooming & ((self._first.t - self._second.t).abs() * self._size < _SMALLEST)
        self._propose(zooming & ~small)
        return ended | small

    def _conditions(self, new: Trials) -> tuple[Tensor, Tensor]:
        """Return whether trials violate the decrease condition, and whether they meet the curvature condition."""
        short = new.loss > self._start.loss + _ARMIJO * new.t * self._start.slope
        return short, new.slope.abs() <= -_CURVATURE * self._start.slope

    def _exhaust(self, mask: Tensor, new: Trials) -> Tensor:
        """End searches without a bracket at the better of the start and the last trial."""
        self._first, self._second = choose(mask, self._start, self._first), choose(mask, new, self._second)
        self._first_is_low = torch.where(mask, self._start.loss <= new.loss, self._first_is_low)
        return mask

    def _bracket(self, mask: Tensor, new: Trials) -> Tensor:
        """Close the bracket at the new trials, end there, or extend the step; return which searches ended."""
        short, flat = self._conditions(new)
        climbed = short | ((self._count > 1) & (new.loss >= self._first.loss))
        closed = mask & (climbed | (~flat & (new.slope >= 0)))
        farther = mask & ~closed & ~flat & (new.t < self._t_max)
        ended = mask & ~closed & ~farther

        least = torch.minimum(new.t + 0.01 * (new.t - self._first.t), self._t_max)
        most = torch.minimum(new.t * 10, self._t_max)
        self.t = torch.where(farther, cubic_minimum(self._first, new, least, most), self.t)

        self._zooming = self._zooming | closed
        self._second = choose(closed, new, self._second)
        self._first_is_low = torch.where(closed, self._first.loss <= new.loss, self._first_is_low | ended)
        self._first = choose(farther | ended, new, self._first)
        return ended

    def _zoom(self, mask: Tensor, new: Trials) -> Tensor:
        """Replace an end of the brackets by the new trials; return which of these satisfy both conditions."""
        low = self.result
        high = choose(self._first_is_low, self._second, self._first)
        short, flat = self._conditions(new)
        worse = short | (new.loss >= low.loss)
        turned = ~worse & ~flat & (new.slope * (high.t - low.t) >= 0)

        high = choose(worse, new, choose(turned, low, high))
        low = choose(worse, low, new)
        first = choose(self._first_is_low, low, high)
        second = choose(self._first_is_low, high, low)
        self._first, self._second = choose(mask, first, self._first), choose(mask, second, self._second)
        self._first_is_low = torch.where(mask & worse, first.loss <= second.loss, self._first_is_low)
        return mask & ~worse & flat

    def _propose(self, mask: Tensor) -> None:
        """Set the next trials inside the brackets, away from an end that the last ones were close to as well."""
        low, high = torch.minimum(self._first.t, self._second.t), torch.maximum(self._first.t, self._second.t)
        t = cubic_minimum(self._first, self._second, low, high)
        margin = 0.1 * (high - low)
        near = torch.minimum(high - t, t - low) < margin
        push = near & (self._near_end | (t >= high) | (t <= low))
        inside = torch.where((t - high).abs() < (t - low).abs(), high - margin, low + margin)
        self.t = torch.where(mask, torch.where(push, inside, t), self.t)
        self._near_end = torch.where(mask, near & ~push, self._near_end)
