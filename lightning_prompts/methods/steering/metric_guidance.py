"""Metric-based optimization: manipulating embeddings of Stable Diffusion prompts (arXiv 2308.12059, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from lightning_prompts.embeddings import shift
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.methods.steering.parameters import PromptEmbeds
from lightning_prompts.objectives.base import Objective
from lightning_prompts.optimizers import AdamOnLion, build_optimizer, check_optimizer
from lightning_prompts.runs.record import Problem, SteeringResult
from lightning_prompts.setting_types import NotNegative, Positive
from lightning_prompts.unused import refuse_unused


class MetricGuidance(Steering):
    """Move an encoded prompt up the gradient of a metric of its images.

    The gradient goes through the decoder and the last denoiser calls.

    Args:
        objective: The metric to improve: one of `Sharpness`, `Blurriness`, `Aesthetic`, `ClipText`, `ClipQuality`,
            `Preference`, `Perceptual`, `LatentDistance`, or a list of them, whose weighted sum improves.
        constraint: Another metric, which must not get worse: embeddings that lower it below the user's prompt are not
            kept, and a problem is finished after `patience` such scorings.
        constraint_tolerance: By how much it may get worse.
        grad_steps: The last denoiser calls that propagate a gradient. None: all with few-step models, else 1 as in the
            paper.
        seeds_per_step: Images per step, taking turns; None for all `seeds`.
        optimizer: Optimizer of the embeddings; AdamOnLion is the paper's.
        shift_every: Steps after which the embeddings are shifted to their initial mean and standard deviation; 0 for
            never.
        **kwargs: See `Steering`.
    """

    prompt: PromptEmbeds

    def __init__(
        self,
        *,
        objective: Objective | list[Objective],
        constraint: Objective | None = None,
        constraint_tolerance: float = 0.0,
        grad_steps: Positive | None = None,
        seeds_per_step: Positive | None = None,
        optimizer: OptimizerCallable = lambda params: AdamOnLion(params, lr=0.01, eps=1e-3),
        shift_every: NotNegative = 0,
        **kwargs: Any,
    ) -> None:
        objectives = [objective] if isinstance(objective, Objective) else objective
        if not objectives:
            raise UserError("--model.objective must name at least one metric, such as Sharpness; got none.")
        check_optimizer(optimizer, dims=3)
        super().__init__(**kwargs)
        if seeds_per_step and seeds_per_step > self.seeds:
            raise UserError(
                f"--model.seeds_per_step must be at most --model.seeds, got {seeds_per_step} and {self.seeds}."
            )
        if constraint is None:
            refuse_unused(MetricGuidance, "without --model.constraint", {"constraint_tolerance": constraint_tolerance})
        self.objectives = torch.nn.ModuleDict()
        self.signs: dict[str, float] = {}  # weights, negative if lower is better
        for one in objectives:
            name = _free_name(one, self.signs)
            self.objectives[name], self.signs[name] = one, one.weight if one.higher_is_better else -one.weight
        self.constraint, self.constraint_name = constraint, _free_name(constraint, self.signs) if constraint else ""
        for one in (*objectives, *([constraint] if constraint else [])):
            one.attach(self.backbone, self.offline)
        self.higher_is_better = len(objectives) > 1 or objectives[0].higher_is_better
        self.constraint_tolerance, self.seeds_per_step = constraint_tolerance, seeds_per_step
        self.grad_steps = int(grad_steps or (self.sampler.calls if self.sampler.is_few_step else 1))
        self.optimizer, self.shift_every = optimizer, shift_every

    @property
    def identities(self) -> list[dict[str, Any]]:
        """The settings that are part of the keys of a prompt's problems, one dictionary per problem."""
        return [{**settings, "objectives": list(self.objectives)} for settings in super().identities]

    # --- the metric

    def values(self, images: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Compute the values (B,) of all objectives, the constraint included, of images (B, 3, H, W)."""
        prompts = [problem.target for problem in problems]
        values = {name: objective(images, prompts) for name, objective in self.objectives.items()}
        if self.constraint:
            with torch.no_grad():
                values[self.constraint_name] = self.constraint(images, prompts)
        return values

    def metric(self, values: dict[str, Tensor]) -> Tensor:
        """Return the value of a single objective, or the weighted sum of several, negative if lower is better."""
        if len(self.objectives) == 1:
            return values[next(iter(self.objectives))]
        return self._gain(values)

    def loss(self, values: dict[str, Tensor]) -> Tensor:
        """Return the negative weighted sum."""
        return -self._gain(values)

    def _gain(self, values: dict[str, Tensor]) -> Tensor:
        terms = [sign * values[name] for name, sign in self.signs.items()]
        return torch.stack(terms).sum(0)

    # --- the search

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take an optimizer step on the loss of this step's images."""
        problems = [self.batch[row].record for row in rows.tolist()]
        count = int(self.seeds_per_step or self.seeds)
        first = torch.tensor([batch.steps[row] for row in rows.tolist()]).unsqueeze(1) * count
        noise = self.noise[rows[:, None], (first + torch.arange(count)) % self.seeds]
        embeds = self.prompt(rows.to(self.device, non_blocking=True))
        losses, values = self.evaluate(embeds, noise, problems, self.grad_steps)
        self.batch.add_cost(rows, count * self.sampler.cost(grad_steps=self.grad_steps))
        self.step_active(losses.mean(1), rows)
        if self.shift_every:
            due = rows[[(batch.steps[row] + 1) % self.shift_every == 0 for row in rows.tolist()]]
            if len(due):
                on_device = due.to(self.device)
                initial = self.prompt.moving_rows(self.prompt.initial[on_device])
                self.batch.reset_rows(due, shift(self.prompt.rows.detach()[on_device], initial))
        self.log_step(batch, rows, loss=losses, **values)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, which treats each problem as if it were alone."""
        return build_optimizer(self.optimizer, self.prompt.rows)

    # --- the constraint

    def acceptable(self, problem: Problem, values: dict[str, list[float]]) -> bool:
        """Return whether the constraint is no worse than for the user's prompt, within the tolerance."""
        before = SteeringResult.of(problem).values_before
        if not self.constraint or not before:
            return True
        gain = fmean(values[self.constraint_name]) - fmean(before[self.constraint_name])
        return (gain if self.constraint.higher_is_better else -gain) >= -self.constraint_tolerance


def _free_name(objective: Objective, taken: dict[str, float]) -> str:
    """Return the name of an objective's class, with a number if it is taken."""
    name = type(objective).__name__
    return name if name not in taken else next(f"{name} {i}" for i in range(2, 100) if f"{name} {i}" not in taken)
