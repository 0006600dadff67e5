"""The data module of prompt inversion: target images, and the timesteps of each step."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import Fit, content_key, to_tensor
from lightning_prompts.data.targets import Target, find_targets
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.engine.target_dataset import (
    LoadedTarget,
    TargetDataset,
    read_ahead,
    stack,
    stamps_of,
)
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem, unreadable_key
from lightning_prompts.sampling import Microbatch
from lightning_prompts.sampling.seeding import draw_timesteps
from lightning_prompts.setting_types import Byte, NotNegative, Positive

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter

log = logging.getLogger(__name__)


class ImagesToPrompts(ProblemData):
    """Target images, one problem each, and the steps of their inversion.

    Args:
        images: Image files, folders, glob patterns, WebDataset shards, or CSV or JSONL lists of images.
        fit: Make images square by cropping their center or by padding.
        background: Color behind transparent pixels and of the padding: red, green, blue in 0..255.
        one_subject: Search one prompt for all images, which show one subject.
        num_noise_samples: Pairs N of noise and timestep per step and problem.
        timestep_range: Range [low, high) of the random timesteps.
        num_validation_samples: Pairs of noise and timestep on which prompts are scored.
        negative_images: Images whose denoising loss the prompts of all targets should make high; given as `images`.
        seed: Seed of every random draw.
        retry: Search only the failed problems again, and those that a checkpoint resumes.
        workers: Threads that read images ahead of the search; unused if all problems fit into one batch.
    """

    given = ("images", "--data.images")

    def __init__(
        self,
        images: str | list[str],
        fit: Fit = "crop",
        background: tuple[Byte, Byte, Byte] = (255, 255, 255),
        one_subject: bool = False,
        num_noise_samples: Positive = 4,
        timestep_range: tuple[int, int] = (500, 1000),
        num_validation_samples: Positive = 8,
        negative_images: str | list[str] | None = None,
        seed: int = 0,
        retry: bool = False,
        workers: NotNegative = 2,
    ) -> None:
        super().__init__(seed, retry)
        self.images = [images] if isinstance(images, str) else images
        self.negative_images = [negative_images] if isinstance(negative_images, str) else negative_images or []
        self.fit, self.one_subject = fit, one_subject
        red, green, blue = map(int, background)
        self.background: tuple[int, int, int] = (red, green, blue)
        self.num_noise_samples, self.timestep_range = num_noise_samples, timestep_range
        self.num_validation_samples, self.workers = num_validation_samples, workers
        self.targets: list[Target] = []
        self._images: dict[str, Tensor] = {}  # (I, 3, H, W) in 0..255 by key, of the problems in the batch
        self._latents: dict[str, Tensor] = {}
        self._negatives: list[Image.Image] = []
        self._negative_latents: Tensor | None = None
        self._recorded: dict[tuple[str, ...], str] = {}  # keys of earlier records by paths and stamps

    @property
    def method(self) -> Inverter:
        """The method that searches the prompts."""
        return cast("Inverter", super().method)

    def setup(self, stage: str) -> None:
        """Find the targets, and load the negative images."""
        self._check_schedule(self.method.backbone.num_train_timesteps)
        self._negatives, self._negative_latents = [], None
        for target in find_targets(self.negative_images) if self.negative_images else ():
            self._negatives += self._dataset().images(target)
        self._check_scoring("--data.negative_images", len(self._negatives))
        if stage == "fit":
            self.targets = self.same(lambda: find_targets(self.images, self.one_subject))
            largest = max(self.targets, key=lambda target: len(target.paths))
            self._check_scoring(largest.name, len(largest.paths))
            self._index_records()
            self.begin()

    def step(self) -> Step:
        """Return the next step, with timesteps (P, N) that depend on each problem's key and number of steps alone."""
        batch = self.method.batch
        keys, steps = [problem.key for problem in batch.records], batch.steps
        return Step(steps, draw_timesteps(self.seed, keys, steps, self.num_noise_samples, *self.timestep_range))

    def _check_schedule(self, end: int) -> None:
        low, high = self.timestep_range
        if not 0 <= low < high <= end:
            raise UserError(
                f"The timestep range [{low}, {high}) is empty or outside the model's schedule [0, {end}); "
                "give --data.timestep_range with 0 <= low < high."
            )

    def _check_scoring(self, name: str, images: int) -> None:
        if images > self.num_validation_samples:
            raise UserError(
                f"{name} has {images} images and a prompt is scored on {self.num_validation_samples} samples, so that "
                f"some images would not count; give --data.num_validation_samples {images} or more."
            )

    # --- problems

    def _index_records(self) -> None:
        """Index the records of earlier processes by files, and delete those of broken lines that are corrected now."""
        broken = {target.name for target in self.targets if target.error}
        for record in self.folder.records():
            if record.key == unreadable_key([record.target]) and record.target not in broken:
                self.folder.delete(record.key)
            else:
                self._recorded[(*record.paths, *record.stamps)] = record.key

    @property
    def total(self) -> int:
        """The number of targets."""
        return len(self.targets)

    def coming(self) -> Generator[Problem, None, None]:
        """Yield this rank's targets in order; those that an earlier process finished are not read again."""
        own = (index for index in range(self.total) if self.owns(index) and not self._finished(index))
        for loaded in self._load(own):
            problem = self._new_problem(loaded.index, loaded.key)
            failed_before = loaded.images is not None and self.folder.delete(unreadable_key(problem.paths))
            if self.wanted(problem, failed_before):
                if loaded.error:
                    problem.status, problem.reason = "failed", loaded.error
                elif loaded.images is not None:
                    self._images[problem.key] = loaded.images
                yield problem
            elif problem.target != (other := self.seen[problem.key]):
                log.warning("%s has the pixels of %s; they share one result.", problem.target, other)

    def find(self, records: Sequence[Problem]) -> None:
        """Set `index` of records to the place of their target; if files moved, read all targets without a record."""
        by_paths = {target.paths: index for index, target in enumerate(self.targets)}
        places = {record.key: by_paths.get(tuple(record.paths), -1) for record in records}
        moved = {key for key, index in places.items() if index < 0 or self._recorded_key(index) != key}
        if moved:
            unrecorded = (index for index in range(self.total) if self._recorded_key(index) is None)
            places |= {loaded.key: loaded.index for loaded in self._load(unrecorded) if loaded.key in moved}
        for record in records:
            record.index = -1
            if (index := places[record.key]) >= 0:
                record.move_to(self._new_problem(index, record.key))

    def _new_problem(self, index: int, key: str) -> Problem:
        """Return the problem of a target, without results."""
        target = self.targets[index]
        return Problem(key, target.name, list(target.paths), target.caption, index, stamps=stamps_of(target.paths))

    def _recorded_key(self, index: int) -> str | None:
        """Return the key of a target that has a record and whose files have not changed since; otherwise None."""
        target = self.targets[index]
        if target.error:
            return unreadable_key([target.name])
        return self._recorded.get((*target.paths, *stamps_of(target.paths)))

    def _finished(self, index: int) -> bool:
        """Return whether a target's record shows that it need not be read."""
        key = self._recorded_key(index)
        record = self.folder.read(key) if key else None
        if key is None or record is None or record.status == ("failed" if self.retry else "open"):
            return False  # also if it is new, since a record may have its pixels under other file names
        return not self.wanted(self._new_problem(index, key))

    # --- images

    def _dataset(self) -> TargetDataset:
        settings: dict[str, object] = {**self.model_identity, "template": self.method.template}
        if self._negatives:
            settings["negative"] = content_key(self._negatives, {})
        size = self.method.backbone.image_size
        return TargetDataset(self.targets, settings, (size, self.fit, self.background))

    def _load(self, indices: Iterator[int]) -> Iterator[LoadedTarget]:
        """Load targets, ahead of the search if they do not fit into one batch."""
        return read_ahead(self._dataset(), indices, int(self.workers) if self.total > self.method.batch_size else 0)

    def unchanged(self, problems: Sequence[Problem], warn: bool = True) -> list[Problem]:
        """Return the problems whose images are still those that were searched; they stay in memory until `evict`."""
        dataset = self._dataset()
        return [problem for problem in problems if problem.key in self._images or self._reload(problem, dataset, warn)]

    def _reload(self, problem: Problem, dataset: TargetDataset, warn: bool) -> bool:
        """Load a problem's images again; return whether they are those that were searched."""
        try:
            self._images[problem.key] = stack(dataset.images_as_searched(problem, self._paths(problem)))
        except UserError as error:
            if warn:
                log.warning("%s is left out, and its scores stay as they are: %s", problem.target, error)
            return False
        return True

    def target_images(self, problems: Sequence[Problem]) -> list[Tensor]:
        """Return the images (I, 3, H, W) in [-1, 1] of each problem."""
        return [self._images_of(problem).float() / 127.5 - 1 for problem in problems]

    def _images_of(self, problem: Problem) -> Tensor:
        if problem.key in self._images:
            return self._images[problem.key]
        return stack(self._dataset().images(Target(self._paths(problem), name=problem.target)))

    def _paths(self, problem: Problem) -> tuple[str, ...]:
        """Return a problem's files relative to the current folder, as the paths in the batch are."""
        in_batch = any(problem.key == record.key for record in self.method.batch.records)
        return tuple(problem.paths if in_batch else map(self.folder.saved.located, problem.paths))

    def latents(self, backbone: Backbone, problems: Sequence[Problem]) -> list[Tensor]:
        """Return the latents (I, C, h, w) of each problem's images; those of problems in the batch are encoded once."""
        return [self._latents_of(problem, backbone) for problem in problems]

    def _latents_of(self, problem: Problem, backbone: Backbone) -> Tensor:
        latents = self._latents.get(problem.key)
        if latents is None:
            latents = _encode(backbone, self.target_images([problem])[0])
            if any(problem.key == record.key for record in self.method.batch.records):
                self._latents[problem.key] = latents
        return latents

    def evict(self, problem: Problem) -> None:
        """Drop the images of a problem; see `ProblemData.evict`."""
        self._images.pop(problem.key, None)
        self._latents.pop(problem.key, None)

    def negative_latents(self, backbone: Backbone) -> Tensor | None:
        """Return the latents (I, C, h, w) of the negative images, encoded once; None if there are none."""
        if self._negative_latents is None and self._negatives:
            self._negative_latents = _encode(backbone, torch.stack([to_tensor(image) for image in self._negatives]))
        return self._negative_latents


def _encode(backbone: Backbone, images: Tensor, batch_size: int = 4) -> Tensor:
    """Encode images (I, 3, H, W) to latents (I, C, h, w) on the CPU, a few at a time to save memory."""

    def encode(rows: Tensor) -> Tensor:
        return backbone.encode_image(images[rows].to(backbone.device)).cpu()

    return Microbatch(batch_size).map(len(images), encode)
