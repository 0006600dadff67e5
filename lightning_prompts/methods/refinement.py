"""The base class of methods that start from a user's prompt and compare its images before and after."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.engine.method import PromptMethod
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.figures import before_and_after, to_png
from lightning_prompts.sampling.seeding import FINAL, FINAL_SEEDS, SEARCH

SHOWN = 12  # problems in the grid


class Refinement(PromptMethod):
    """Change a user's prompt, its negative prompt or their embeddings."""

    data_class = Prompts
    generates_images = True
    seeds: int  # images per prompt that the search uses

    @abstractmethod
    def images_before_and_after(self, problems: Sequence[Problem], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Generate images (P, N, 3, H, W) of the users' prompts and of the best results from noise (P, N, C, h, w)."""

    @abstractmethod
    def record_fresh_scores(self, problems: Sequence[Problem], before: Tensor, after: Tensor) -> None:
        """Score images (P, N, 3, H, W) of fresh seeds by the method's own measure, and add this to the records."""

    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return the images of the users' prompts above those of the best results, from the seeds of the search."""
        before, after = self.images_before_and_after(problems, self.draw_noise(problems, SEARCH, self.seeds))
        return before_and_after(before, after, [problem.display_prompt or problem.target for problem in problems])

    @torch.no_grad()
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score the best results on fresh seeds, also by the held-out CLIP."""
        before, after = self.images_before_and_after(problems, self.draw_noise(problems, FINAL, FINAL_SEEDS))
        scores.compare(self, problems, before, after)
        self.record_fresh_scores(problems, before, after)

    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the grid of images."""
        atomic_write(folder.grid, to_png(self.preview(problems[:SHOWN])))
