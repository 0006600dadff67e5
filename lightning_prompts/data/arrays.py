"""Convert NumPy arrays and tensors to images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_prompts.data.images import MIN_SIDE
from lightning_prompts.errors import UserError

TOLERANCE = 1e-3  # by which floats may exceed [0, 1], as after resizing


def array_to_image(array: np.ndarray[Any, Any] | Tensor, name: str) -> Image.Image:
    """Convert an array or a tensor to an image.

    Integers are from 0 to 255, floats from 0 to 1, booleans black and white. The dimension of size 1 to 4, first or
    last, holds the
    channels: gray, gray and alpha, RGB, or RGBA; the sides of an image are longer.

    Args:
        array: Shape (H, W), (H, W, C) or (C, H, W), on any device.
        name: The name in error messages.

    Raises:
        UserError: The shape, the type or the values are not as above.
    """
    values = _values(array, name)
    shape = tuple(values.shape)
    if values.ndim == 4:
        raise UserError(f"{name} has the shape {shape}, which is a batch; give list(batch) for its images.")
    if values.ndim == 3 and shape[-1] > 4:
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3) or (values.ndim == 3 and not 1 <= values.shape[-1] <= 4):
        raise UserError(f"{name} has the shape {shape}; give (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels.")
    if min(values.shape[:2]) < MIN_SIDE:
        raise UserError(f"{name} has the shape {shape}; give an image of at least {MIN_SIDE} pixels on each side.")
    pixels = _to_bytes(values, name)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def _values(array: np.ndarray[Any, Any] | Tensor, name: str) -> np.ndarray[Any, Any]:
    """Return a NumPy array of booleans, integers or floats."""
    kind = str(array.dtype)
    if isinstance(array, Tensor):
        try:
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
        except (RuntimeError, NotImplementedError, TypeError) as error:  # a sparse tensor, or one on the meta device
            raise UserError(f"{name} is a tensor that NumPy cannot read; give a dense one, on the CPU.") from error
    if array.dtype.kind not in "buif":
        raise UserError(f"{name} has values of type {kind}; give integers from 0 to 255 or floats from 0 to 1.")
    return array


def _to_bytes(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Convert values to bytes from 0 to 255."""
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min().item(), values.max().item()
    if kind == "f" and not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} has values that are infinite or not a number; give floats from 0 to 1.")
    given = f"{name} has {'floats' if kind == 'f' else 'integers'} from {low:.6g} to {high:.6g}"
    if kind != "f":
        if low < 0 or high > 255:
            raise UserError(f"{given}; give integers from 0 to 255, or floats from 0 to 1.")
        return values.astype(np.uint8)
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        conversion = "(values + 1) / 2" if low < 0 else "values / 255, if they are from 0 to 255"
        raise UserError(f"{given}; give floats from 0 to 1, such as {conversion}.")
    scaled: np.ndarray[Any, Any] = (values.astype(np.float64).clip(0, 1) * 255).round().astype(np.uint8)
    return scaled
