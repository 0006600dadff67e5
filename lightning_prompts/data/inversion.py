"""Targets, and when and how noisily each of them is looked at."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import Fit, Target, content_key, find_targets, load_image, to_tensor
from lightning_prompts.data.shards import split_address
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem, unreadable_key
from lightning_prompts.sampling import Microbatch
from lightning_prompts.sampling.seeding import draw_timesteps
from lightning_prompts.setting_types import Byte, NotNegative, Positive

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter

log = logging.getLogger(__name__)

AHEAD = 2  # targets that each worker reads before they are needed


class ImagesToPrompts(ProblemData):
    """Target pictures, one problem each, and the schedule of their inversion.

    Args:
        images: Pictures, folders, patterns, or CSV / JSONL lists of pictures.
        fit: Make pictures square by cropping their middle or by padding.
        background: What stands behind transparent pictures and in the padding, red, green, blue in 0..255.
        one_subject: All pictures show one subject and get one prompt.
        steps: Steps of the search.
        samples: N, noise/timestep pairs per step and problem.
        timesteps: Range [low, high) that timesteps are drawn from.
        validation_samples: Noise/timestep pairs that prompts are scored on.
        negative_images: Pictures to lead away from, whose denoising loss is to be high: as `images`, for all targets.
        seed: Addresses every random draw.
        retry: Search those again that have failed, and of the others only what a checkpoint goes on with.
        workers: Threads that read images ahead of the search if there are more than are searched at a time; 0 for none.
    """

    given = ("pictures", "--data.images")

    def __init__(
        self,
        images: str | list[str],
        fit: Fit = "crop",
        background: tuple[Byte, Byte, Byte] = (255, 255, 255),
        one_subject: bool = False,
        steps: Positive = 20,
        samples: Positive = 4,
        timesteps: tuple[int, int] = (500, 1000),
        validation_samples: Positive = 8,
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
        self.steps, self.samples, self.timesteps = steps, samples, timesteps
        self.validation_samples, self.workers = validation_samples, workers
        self.targets: list[Target] = []
        self._pictures: dict[str, Tensor] = {}  # (I, 3, H, W) in 0..255, of the wave's problems by key
        self._latents: dict[str, Tensor] = {}
        self._negatives: list[Image.Image] = []
        self._negative_latents: Tensor | None = None
        self._known: dict[tuple[str, ...], str] = {}  # keys by files and their stamps
        self._changed: set[str] = set()  # keys of problems whose images are not those that were searched

    @property
    def method(self) -> Inverter:
        """The method in training."""
        return cast("Inverter", super().method)

    def setup(self, stage: str) -> None:
        """Finds the pictures, and reads those to lead away from."""
        self._check_schedule(self.method.backbone.num_train_timesteps)
        self._negatives, self._negative_latents = [], None
        for target in find_targets(self.negative_images) if self.negative_images else ():
            self._negatives += self._reading().images(target)
        self._check_scoring("--data.negative_images", len(self._negatives))
        if stage == "fit":
            self.targets = self.same(lambda: find_targets(self.images, self.one_subject))
            most = max(self.targets, key=lambda target: len(target.paths))
            self._check_scoring(most.name, len(most.paths))
            self._remember()
            self.begin()

    def step(self) -> Step:
        """The timesteps of the wave's next step, each problem's from its own address."""
        batch = self.method.batch
        keys, steps = [problem.key for problem in batch.records], batch.steps
        return Step(steps, draw_timesteps(self.seed, keys, steps, self.samples, *self.timesteps))

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

    # --- which problems there are

    def _remember(self) -> None:
        """Makes known what earlier processes have read, and forgets what was wrong with lines that have been corrected."""
        wrong = {target.name for target in self.targets if target.error}
        for record in self.folder.records():
            if record.key == unreadable_key([record.target]) and record.target not in wrong:
                self.folder.forget(record.key)
            else:
                self._known[(*record.paths, *record.stamps)] = record.key

    @property
    def total(self) -> int:
        """As many as there are targets."""
        return len(self.targets)

    def coming(self) -> Generator[Problem, None, None]:
        """See `ProblemData.coming`; what an earlier process has finished is not read again."""
        own = (place for place in range(self.total) if self.owns(place) and not self._finished(place))
        for read in self._read(own):
            problem = self._here(read.place, read.key)
            failed = read.pictures is not None and self.folder.forget(
                unreadable_key(problem.paths)
            )  # in an earlier try
            if self.wanted(problem, failed):
                if read.error:
                    problem.status, problem.reason = "failed", read.error
                elif read.pictures is not None:
                    self._pictures[problem.key] = read.pictures
                yield problem
            elif self.targets[read.place].name != self.seen[read.key]:
                log.warning(
                    "%s has the pixels of %s; they share one result.",
                    self.targets[read.place].name,
                    self.seen[read.key],
                )

    def find(self, records: Sequence[Problem]) -> None:
        """See `ProblemData.find`; where files have moved, all that are not known have to be read."""
        given = {target.paths: place for place, target in enumerate(self.targets)}
        places = {problem.key: given.get(tuple(problem.paths), -1) for problem in records}
        moved = {key for key, place in places.items() if place < 0 or self._key_of(place) != key}
        if moved:
            unknown = (place for place in range(self.total) if self._key_of(place) is None)
            places |= {read.key: read.place for read in self._read(unknown) if read.key in moved}
        for problem in records:
            place = places[problem.key]
            problem.index = -1
            if place >= 0:
                problem.move_to(self._here(place, problem.key))

    def _here(self, place: int, key: str) -> Problem:
        """The problem at a place, as new."""
        target = self.targets[place]
        return Problem(key, target.name, list(target.paths), target.caption, place, stamps=stamps_of(target.paths))

    def _key_of(self, place: int) -> str | None:
        """The key of a target of which there is a record, if its files are still the same."""
        target = self.targets[place]
        return (
            unreadable_key([target.name])
            if target.error
            else self._known.get((*target.paths, *stamps_of(target.paths)))
        )

    def _finished(self, place: int) -> bool:
        """Whether a target need not be read; what has to be known of it is taken from its record."""
        key = self._key_of(place)
        record = self.folder.read(key) if key else None
        if key is None or record is None or record.status == ("failed" if self.retry else "open"):
            return False  # also if it is new: its files may be known under other names
        return not self.wanted(self._here(place, key))

    # --- reading

    def _reading(self) -> Reading:
        settings: dict[str, object] = {**self.model_identity, "template": self.method.template}
        if self._negatives:
            settings["negative"] = content_key(self._negatives, {})
        size = self.method.backbone.image_size
        return Reading(self.targets, settings, (size, self.fit, self.background))

    def _read(self, places: Iterator[int]) -> Iterator[Read]:
        """Read targets in order, ahead of the search if there are more than it searches at a time.

        Threads and not the processes of a DataLoader, since a process that is forked beside other threads may never end.
        """
        reading = self._reading()
        workers = int(self.workers) if self.total > self.method.together else 0
        if not workers:
            yield from map(reading.__getitem__, places)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        try:
            coming: deque[Future[Read]] = deque()
            for place in places:
                coming.append(pool.submit(reading.__getitem__, place))
                if len(coming) > AHEAD * workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def unchanged(self, problems: Sequence[Problem]) -> list[Problem]:
        """See `ProblemData.unchanged`; the images that are returned stay in memory until `release`."""
        reading = self._reading()
        return [problem for problem in problems if problem.key in self._pictures or self._load(problem, reading)]

    def _load(self, problem: Problem, reading: Reading) -> bool:
        """Read a problem's images again; return whether they are those that were searched."""
        try:
            self._pictures[problem.key] = stacked(reading.images_as_searched(problem, self._paths(problem)))
        except UserError as error:
            if problem.key not in self._changed:
                log.warning("%s is left out, and its scores stay as they are: %s", problem.target, error)
            self._changed.add(problem.key)
            return False
        return True

    def pictures(self, problems: Sequence[Problem]) -> list[Tensor]:
        """The pictures (I, 3, H, W) in [-1, 1] of each problem."""
        return [self._pictures_of(problem).float() / 127.5 - 1 for problem in problems]

    def _pictures_of(self, problem: Problem) -> Tensor:
        if problem.key in self._pictures:
            return self._pictures[problem.key]
        return stacked(self._reading().images(Target(self._paths(problem), name=problem.target)))

    def _paths(self, problem: Problem) -> tuple[str, ...]:
        """A problem's files as they are from here: those of the wave are what was given now, others were perhaps elsewhere."""
        searched = any(problem.key == one.key for one in self.method.batch.records)
        return tuple(problem.paths if searched else map(self.folder.located, problem.paths))

    def latents(self, backbone: Backbone, problems: Sequence[Problem]) -> list[Tensor]:
        """The latents (I, C, h, w) of each problem's pictures; of those that are searched they are encoded once."""
        return [self._latents_of(problem, backbone) for problem in problems]

    def _latents_of(self, problem: Problem, backbone: Backbone) -> Tensor:
        latents = self._latents.get(problem.key)
        if latents is None:
            latents = _encoded(backbone, self.pictures([problem])[0])
            if any(problem.key == searched.key for searched in self.method.batch.records):
                self._latents[problem.key] = latents
        return latents

    def evict(self, problem: Problem) -> None:
        """See `ProblemData.release`."""
        self._pictures.pop(problem.key, None)
        self._latents.pop(problem.key, None)

    def negative_latents(self, backbone: Backbone) -> Tensor | None:
        """Latents (I, C, h, w) of the pictures to lead away from, encoded once; None without any."""
        if self._negative_latents is None and self._negatives:
            self._negative_latents = _encoded(
                backbone, torch.stack([to_tensor(picture) for picture in self._negatives])
            )
        return self._negative_latents


class Read(NamedTuple):
    """A target that was read: its place, its key, and its pictures (I, 3, H, W) in 0..255 or why there are none."""

    place: int
    key: str
    pictures: Tensor | None
    error: str | None


class Reading:
    """Read targets, in any thread.

    Args:
        targets: Which.
        settings: What else makes a key.
        how: Size, fit and background, see `load_image`.
    """

    def __init__(
        self, targets: list[Target], settings: dict[str, object], how: tuple[int, Fit, tuple[int, int, int]]
    ) -> None:
        self.targets, self.settings, self.how = targets, settings, how

    def __getitem__(self, place: int) -> Read:
        target = self.targets[place]
        try:
            pictures = self.images(target)
        except UserError as error:
            return Read(place, unreadable_key([target.name] if target.error else target.paths), None, str(error))
        return Read(place, content_key(pictures, self.settings), stacked(pictures), None)

    def images(self, target: Target) -> list[Image.Image]:
        """The pictures of a target as the model sees them; a UserError if one cannot be read."""
        if target.error:
            raise UserError(target.error)
        return [load_image(path, *self.how) for path in target.paths]

    def images_as_searched(self, problem: Problem, paths: Sequence[str]) -> list[Image.Image]:
        """Read the images of a problem again.

        Args:
            problem: The record.
            paths: Its files as they are from here.

        Raises:
            UserError: An image cannot be read, or is another one than was searched.
        """
        images = self.images(Target(tuple(paths), name=problem.target))
        # The key has the pixels' hash; a file that was only copied has the same.
        if stamps_of(paths) != problem.stamps and content_key(images, self.settings) != problem.key:
            raise UserError(f"{', '.join(paths)} has changed since the search; restore it, or search it in a new run.")
        return images


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (I, 3, H, W) in 0..255."""
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).contiguous()


def stamps_of(paths: Sequence[str]) -> list[str]:
    """What tells a file that has changed from one that has not, without reading it: its size and its time."""
    return [f"{found.st_size}-{found.st_mtime_ns}" for path in paths if (found := _stat(path))]


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except NotADirectoryError:  # an address in a shard
        address = split_address(Path(path))
        return os.stat(address[0]) if address else None
    except OSError:
        return None


def _encoded(backbone: Backbone, pictures: Tensor, batch: int = 4) -> Tensor:
    """Latents (I, C, h, w), on the CPU, of pictures (I, 3, H, W); the autoencoder takes much memory a picture."""

    def call(some: Tensor) -> Tensor:
        return backbone.encode_image(pictures[some].to(backbone.device)).cpu()

    return Microbatch(batch).map(len(pictures), call)
