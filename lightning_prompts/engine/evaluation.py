"""The steps of `validate`, `test` and `predict`, which divide the prompts of a run among the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.distributed import all_gather_object
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import noise_of
from lightning_prompts.terminal import say
from lightning_prompts.typed_module import TypedModule


class EvaluationSteps(TypedModule, pl.LightningModule, ABC):
    """Validate, test and generate images from the prompts of a run, one batch of records at a time.

    The ranks do not communicate until each has had its last batch. An error in a batch then ends all of them.

    Attributes:
        scores: The scores that `test` computes.
    """

    backbone: Backbone
    scores: Scores

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()
        self._validated: list[tuple[int, str, float, str]] = []  # index, key, loss and text of this rank's problems
        self._error: Exception | None = None  # the first in the batches of this rank

    @property
    def data(self) -> ProblemData:
        """Return the data module of the Trainer."""
        data: ProblemData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @abstractmethod
    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the losses (P,) by which the best prompts of P problems were chosen."""

    @abstractmethod
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score finished problems that have a prompt by the images that it generates.

        Args:
            problems: The records.
            scores: The scores to compute.
        """

    @abstractmethod
    def generate(self, texts: Sequence[str], noise: Tensor, negative: str | Sequence[str] = "") -> Tensor:
        """Generate images (B, 3, H, W) in [-1, 1] of B texts from noise (B, C, h, w)."""

    @abstractmethod
    def generate_best(self, problem: Problem, noise: Tensor, negative: str = "") -> Tensor:
        """Generate images (N, 3, H, W) in [-1, 1] of a problem's best prompt from noise (N, C, h, w)."""

    @abstractmethod
    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Recompute the validation losses of the best prompts of records."""
        with self._error_on_all_ranks():
            problems = self.data.unchanged(batch)
            losses = self.validation_losses(problems).tolist() if problems else []
            for problem, loss in zip(problems, losses, strict=True):
                text = f"{abs(loss):.5f}  {problem.target}  {problem.display_prompt}"
                self._validated.append((problem.index, problem.key, loss, text))
                self.evict(problem)

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Generate images of the best prompts of records, score them, and save the records."""
        with self._error_on_all_ranks():
            problems = self.data.unchanged(batch)
            if problems:
                with torch.autocast(self.device.type, enabled=False):  # as at the end of a search
                    self.final_evaluation(problems, self.scores)
            for problem in problems:
                self.data.folder.save(problem)
                self.evict(problem)

    def predict_step(self, batch: list[Problem | str], batch_idx: int) -> Tensor:
        """Generate images of records and prompts from the seeds of `predict_settings`.

        Returns:
            The images (B, S, 3, H, W) in [-1, 1] of B records or prompts and S seeds.
        """
        images = list[Tensor]()
        with self._error_on_all_ranks(), torch.autocast(self.device.type, enabled=False):
            images += [self._predict(prompt) for prompt in batch]
        side = self.backbone.image_size
        return torch.stack(images) if images else torch.empty(0, len(self.data.predict_settings.seeds), 3, side, side)

    def _predict(self, prompt: Problem | str) -> Tensor:
        """Generate images (S, 3, H, W) in [-1, 1] of a record or a prompt."""
        settings = self.data.predict_settings
        noise = noise_of(settings.seeds, self.backbone.latent_shape).to(self.device)
        if isinstance(prompt, Problem):
            return self.generate_best(prompt, noise, settings.negative)
        return self.generate([prompt] * len(noise), noise, settings.negative)

    @contextmanager
    def _error_on_all_ranks(self) -> Iterator[None]:
        """Keep an error of a batch for `_meet`, where all ranks raise it; a single rank raises it at once."""
        try:
            yield
        except (UserError, OSError) as error:
            if self.data.part[1] == 1:
                raise
            self._error = self._error or error

    def _meet(self) -> list[list[tuple[int, str, float, str]]]:
        """Wait for all ranks, and return the losses of each; raise the error of the first rank that has one."""
        own = self._error, self._validated
        self._error, self._validated = None, []
        ranks = all_gather_object(own) if self.data.part[1] > 1 else [own]
        for error, _ in ranks:
            if error:
                raise error
        return [validated for _, validated in ranks]

    def on_validation_epoch_end(self) -> None:
        """Print the losses of all ranks in the order of the inputs, and log their mean.

        Raises:
            UserError: There are no losses, or there was an error in a batch.
        """
        validated = sorted(entry for entries in self._meet() for entry in entries)
        if not validated and any(self.data.folder.with_prompt()):
            raise UserError(
                "No prompt of this run can be scored, since its images are missing or have changed; restore them."
            )
        if not validated:
            raise UserError("This run has no prompts yet; run `fit` first.")
        if self.trainer.is_global_zero:
            say(*(text for *_, text in validated))
        mean = sum(loss for _, _, loss, _ in validated) / len(validated)
        self.log("validation/loss", mean, batch_size=len(validated))

    def on_test_epoch_end(self) -> None:
        """Wait for all ranks, and raise an error in a batch of any."""
        self._meet()

    def on_predict_epoch_end(self) -> None:
        """Wait for all ranks, and raise an error in a batch of any."""
        self._meet()
