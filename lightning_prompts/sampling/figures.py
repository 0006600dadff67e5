"""Arrange images in grids with captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor


def grid(targets: Sequence[Tensor], images: Tensor, texts: Sequence[str], side: int = 96) -> Image.Image:
    """Arrange a column per target: the target, its regenerations, and the prompt.

    Args:
        targets: P images (3, H, W) in [-1, 1].
        images: N regenerations of each, (P, N, 3, H, W) in [-1, 1].
        texts: P prompts.
        side: Side length of an image in pixels.
    """
    columns = [(target, *regenerated) for target, regenerated in zip(targets, images, strict=True)]
    return sheet(columns, texts, len(columns), side)


def before_and_after(before: Tensor, after: Tensor, texts: Sequence[str]) -> Image.Image:
    """Arrange images (P, N, 3, H, W) above others of the same seeds, with P captions below the first of each."""
    problems, count = before.shape[:2]
    columns = [(before[p, n], after[p, n]) for p in range(problems) for n in range(count)]
    return sheet(columns, [text if n == 0 else "" for text in texts for n in range(count)], 4 * count)


def sheet(
    columns: Sequence[Tensor | Sequence[Tensor]], texts: Sequence[str], across: int, side: int = 96
) -> Image.Image:
    """Arrange columns of images with a caption below each.

    Args:
        columns: P columns of images (3, H, W) in [-1, 1].
        texts: P captions.
        across: Columns per row of the sheet.
        side: Side length of an image in pixels.
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
            for place, image in enumerate(columns[i]):
                shown = to_image(image).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(shown, (x * width + 4, y + place * (side + 4) + (6 if place else 2)))
            for number, text in enumerate(wrapped[i]):
                pen.text((x * width + 4, y + top + number * line), text, fill="black")
        y += height
    return canvas


def to_image(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to an 8-bit PIL image."""
    return Image.fromarray(((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def to_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
