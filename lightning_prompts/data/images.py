"""Read image files as RGB squares, turn them into tensors, and hash their pixels."""

import contextlib
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lightning_prompts.data.shards import read_member, split_address
from lightning_prompts.errors import UserError

Fit = Literal["crop", "pad"]
MIN_SIDE = 8
DECODING_ERRORS = (  # what Pillow's decoders raise on damaged files
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # none that runs another program, as EPS does
_FORMAT_NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"


def load_image(
    path: str | Path,
    size: int,
    fit: Fit = "crop",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 50_000_000,
    max_bytes: int = 100_000_000,
) -> Image.Image:
    """Load an image of any common format and mode as an RGB square; of an animation, the first frame.

    Args:
        path: The image file, or its address in a WebDataset shard, such as `shards/000.tar/0001.jpg`.
        size: Side of the result in pixels, at least 1.
        fit: "crop" cuts a centered square, "pad" fills up to a square with the background.
        background: Color behind transparent pixels and around a padded image, each number in [0, 255].
        max_pixels: The largest width times height; an image whose header claims more is not decoded.
        max_bytes: The largest file size.

    Returns:
        An RGB image of size x size.

    Raises:
        UserError: The file cannot be read as an image, or `fit` is unknown.
    """
    path = Path(path)
    if fit not in get_args(Fit):
        raise UserError(f"fit must be 'crop' or 'pad', got '{fit}'; give one of these.")
    image = _to_rgb(path, _decode(path, _read(path, max_bytes), max_pixels), background)
    return _to_square(image, size, fit, background)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image of W x H to a float32 tensor (3, H, W) with values in [-1, 1]."""
    _require_rgb(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def content_key(images: Sequence[Image.Image], settings: Mapping[str, object]) -> str:
    """Hash the pixels of a target's images, whatever their files are called, and the settings of its search.

    Args:
        images: RGB images as `load_image` returns them, in any order.
        settings: JSON values by name, in any order.

    Returns:
        16 hexadecimal digits.
    """
    digests = []
    for image in images:
        _require_rgb(image)
        digests.append(hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest())
    canonical = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"".join(sorted(digests)) + canonical.encode()).hexdigest()[:16]


def _require_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image as load_image returns, got mode {image.mode}")


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if address := split_address(path):
            data = read_member(*address, limit=max_bytes + 1)
        else:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There is no file '{path}'; check the path of the image.") from error
    except IsADirectoryError as error:
        raise UserError(f"'{path}' is a folder where one image is needed; give a file in it.") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); check its path and permissions.") from error
    if len(data) > max_bytes:
        raise UserError(f"'{path}' has more than the {max_bytes:,} bytes allowed; save a smaller image.")
    return data


def _decode(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    damaged = f"'{path}' is damaged or cut short; save or download the image again."
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        too_many = image.width * image.height > max_pixels
    except Image.DecompressionBombError:  # Pillow's own limit, twice MAX_IMAGE_PIXELS
        max_pixels = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        too_many = True
    except UnidentifiedImageError as error:
        raise UserError(f"'{path}' is not an image or its header is damaged; give a {_FORMAT_NAMES} file.") from error
    except DECODING_ERRORS as error:
        raise UserError(damaged) from error
    if too_many:
        raise UserError(f"'{path}' has more than the {max_pixels:,} pixels allowed; save a smaller image.")
    if min(image.size) < MIN_SIDE:
        size = f"{image.width} x {image.height}"
        raise UserError(f"'{path}' has {size} pixels; give an image of at least {MIN_SIDE} on each side.")
    try:
        image.load()
    except DECODING_ERRORS as error:
        raise UserError(damaged) from error
    with contextlib.suppress(*DECODING_ERRORS):  # broken EXIF data leaves the image as it is
        image = ImageOps.exif_transpose(image)
    return _to_srgb(image)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image to sRGB by its ICC profile, unless the profile is damaged or of another color space."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image.convert(image.mode[:-1]) if alpha else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colors = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or colors
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image
    transparent = image.info.get("transparency")
    if alpha is None and transparent is not None:  # a color, whose pixels can only be found before the conversion
        alpha = image.convert("RGBA").getchannel("A")
    if alpha is not None:
        colors.putalpha(alpha)
        colors.info.pop("transparency", None)
    return colors


def _to_rgb(path: Path, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert an image of any mode to RGB, with the background in place of transparent pixels."""
    try:
        if image.mode.startswith(("I", "F")):
            values, transparent = np.asarray(image), image.info.get("transparency")
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("32-bit values have no known range")
            image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
            if transparent is not None:
                image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        if not image.has_transparency_data:
            return image.convert("RGB")
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    except ValueError as error:
        raise UserError(f"'{path}' has pixels of mode {image.mode}; save it with 8 or 16 bits per channel.") from error


def _to_square(image: Image.Image, size: int, fit: Fit, background: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    if fit == "crop":
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    # Resize before padding, so that a long thin strip never becomes a huge square.
    inner = (max(1, round(image.width * size / side)), max(1, round(image.height * size / side)))
    image = image.resize(inner, Image.Resampling.LANCZOS)  # a copy if the size already matches
    square = Image.new("RGB", (size, size), background)
    square.paste(image, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square
