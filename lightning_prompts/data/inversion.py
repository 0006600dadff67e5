"""Targets, and when and how noisily each of them is looked at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.addresses import draw_timesteps
from lightning_prompts.data.images import Fit, Target, content_key, find_targets, load_image, to_tensor
from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.microbatch import Microbatch
from lightning_prompts.problems import Problem
from lightning_prompts.ranges import Positive

log = logging.getLogger(__name__)


class ImagesToPrompts(ProblemData):
    """Target pictures, one problem each, and the schedule of their inversion.

    Args:
        images: Pictures, folders, patterns, WebDataset shards (.tar), or CSV / JSONL lists of pictures.
        fit: Make pictures square by cropping their middle or by padding.
        background: What stands behind transparent pictures and in the padding, red, green, blue in 0..255.
        one_subject: All pictures show one subject and get one prompt.
        steps: Steps of the search.
        samples: N, noise/timestep pairs per step and problem.
        timesteps: Range [low, high) that timesteps are drawn from.
        validation_samples: Noise/timestep pairs that prompts are scored on.
        negative_images: Pictures to lead away from, whose denoising loss is to be high: as `images`, for all targets.
        seed: Addresses every random draw.
    """

    given = "pictures that are not among --data.images"

    def __init__(
        self,
        images: str | list[str],
        fit: Fit = "crop",
        background: tuple[int, int, int] = (255, 255, 255),
        one_subject: bool = False,
        steps: Positive = 20,
        samples: Positive = 4,
        timesteps: tuple[int, int] = (500, 1000),
        validation_samples: Positive = 8,
        negative_images: str | list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.images = [images] if isinstance(images, str) else images
        self.negative_images = [negative_images] if isinstance(negative_images, str) else negative_images or []
        self.fit, self.one_subject = fit, one_subject
        self.background: tuple[int, int, int] = background
        self.steps, self.samples, self.timesteps = steps, samples, timesteps
        self.validation_samples = validation_samples
        self._read: tuple[Path, str, str] | None = None  # run, model and template that the records are of
        self._latents: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._negatives: list[Image.Image] = []
        self._negative_latents: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Reads the pictures; what is done is skipped, and a file that cannot be read becomes a failed record."""
        self._check_schedule(self.method.backbone.num_train_timesteps)
        wanted = (self.folder.path, self.method.backbone.name, self.method.template)
        if self._read == wanted:
            return
        self._read, self.records, self.keys = None, {}, []
        self._negatives, self._negative_latents = [], None
        known = self.folder.load()
        for target in find_targets(self.negative_images) if self.negative_images else ():
            self._negatives += self._pictures(target)
        self._check_scoring("--data.negative_images", len(self._negatives))
        targets = find_targets(self.images, self.one_subject)
        for index, target in enumerate(targets):
            self._add(index, target, known, alone=len(targets) == 1)
        for key, problem in known.items():  # of a line that has been corrected, say
            if stage == "fit" and key not in self.records and key == content_key([], {"unreadable": [problem.target]}):
                self.folder.forget(key)
        if not any(problem.status != "failed" for problem in self.records.values()):
            raise UserError(
                f"None of the {len(targets)} pictures can be read: {next(iter(self.records.values())).reason}"
            )
        self._read = wanted

    def step(self, number: int) -> Step:
        """The timesteps of a step, each problem's from its own address."""
        keys = [problem.key for problem in self.method.problems]
        return Step(number, draw_timesteps(self.seed, keys, number, self.samples, *self.timesteps))

    def _check_schedule(self, end: int) -> None:
        low, high = self.timesteps
        if not 0 <= low < high <= end:
            raise UserError(
                f"The timestep range [{low}, {high}) is empty or outside the model's schedule [0, {end}); "
                "give --data.timesteps with 0 <= low < high."
            )

    def _check_scoring(self, name: str, pictures: int) -> None:
        if pictures > self.validation_samples:
            raise UserError(
                f"{name} has {pictures} pictures and a prompt is scored on {self.validation_samples} samples, so that some pictures "
                f"would not count; give --data.validation_samples {pictures} or more."
            )

    def _add(self, index: int, target: Target, known: dict[str, Problem], alone: bool) -> None:
        paths = list(target.paths)
        unreadable = content_key([], {"unreadable": [target.name] if target.error else paths})
        try:
            pictures = self._pictures(target)
        except UserError as error:
            if alone:
                raise
            failed = Problem(unreadable, target.name, paths, target.caption, index, "failed", str(error))
            self.records[unreadable] = failed
            self.keys.append(unreadable)
            return
        if unreadable in known:  # of an earlier try
            self.folder.forget(unreadable)
        self._check_scoring(target.name, len(pictures))
        settings = {"backbone": self.method.backbone.name, "template": self.method.template}
        if self._negatives:
            settings["negative"] = content_key(self._negatives, {})
        key = content_key(pictures, settings)
        here = Problem(key, target.name, paths, target.caption, index)
        problem = known.get(key, here)
        problem.move_to(here)
        if problem.status == "failed":
            problem.status, problem.reason = "open", None
        if key in self.records:
            log.warning("%s has the pixels of %s; they share one result.", target.name, self.records[key].target)
        self.records.setdefault(key, problem)
        self.keys.append(key)
        self._loaded[key] = torch.stack([to_tensor(picture) for picture in pictures])

    def _pictures(self, target: Target) -> list[Image.Image]:
        if target.error:
            raise UserError(target.error)
        return [self._load(path) for path in target.paths]

    def _load(self, path: str) -> Image.Image:
        return load_image(path, self.method.backbone.image_size, self.fit, self.background)

    def pictures(self, problems: Sequence[Problem]) -> list[Tensor]:
        """The pictures (I, 3, H, W) in [-1, 1] of each problem."""
        return [self._loaded[problem.key] for problem in problems]

    def latents(self, backbone: Backbone, problems: Sequence[Problem]) -> list[Tensor]:
        """The latents (I, C, h, w) of each problem's pictures, encoded once."""
        for problem in problems:
            if problem.key not in self._latents:
                self._latents[problem.key] = _encoded(backbone, self._loaded[problem.key])
        return [self._latents[problem.key] for problem in problems]

    def negative_latents(self, backbone: Backbone) -> Tensor | None:
        """Latents (I, C, h, w) of the pictures to lead away from, encoded once; None without any."""
        if self._negative_latents is None and self._negatives:
            self._negative_latents = _encoded(
                backbone, torch.stack([to_tensor(picture) for picture in self._negatives])
            )
        return self._negative_latents


def _encoded(backbone: Backbone, pictures: Tensor, batch: int = 4) -> Tensor:
    """Latents (I, C, h, w), on the CPU, of pictures (I, 3, H, W); the autoencoder takes much memory a picture."""

    def call(some: Tensor) -> Tensor:
        return backbone.encode_image(pictures[some].to(backbone.device)).cpu()

    return torch.cat(Microbatch(batch).over(len(pictures), call))
