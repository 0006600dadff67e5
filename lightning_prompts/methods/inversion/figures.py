"""The figures of an inversion: targets above regenerated images, and word maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lightning_prompts.callbacks.loggers import log_images
from lightning_prompts.methods.inversion.word_maps import word_map_figure
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.figures import grid, to_image, to_png
from lightning_prompts.sampling.seeding import REGENERATION

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter

REGENERATIONS = 4  # images per prompt in the final evaluation
SHOWN = 24  # problems in the grid and the word maps


def regenerate(method: Inverter, problems: Sequence[Problem], count: int) -> Tensor:
    """Generate images (P, count, 3, H, W) in [-1, 1] from the texts of P problems' best prompts."""
    noise = method.draw_noise(problems, REGENERATION, count)
    texts = [str(problem.prompt) for problem in problems for _ in range(count)]
    images = method.generate(texts, noise.flatten(0, 1))
    return images.view(len(problems), count, *images.shape[1:])


def target_grid(method: Inverter, problems: Sequence[Problem], images: Tensor) -> Image.Image:
    """Arrange the first image of each of P targets above N images (P, N, 3, H, W) of its prompt."""
    targets = [several[0] for several in method.data.target_images(problems)]
    return grid(targets, images, [str(problem.prompt) for problem in problems])


def regenerate_and_save(method: Inverter, problems: list[Problem]) -> Tensor:
    """Generate images (P, 4, 3, H, W) in [-1, 1] from P prompts, and save those of the grid."""
    generated = regenerate(method, problems, REGENERATIONS)
    for problem, images in zip(problems, generated, strict=True):
        if problem.index < SHOWN:
            method.data.folder.save_image(problem.key, to_png(to_image(torch.cat([*images], dim=2))))
    return generated


def write_figures(method: Inverter, problems: list[Problem], folder: RunFolder) -> None:
    """Write the grid and, for denoisers with cross-attention, the word maps; log both to TensorBoard."""
    generated = torch.stack([_images_of(method, problem) for problem in problems])
    atomic_write(folder.grid, to_png(target_grid(method, problems, generated)))
    words = word_map_figure(method, problems) if method.backbone.cross_attends else None
    if words:
        atomic_write(folder.words, to_png(words))
    log_images(method.trainer.loggers, "regenerations", [to_image(image) for image in generated.flatten(0, 1)])
    if words:
        log_images(method.trainer.loggers, "words", [words])


def _images_of(method: Inverter, problem: Problem) -> Tensor:
    """Return the images (4, 3, H, W) in [-1, 1] of a problem's prompt, from their file if there is one."""
    try:
        saved = pil_to_tensor(Image.open(method.data.folder.image_of(problem.key)))
    except OSError:  # not scored yet, or the file could not be written
        return regenerate(method, [problem], REGENERATIONS)[0]
    return torch.stack(saved.chunk(REGENERATIONS, dim=2)) / 127.5 - 1
