"""Read targets, ahead of the search."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.data.images import Fit, content_key, load_image
from lightning_prompts.data.shards import split_address
from lightning_prompts.data.targets import Target
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem, unreadable_key

AHEAD = 2  # targets that each thread reads before they are needed


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A target that was read.

    Attributes:
        index: The target's place among the inputs.
        key: The key of its problem.
        images: Its images (I, 3, H, W) in 0..255; None if one cannot be read.
        error: Why there are no images, in one sentence; None if there are.
    """

    index: int
    key: str
    images: Tensor | None
    error: str | None


class TargetDataset:
    """Targets by their index.

    Args:
        targets: The targets.
        settings: The settings that are part of each key.
        load_args: Size, fit and background, see `load_image`.
    """

    def __init__(
        self, targets: list[Target], settings: dict[str, object], load_args: tuple[int, Fit, tuple[int, int, int]]
    ) -> None:
        self.targets, self.settings, self.load_args = targets, settings, load_args

    def __getitem__(self, index: int) -> LoadedTarget:
        target = self.targets[index]
        try:
            images = self.images(target)
        except UserError as error:
            key = unreadable_key([target.name] if target.error else target.paths)
            return LoadedTarget(index, key, None, str(error))
        return LoadedTarget(index, content_key(images, self.settings), stack(images), None)

    def images(self, target: Target) -> list[Image.Image]:
        """Load a target's images at the model's size.

        Raises:
            UserError: The target has an error, or an image cannot be read.
        """
        if target.error:
            raise UserError(target.error)
        return [load_image(path, *self.load_args) for path in target.paths]

    def images_as_searched(self, problem: Problem, paths: Sequence[str]) -> list[Image.Image]:
        """Load the images of a problem again.

        Args:
            problem: The record.
            paths: Its files, relative to the current folder.

        Raises:
            UserError: An image cannot be read, or has changed since the search.
        """
        images = self.images(Target(tuple(paths), name=problem.target))
        # The key contains the hash of the pixels, so a file that was only copied is accepted.
        if stamps_of(paths) != problem.stamps and content_key(images, self.settings) != problem.key:
            raise UserError(f"{', '.join(paths)} has changed since the search; restore it, or search it in a new run.")
        return images


def stack(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size to (I, 3, H, W) in 0..255."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).contiguous()


def stamps_of(paths: Sequence[str]) -> list[str]:
    """Return the size and modification time of each file, which tell whether it has changed without reading it."""
    return [f"{stat.st_size}-{stat.st_mtime_ns}" for path in paths if (stat := _stat(path))]


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except NotADirectoryError:  # an address in a shard
        address = split_address(Path(path))
        return os.stat(address[0]) if address else None
    except OSError:
        return None


def read_ahead(dataset: TargetDataset, indices: Iterator[int], workers: int) -> Iterator[LoadedTarget]:
    """Read targets in order, ahead of the search in threads.

    Not in the processes of a DataLoader: a process that is forked beside other threads may never end, nor would the
    search.

    Args:
        dataset: The targets.
        indices: Which targets to read.
        workers: The number of threads; 0 to read each target when it is needed.
    """
    if not workers:
        yield from map(dataset.__getitem__, indices)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    pending: deque[Future[LoadedTarget]] = deque()
    try:
        for index in indices:
            pending.append(pool.submit(dataset.__getitem__, index))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
