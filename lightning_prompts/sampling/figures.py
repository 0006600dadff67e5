"""Arrange images in grids with captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw
from torch import Tensor

from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import REGENERATION, draw_noise

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


def regenerate(method: PromptMethod, problems: Sequence[Problem], count: int) -> Tensor:
    """Pictures (P, count, 3, H, W) in [-1, 1] drawn from the text of P problems' prompts."""
    keys = [problem.key for problem in problems]
    noise = draw_noise(method.data.seed, keys, REGENERATION, count, method.backbone.latent_shape, method.device)
    texts = [str(problem.prompt) for problem in problems for _ in range(count)]
    drawn: Tensor = method.draw(texts, noise.flatten(0, 1))
    return drawn.view(len(problems), count, *drawn.shape[1:])


def grid(targets: Sequence[Tensor], drawn: Tensor, problems: Sequence[Problem], side: int = 96) -> Image.Image:
    """Targets above their regenerations, prompts below.

    Args:
        targets: P pictures (3, H, W) in [-1, 1].
        drawn: N regenerations of each, (P, N, 3, H, W) in [-1, 1].
        problems: P records.
        side: Pixels of a picture in the grid.
    """
    columns = [(target, *pictures) for target, pictures in zip(targets, drawn, strict=True)]
    return sheet(columns, [str(problem.prompt) for problem in problems], len(columns), side)


def before_and_after(before: Tensor, after: Tensor, texts: Sequence[str]) -> Image.Image:
    """Pictures (P, N, 3, H, W) above others (P, N, 3, H, W) from the same seeds; P texts, each below the first of its pictures."""
    problems, count = before.shape[:2]
    columns = [(before[p, n], after[p, n]) for p in range(problems) for n in range(count)]
    return sheet(columns, [text if n == 0 else "" for text in texts for n in range(count)], 4 * count)


def sheet(
    columns: Sequence[Tensor | Sequence[Tensor]], texts: Sequence[str], across: int, side: int = 96
) -> Image.Image:
    """Columns of pictures with a text below each.

    Args:
        columns: P columns of pictures (3, H, W) in [-1, 1].
        texts: What stands below each.
        across: Columns beside each other; the next ones come below.
        side: Pixels of a picture.
    """
    width, line = side + 8, 12
    wrapped = [textwrap.wrap(text, width // 6) for text in texts]
    rows = [range(first, min(first + across, len(columns))) for first in range(0, len(columns), across)]
    tops = [max(len(columns[i]) for i in row) * (side + 4) + 8 for row in rows]
    heights = [top + line * max(len(wrapped[i]) for i in row) for row, top in zip(rows, tops, strict=True)]
    canvas = Image.new("RGB", (min(across, len(columns)) * width, sum(heights)), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for row, top, height in zip(rows, tops, heights, strict=True):
        for x, i in enumerate(row):
            for place, picture in enumerate(columns[i]):
                shown = to_image(picture).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(shown, (x * width + 4, y + place * (side + 4) + (6 if place else 2)))
            for number, text in enumerate(wrapped[i]):
                pen.text((x * width + 4, y + top + number * line), text, fill="black")
        y += height
    return canvas


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] in 8 bits."""
    return Image.fromarray(((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def to_png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
