"""Images given to a Python call, as files that the data modules read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_prompts.data.arrays import array_to_image
from lightning_prompts.data.images import DECODING_ERRORS, MIN_SIDE, load_image
from lightning_prompts.data.targets import find_targets
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.python_values import plain, shown

ImageInput: TypeAlias = Image.Image | np.ndarray[Any, Any] | Tensor | str | Path
"""An image: a PIL image, an array, a tensor, or a file.

Arrays and tensors have the shape (H, W), (H, W, C) or (C, H, W), with whole numbers from 0 to 255 or floats from 0 to
1.
"""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_TIFF_MODES = ("CMYK", "LAB", "I", "F")  # which PNG does not have
_ALPHA_MODES = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # conversions of the other modes with alpha


def image_file(image: Any, name: str, folder: Path) -> str:
    """Return the file of an image, which is written if the image is in memory.

    Args:
        image: An `ImageInput`.
        name: Name of the argument in messages.
        folder: Folder to write to.

    Raises:
        UserError: The image cannot be used, or its file does not exist.
    """
    if isinstance(image, np.ndarray | Tensor):
        image = array_to_image(image, name)
    if isinstance(image, Image.Image):
        return _write(image, name, folder)
    if not isinstance(image, str | Path):
        raise UserError(
            f"{name} cannot be {shown(image)}; give a PIL image, a NumPy array, a tensor, or the name of a file, or a "
            "list of these."
        )
    file: str = plain(name, image)
    if not file.strip():
        raise UserError(f"{name} cannot be {file!r}; give the name of a file.")
    is_list = file.lower().endswith((".csv", ".jsonl"))
    if is_list or [target.paths for target in find_targets([file])] != [(str(Path(file)),)]:
        raise UserError(f"{name} must be an image or its file, got {file!r}; give the images in it as a list.")
    return os.path.abspath(file)  # a file given by two names is searched once


def negative_image_files(images: Any, folder: Path) -> str | list[str]:
    """Return the files of negative images, see `image_file`; texts, such as folders, stay as they are."""
    each = list(images) if isinstance(images, list | tuple) else [images]
    return [
        str(image) if isinstance(image, str | Path) else image_file(image, f"negative_images[{i}]", folder)
        for i, image in enumerate(each)
    ]


def _write(image: Image.Image, name: str, folder: Path) -> str:
    """Write an image in memory without loss, with its orientation."""
    suffix = "tiff" if image.mode in _TIFF_MODES else "png"
    file = folder / f"{name.replace('[', '-').rstrip(']')}.{suffix}"
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise UserError(f"{name} has {width} x {height} pixels; give an image of at least {MIN_SIDE} on each side.")
    try:
        known = image.mode in (*_PNG_MODES, *_TIFF_MODES)
        saved = image if known else image.convert(_ALPHA_MODES.get(image.mode, "RGB"))
        saved.save(file, exif=image.getexif())  # which has the orientation
        load_image(file, MIN_SIDE)
    except UserError as error:
        raise UserError(str(error).replace(f"'{file}'", name)) from error
    except DECODING_ERRORS as error:
        raise UserError(
            f"{name} is an image that cannot be read ({first_sentence(error).rstrip('.')}); open it again."
        ) from error
    return str(file)
