"""Recompute the losses by which the best prompts of a run were chosen."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from lightning_prompts.errors import UserError
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.method import PromptMethod


def recompute_losses(method: PromptMethod) -> list[float]:
    """Recompute and print the losses of all best prompts of a run whose inputs have not changed.

    Raises:
        UserError: The run has no prompt, or none whose inputs are still those that were searched.
    """
    losses, with_prompt = list[float](), 0
    records = method.data.folder.with_prompt()
    while problems := list(islice(records, method.batch_size)):
        with_prompt += len(problems)
        if unchanged := method.data.unchanged(problems):
            values = method.validation_losses(unchanged).tolist()
            losses += values
            if method.trainer.is_global_zero:
                for problem, loss in zip(unchanged, values, strict=True):
                    say(f"{abs(loss):.5f}  {problem.target}  {problem.display_prompt}")
    if not with_prompt:
        raise UserError("This run has no prompts yet; run `fit` first.")
    if not losses:
        raise UserError(
            "No prompt of this run can be scored, since its images are missing or have changed; restore them."
        )
    return losses
