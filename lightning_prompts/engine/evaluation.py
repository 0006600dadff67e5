"""What `validate`, `test` and `predict` compute from the prompts of a run, which they divide among the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.distributed import all_gather_object
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import noise_of
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.method import PromptMethod


class Validated(NamedTuple):
    """The validation loss of a problem, recomputed; sorted, they are in the order of the inputs."""

    place: int
    key: str
    loss: float
    line: str


class Evaluation:
    """Validate, test and generate from the prompts of a run, one batch of records at a time.

    The ranks do not communicate until each has had its last batch. An error in a batch then ends all of them.

    Args:
        method: The method.

    Attributes:
        scores: The scores that `test` computes.
    """

    def __init__(self, method: PromptMethod) -> None:
        self.method, self.scores = method, Scores()
        self._validated: list[Validated] = []  # by this rank
        self._error: Exception | None = None  # the first in the batches of this rank

    def validate(self, batch: Sequence[Problem]) -> None:
        """Recompute the validation losses of the best prompts of records."""
        with self._error_on_all_ranks():
            problems = self.method.data.unchanged(batch)
            losses = self.method.validation_losses(problems).tolist() if problems else []
            for problem, loss in zip(problems, losses, strict=True):
                line = f"{abs(loss):.5f}  {problem.target}  {problem.display_prompt}"
                self._validated.append(Validated(problem.index, problem.key, loss, line))
                self.method.evict(problem)

    def print_losses(self) -> list[float]:
        """Print the losses of all ranks in the order of the inputs, and return them.

        Raises:
            UserError: The run has no prompt, or none whose inputs are still those that were searched.
        """
        validated = sorted(self.meet())
        if not validated and any(self.method.data.folder.with_prompt()):
            raise UserError(
                "No prompt of this run can be scored, since its images are missing or have changed; restore them."
            )
        if not validated:
            raise UserError("This run has no prompts yet; run `fit` first.")
        if self.method.trainer.is_global_zero:
            say(*(each.line for each in validated))
        return [each.loss for each in validated]

    def test(self, batch: Sequence[Problem]) -> None:
        """Generate images of the best prompts of records, score them, and save the records."""
        method = self.method
        with self._error_on_all_ranks():
            problems = method.data.unchanged(batch)
            if problems:
                with torch.autocast(method.device.type, enabled=False):  # as at the end of a search
                    method.final_evaluation(problems, self.scores)
            for problem in problems:
                method.data.folder.save(problem)
                method.evict(problem)

    def predict(self, batch: Sequence[Problem | str]) -> Tensor:
        """Generate images (B, S, 3, H, W) in [-1, 1] of B records or texts from the S seeds of `predict_settings`."""
        images = list[Tensor]()
        with self._error_on_all_ranks(), torch.autocast(self.method.device.type, enabled=False):
            images += [self._generate(prompt) for prompt in batch]
        side, seeds = self.method.backbone.image_size, self.method.data.predict_settings.seeds
        return torch.stack(images) if images else torch.empty(0, len(seeds), 3, side, side)

    def _generate(self, prompt: Problem | str) -> Tensor:
        """Generate images (S, 3, H, W) in [-1, 1] of a record or a text."""
        method, settings = self.method, self.method.data.predict_settings
        noise = noise_of(settings.seeds, method.backbone.latent_shape).to(method.device)
        if isinstance(prompt, Problem):
            return method.generate_best(prompt, noise, settings.negative)
        return method.generate([prompt] * len(noise), noise, settings.negative)

    @contextmanager
    def _error_on_all_ranks(self) -> Iterator[None]:
        """Keep an error of a batch for `meet`, where all ranks raise it; a single rank raises it at once."""
        try:
            yield
        except (UserError, OSError) as error:
            if self.method.data.part[1] == 1:
                raise
            self._error = self._error or error

    def meet(self) -> list[Validated]:
        """Wait for all ranks, and return the losses of all; raise the error of the first rank that has one."""
        own = self._error, self._validated
        self._error, self._validated = None, []
        ranks = all_gather_object(own) if self.method.data.part[1] > 1 else [own]
        for error, _ in ranks:
            if error:
                raise error
        return [each for _, validated in ranks for each in validated]
