"""The denoiser calls before the gradient, for each gradient step of DPO-Diff (arXiv 2407.01606, section 3.3)."""

from __future__ import annotations

import re

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.sampling.seeding import generator


def plan_steps(schedule: str | None, calls: int, grad_steps: int, share: float, seed: int) -> list[int]:
    """Plan the gradient steps of a search.

    Args:
        schedule: A schedule, see `calls_before_gradient`; None for `linear_plan`.
        calls: Denoiser calls of the sampler.
        grad_steps: Denoiser calls that propagate a gradient, which cost twice.
        share: Generations that the steps may cost together; a generation is `calls` calls.
        seed: Seed of random schedules.

    Returns:
        The denoiser calls before the gradient, for each step that the share pays for.

    Raises:
        UserError: The schedule is unknown, or exceeds the sampler's calls.
    """
    if schedule is None:
        return linear_plan(calls, grad_steps, share)
    plan, spent = list[int](), 0.0
    while share:
        before = calls_before_gradient(schedule, len(plan), generator(seed, "schedule", len(plan), 0))
        if before + grad_steps > calls:
            raise UserError(
                f"The schedule {schedule!r} goes beyond the sampler's {calls} calls; change --model.schedule or "
                "--model.sampler.num_inference_steps."
            )
        spent += (before + 2 * grad_steps) / calls
        if spent > share + 1e-6:
            break
        plan.append(before)
    return plan


def calls_before_gradient(schedule: str, step: int, draw: torch.Generator) -> int:
    """Return the denoiser calls before the gradient at a step.

    Args:
        schedule: `step-a-b`, `rand-a-b` with a < b, or `fix-a`.
        step: Index of the step.
        draw: Generator for `rand-a-b`.

    Raises:
        UserError: The schedule is none of these.
    """
    match = re.fullmatch(r"(step|rand|fix)-(\d+)(?:-(\d+))?", schedule)
    kind, first, second = match.groups() if match else ("", "0", None)
    if kind == "fix" and second is None:
        return int(first)
    if kind == "step" and second and int(second) > 0:
        return int(first) + step // int(second)
    if kind == "rand" and second and int(first) < int(second):
        return int(torch.randint(int(first), int(second), (), generator=draw))
    raise UserError(f"--model.schedule must be like step-15-2, rand-15-25 or fix-20, got {schedule!r}.")


def linear_plan(calls: int, grad_steps: int, share: float) -> list[int]:
    """Plan the denoiser calls before the gradient: linearly from 30% to 50% of a sampler's calls.

    Args:
        calls: Calls of the sampler.
        grad_steps: Denoiser calls that propagate a gradient, which cost twice.
        share: Generations that the steps may cost together; a generation is `calls` calls.

    Returns:
        floor(calls * (0.3 + 0.2 * i / n)) for each of the n steps that the share pays for.

    Raises:
        UserError: The calls with a gradient exceed the sampler's.
    """
    plan: list[int] = []
    while True:
        count = len(plan) + 1
        longer = [calls * (3 * count + 2 * i) // (10 * count) for i in range(count)]
        if sum(before + 2 * grad_steps for before in longer) > (share + 1e-6) * calls:
            break
        plan = longer
    if plan and plan[-1] + grad_steps > calls:
        raise UserError(
            f"--model.grad_steps {grad_steps} after {plan[-1]} calls without a gradient exceeds the sampler's {calls} "
            "calls; lower it, or give --model.schedule fix-0."
        )
    return plan
