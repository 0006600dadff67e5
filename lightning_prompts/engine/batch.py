"""The batch of problems that are searched together, with a row for each in all of its tensors and lists."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prompts.runs.record import Problem


@dataclass
class Row:
    """One problem of the batch.

    Attributes:
        record: The problem's record.
        steps: Steps taken.
        stale: Evaluations since the prompt last improved.
        halvings: Number of times that its step size was halved.
        active: Whether it is still searched; a finished one keeps its row until the batch is refilled.
        best: The best encoded prompt (S, R, D) of methods whose records do not hold it.
    """

    record: Problem
    steps: int = 0
    stale: int = 0
    halvings: int = 0
    active: bool = True
    best: Tensor | None = None

    @property
    def step_scale(self) -> float:
        """Share of the optimizer's step that is taken."""
        return 0.5**self.halvings


class Refill(NamedTuple):
    """The changes of a refill.

    Attributes:
        added: Records of the problems that joined.
        evicted: Records of the finished problems that left.
    """

    added: list[Problem]
    evicted: list[Problem]


class Batch:
    """Up to `size` problems, each a row of the parameter, of the optimizer's state, and of `rows`.

    Args:
        prompt: Holds the parameter, which is the only one that requires a gradient.
        size: The most problems that are searched together.
    """

    def __init__(self, prompt: nn.Module, size: int) -> None:
        self.prompt, self.size = prompt, size
        self.optimizers: Sequence[Optimizer] = ()
        self.rows: list[Row] = []
        self.skipped = torch.empty(0, dtype=torch.long)  # (P,) steps without a finite gradient since an evaluation
        self.finished: list[Problem] = []  # records that are not saved yet
        self.exhausted = False  # whether no problem is left to search
        self._counted = time.perf_counter()  # when the last step was counted, or the rows changed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        return self.rows[row]

    @property
    def parameter(self) -> nn.Parameter:
        """The trainable parameter (P, ...)."""
        (parameter,) = (value for value in self.prompt.parameters() if value.requires_grad)
        return parameter

    @property
    def records(self) -> list[Problem]:
        """The record of each row."""
        return [row.record for row in self.rows]

    @property
    def steps(self) -> list[int]:
        """The number of steps of each row."""
        return [row.steps for row in self.rows]

    def active_rows(self) -> Tensor:
        """Return the rows (Q,) that are still searched."""
        return self.where(lambda row: row.active)

    def where(self, condition: Callable[[Row], bool]) -> Tensor:
        """Return the rows (Q,) that meet a condition."""
        return torch.tensor([i for i, row in enumerate(self.rows) if condition(row)], dtype=torch.long)

    # --- refill and evict

    def refill(
        self,
        arrivals: Iterator[Problem],
        set_rows: Callable[[list[Problem]], None],
        init_params: Callable[[Tensor], Tensor],
    ) -> Refill:
        """Evict finished problems and add new ones, up to `size`.

        Args:
            arrivals: Problems to add; one that has failed goes to `finished` at once.
            set_rows: Prepares the method for the records of all rows.
            init_params: Returns initial parameters (Q, ...) for rows (Q,).
        """
        kept, added = self.active_rows(), list[Problem]()
        while len(kept) + len(added) < self.size and (problem := next(arrivals, None)):
            (self.finished if problem.status == "failed" else added).append(problem)
        self.exhausted = not len(kept) + len(added)
        evicted = [row.record for row in self.rows if not row.active]
        if self.exhausted or not (evicted or added):
            return Refill([], [])
        self._replace(kept, [Row(problem) for problem in added], set_rows, init_params)
        return Refill(added, evicted)

    def _replace(
        self,
        kept: Tensor,
        added: list[Row],
        set_rows: Callable[[list[Problem]], None],
        init_params: Callable[[Tensor], Tensor],
    ) -> None:
        """Keep the rows `kept` (Q,), with their parameters and optimizer state, and append others."""
        on_device = kept.to(self.parameter.device)
        before, states = self.parameter.data[on_device], self._optimizer_rows()
        self.rows = [*(self.rows[row] for row in kept.tolist()), *added]
        self._counted = time.perf_counter()
        set_rows(self.records)
        skipped = self.skipped.to(self.parameter.device)
        self.skipped = torch.cat([skipped[on_device], skipped.new_zeros(len(added))])
        joined = torch.arange(len(kept), len(self.rows))
        first = init_params(joined)
        self.parameter.grad = None
        self.parameter.data = torch.cat([fit_shape(before, first.shape[1:]), first])
        for state, name, value in states:
            shape = first.shape[1:] if value.shape[1:] == before.shape[1:] else value.shape[1:]
            old = fit_shape(value[kept.to(value.device)], shape)
            state[name] = torch.cat([old, value.new_zeros(len(added), *shape)])
        self.clear_optimizer_rows(joined)

    def finish(self, row: int) -> None:
        """Set the final status of a problem, which leaves the batch at the next refill."""
        self.rows[row].active = False
        self.rows[row].record.finish()
        self.finished.append(self.rows[row].record)

    # --- step

    def count_step(self, rows: Tensor) -> None:
        """Count a step of `rows` (Q,), and divide the time since the one before among their records."""
        elapsed, self._counted = time.perf_counter() - self._counted, time.perf_counter()
        for row in rows.tolist():
            self.rows[row].steps += 1
            self.rows[row].record.seconds += elapsed / len(rows)

    def add_cost(self, rows: Tensor, samples: int) -> None:
        """Add denoiser samples to the counters of `rows` (Q,); a backward pass counts as one."""
        for row in rows.tolist():
            self.rows[row].record.unet_samples += samples

    def step(
        self,
        take_step: Callable[[], object],
        loss: Tensor,
        rows: Tensor,
        backward: Callable[[Tensor], None],
        clip: float | None = None,
    ) -> None:
        """Step the optimizer on the losses (Q,) of `rows` (Q,); the other rows keep their parameters.

        A row whose gradient is not finite keeps them too, and `skipped` counts the step.

        Args:
            take_step: Updates the parameter, such as `optimizer.step`.
            loss: Losses (Q,).
            rows: Rows (Q,).
            backward: Computes the gradient of the sum of the losses.
            clip: Largest magnitude of a gradient's element.
        """
        parameter = self.parameter
        before = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        if loss.requires_grad:  # it does not where slots are left empty in all problems
            backward(loss.sum())
        gradient = parameter.grad
        finite = gradient.isfinite().flatten(1).all(1)
        gradient.masked_fill_(~finite.view(-1, *(1,) * (parameter.dim() - 1)), 0)
        if clip is not None:
            gradient.clamp_(-clip, clip)
        take_step()
        share = torch.zeros(len(parameter))  # of the step that is taken
        share[rows] = torch.tensor([self.rows[row].step_scale for row in rows.tolist()])
        self.skipped += ~finite
        share = share.to(parameter.device, non_blocking=True).to(parameter)
        share = share.where(finite, 0).view(-1, *(1,) * (parameter.dim() - 1))
        with torch.no_grad():  # momentum and weight decay move rows without a gradient too
            parameter.copy_(torch.where(share > 0, torch.lerp(before, parameter, share), before))

    def offer(
        self,
        row: int,
        prompt: str,
        loss: float,
        token_ids: list[int] | None = None,
        embedding: list[list[float]] | None = None,
        acceptable: bool = True,
    ) -> bool:
        """Count one more evaluation of a row, and keep its prompt if the loss is the lowest so far.

        Returns:
            Whether the prompt is kept.
        """
        improves = acceptable and self.rows[row].record.offer(prompt, loss, token_ids, embedding)
        self.rows[row].stale = 0 if improves else self.rows[row].stale + 1
        return improves

    @torch.no_grad()
    def reset_rows(self, rows: Tensor, values: Tensor) -> None:
        """Set the parameters (Q, ...) of `rows` (Q,) and clear their optimizer state, which is that of other values."""
        self.parameter[rows.to(self.parameter.device, non_blocking=True)] = values.to(self.parameter)
        self.clear_optimizer_rows(rows)

    def clear_optimizer_rows(self, rows: Tensor) -> None:
        """Clear the optimizer state of `rows` (Q,)."""
        for _, _, value in self._optimizer_rows():
            value[rows.to(value.device)] = 0

    def _optimizer_rows(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Return each tensor of the optimizer state that has a row per problem, with its dictionary and its name."""
        return [
            (state, name, value)
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.dim()
        ]

    # --- checkpoints

    def save(self) -> dict[str, list[Any]]:
        """Return the rows for a checkpoint, a list per field."""
        return {
            "records": [asdict(row.record) for row in self.rows],
            "active": [row.active for row in self.rows],
            "steps": self.steps,
            "stale": [row.stale for row in self.rows],
            "halvings": [row.halvings for row in self.rows],
            "skipped": self.skipped.tolist(),
            "best": [row.best for row in self.rows],
        }

    def load(self, saved: Mapping[str, list[Any]]) -> None:
        """Restore the rows that `save` returned; the parameters and the optimizer state are restored by Lightning."""
        names = ("steps", "stale", "halvings", "active", "best")
        values = zip(*(saved[name] for name in names), strict=True)
        records = (Problem(**record) for record in saved["records"])
        self.rows = [
            Row(record, **dict(zip(names, some, strict=True))) for record, some in zip(records, values, strict=True)
        ]
        self._counted = time.perf_counter()
        for row in self.rows:
            row.best = None if row.best is None else row.best.to(self.parameter.device)
        self.skipped = torch.tensor(saved["skipped"], dtype=torch.long, device=self.parameter.device)


def fit_shape(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return rows (Q, ...) in another shape (Q, *shape): each axis is cut, or padded with zeros, at its end."""
    if rows.shape[1:] == torch.Size(shape):
        return rows
    new = rows.new_zeros(len(rows), *shape)
    common = tuple(slice(min(*sizes)) for sizes in zip(rows.shape, new.shape, strict=True))
    new[common] = rows[common]
    return new


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows (Q_i, ...) of several shapes to (Q, ...), padded with zeros to the largest."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    return torch.cat([fit_shape(part, shape) for part in parts])


def merge(checkpoints: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Merge the batches of several ranks' checkpoints; keep the row with the most steps of each problem.

    Args:
        checkpoints: What the ranks saved; all else is taken from the first one.
        wanted: Returns whether the problem of a record continues here.
    """
    most: dict[str, tuple[int, int, int]] = {}  # steps, checkpoint and row by key
    for number, checkpoint in enumerate(checkpoints):
        batch = checkpoint["batch"]
        for row, record in enumerate(batch["records"]):
            here = (batch["steps"][row], number, row)
            if batch["active"][row] and wanted(record) and most.get(record["key"], here) <= here:
                most[record["key"]] = here
    kept: list[list[int]] = [[] for _ in checkpoints]
    for _, number, row in sorted(most.values(), key=lambda place: place[1:]):
        kept[number].append(row)
    rows = [torch.tensor(some, dtype=torch.long) for some in kept]
    merged = dict(checkpoints[0])
    merged["batch"] = {
        name: [part["batch"][name][row] for part, some in zip(checkpoints, kept, strict=True) for row in some]
        if isinstance(values, list)
        else values
        for name, values in merged["batch"].items()
    }
    merged["state_dict"] = _merge_tensors([part["state_dict"] for part in checkpoints], rows)
    states = [part["optimizer_states"] for part in checkpoints]
    for place, first in enumerate(merged["optimizer_states"]):
        if not first:  # the method has no optimizer
            continue
        several = [state[place]["state"] for state in states]
        named = {key: _merge_tensors([some[key] for some in several], rows) for key in several[0] if all(several)}
        merged["optimizer_states"] = [*merged["optimizer_states"]]
        merged["optimizer_states"][place] = {**first, "state": named}
    return merged


def _merge_tensors(parts: Sequence[dict[str, Any]], rows: Sequence[Tensor]) -> dict[str, Any]:
    """Concatenate the kept rows of each tensor that has a row per problem; take all else from the first part."""
    return {
        name: concatenate([part[name][some] for part, some in zip(parts, rows, strict=True)])
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in parts[0].items()
    }
