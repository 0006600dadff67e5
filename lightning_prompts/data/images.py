"""Target pictures: which ones a person means, how they are read, and the key their results are kept under."""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lightning_prompts.data.lists import Row, read_rows
from lightning_prompts.data.shards import (
    COMPRESSED,
    SUFFIXES,
    exists,
    find_samples,
    is_picture,
    is_shard,
    read_member,
    split_address,
)
from lightning_prompts.errors import UserError

Fit = Literal["crop", "pad"]
MIN_SIDE = 8
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # nothing that runs another program, as EPS does
_KINDS = "PNG, JPEG, WebP, BMP, GIF or TIFF"
DAMAGE = (  # what Pillow's decoders raise on damaged files
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)
_COLUMNS = {"file", "caption", "subject", "line", "reason"}  # the last two in lists of what has failed


NO_PICTURES = "No pictures were given; name a picture, a folder, a pattern, a shard, or a .csv or .jsonl list."


@dataclass(frozen=True, slots=True)
class Target:
    """What one problem searches a prompt for: one picture, or several pictures of one subject.

    Attributes:
        paths: The picture files, or their addresses in shards; at least one, or with an error those that are known.
        caption: The words that came with the pictures, None without any.
        error: Why there is nothing to search for, in one sentence, such as of a broken line in a list; None if there is.
        name: What to show the person: a file's, folder's or subject's name. With an error, where it is, and no other target has it.
    """

    paths: tuple[str, ...]  # as text: a Path takes ten times as much memory, and there may be many
    caption: str | None = None
    error: str | None = None
    name: str = field(kw_only=True)


def load_image(
    path: str | Path,
    size: int,
    fit: Fit = "crop",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 50_000_000,
    max_bytes: int = 100_000_000,
) -> Image.Image:
    """Reads a picture of any usual kind as a square; of an animation, the first frame.

    Args:
        path: The picture file, or its address in a WebDataset shard, such as `shards/000.tar/0001.jpg`.
        size: Side of the result in pixels, at least 1.
        fit: "crop" cuts a centred square, "pad" fills up to a square with the background.
        background: Colour behind transparent pixels and around a padded picture, each number in [0, 255].
        max_pixels: Largest width times height; a picture whose header claims more is not decoded.
        max_bytes: Largest file.

    Returns:
        RGB picture of size x size.

    Raises:
        UserError: The file cannot be used as a picture, or `fit` is unknown.
    """
    path = Path(path)
    if fit not in get_args(Fit):
        raise UserError(f"The fit '{fit}' is unknown; choose 'crop' or 'pad'.")
    image = _flatten(path, _decode(path, _read(path, max_bytes), max_pixels), background)
    return _square(image, size, fit, background)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turns an RGB picture of W x H into a float32 tensor (3, H, W) with values in [-1, 1]."""
    _require_rgb(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def find_targets(sources: Sequence[str | Path], one_subject: bool = False) -> list[Target]:
    """Finds the pictures that a person names; a target that is named twice is kept once.

    Args:
        sources: Each a picture file; a WebDataset shard, which is an uncompressed `.tar`; a folder of pictures or shards; a glob
            pattern of these; or a list of pictures: a `.csv` with the columns, or a `.jsonl` with the keys, `file` and optionally
            `caption` and `subject`. A range of numbers may be written as `{000..009}`.
        one_subject: Makes a single target of all pictures.

    Returns:
        The targets in the order given, at least one that has no error. Captions that disagree within a target give none.

    Raises:
        UserError: A source has no pictures, or cannot be read.
    """
    if not sources:
        raise UserError(NO_PICTURES)
    first: dict[object, Target] = {}
    again: dict[object, list[Target]] = {}
    for source in [sources] if isinstance(sources, str | Path) else sources:
        for target in _expand(os.fspath(source)):
            same = _identity(target)
            if first.setdefault(same, target) is not target:
                again.setdefault(same, []).append(target)
    for same, others in again.items():
        first[same] = _merge([first[same], *others], first[same].name)
    targets = list(first.values())
    usable = [target for target in targets if not target.error]
    if not usable:
        raise UserError(str(targets[0].error))
    if not one_subject or len(usable) == 1:
        return targets
    whole = _merge(usable, "")
    folders = {os.path.basename(os.path.dirname(os.path.abspath(path))) for path in whole.paths}
    name = (folders.pop() if len(folders) == 1 else "") or _several(whole.paths)
    return [_merge([whole], name), *(target for target in targets if target.error)]


def check_sources(sources: Sequence[str | Path]) -> None:
    """Refuse sources of images that are missing or hold none, without reading all of them.

    Args:
        sources: See `find_targets`.

    Raises:
        UserError: There is none, or one cannot be used.
    """
    if not sources:
        raise UserError(NO_PICTURES)
    for source in [sources] if isinstance(sources, str | Path) else sources:
        next(_expand(os.fspath(source)), None)


def content_key(images: Sequence[Image.Image], settings: Mapping[str, object]) -> str:
    """Names a target by its decoded pixels, whatever the files are called, and by the settings of its search.

    Args:
        images: RGB pictures of one subject, as `load_image` gives them; their order does not count.
        settings: JSON values by name; their order does not count.

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
        raise ValueError(f"expected an RGB picture as load_image gives, got mode {image.mode}")


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if address := split_address(path):
            data = read_member(*address, limit=max_bytes + 1)
        else:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There is no file '{path}'; check the path of the picture.") from error
    except IsADirectoryError as error:
        raise UserError(f"'{path}' is a folder where one picture is needed; name a file in it.") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); check its path and permissions.") from error
    if len(data) > max_bytes:
        raise UserError(f"'{path}' has more than the {max_bytes:,} bytes allowed; save a smaller picture.")
    return data


def _decode(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    damaged = f"'{path}' is damaged or cut short; save or download the picture again."
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        too_many = image.width * image.height > max_pixels
    except Image.DecompressionBombError:  # Pillow's own limit, twice MAX_IMAGE_PIXELS
        max_pixels = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        too_many = True
    except UnidentifiedImageError as error:
        raise UserError(f"'{path}' is no picture or its header is damaged; give a {_KINDS} file.") from error
    except DAMAGE as error:
        raise UserError(damaged) from error
    if too_many:
        raise UserError(f"'{path}' has more than the {max_pixels:,} pixels allowed; save a smaller picture.")
    if min(image.size) < MIN_SIDE:
        size = f"{image.width} x {image.height}"
        raise UserError(f"'{path}' has {size} pixels; give a picture of at least {MIN_SIDE} on each side.")
    try:
        image.load()
    except DAMAGE as error:
        raise UserError(damaged) from error
    with contextlib.suppress(*DAMAGE):  # a picture with broken EXIF data stays as it is
        image = ImageOps.exif_transpose(image)
    return _in_srgb(image)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert the colors of an image to sRGB by its ICC profile; a profile that is damaged or of another color space is ignored."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image.convert(image.mode[:-1]) if alpha else image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colors = ImageCms.profileToProfile(colors, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or colors
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image
    clear = image.info.get("transparency")
    if alpha is None and clear is not None:  # a color that is transparent, known before its conversion only
        alpha = image.convert("RGBA").getchannel("A")
    if alpha is not None:
        colors.putalpha(alpha)
        colors.info.pop("transparency", None)
    return colors


def _flatten(path: Path, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Turns any mode into RGB, transparent pixels into the background."""
    try:
        if image.mode.startswith(("I", "F")):
            values, clear = np.asarray(image), image.info.get("transparency")
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("32-bit values have no known range")
            image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        if not image.has_transparency_data:
            return image.convert("RGB")
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    except ValueError as error:
        raise UserError(f"'{path}' has pixels of kind {image.mode}; save it with 8 or 16 bits per channel.") from error


def _square(image: Image.Image, size: int, fit: Fit, background: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    if fit == "crop":
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    # Resized before padding: a long thin strip never becomes a huge square.
    inner = (max(1, round(image.width * size / side)), max(1, round(image.height * size / side)))
    image = image.resize(inner, Image.Resampling.LANCZOS)  # a copy when the size already matches
    square = Image.new("RGB", (size, size), background)
    square.paste(image, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


def _several(paths: Sequence[str]) -> str:
    return os.path.basename(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _shown(name: str) -> str:
    """Text for a name, as file systems have names that no terminal can show."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def _identity(target: Target) -> object:
    """What two targets share that are the same."""
    if target.error:
        return target.name, target.error
    if len(target.paths) == 1:  # nearly always, and a set is large
        return os.path.abspath(target.paths[0])
    return frozenset(map(os.path.abspath, target.paths))


def _merge(parts: Sequence[Target], name: str) -> Target:
    paths: dict[str, str] = {}
    for path in (path for part in parts for path in part.paths):
        paths.setdefault(os.path.abspath(path), path)
    captions = {part.caption for part in parts if part.caption}
    return Target(
        tuple(paths.values()), captions.pop() if len(captions) == 1 else None, parts[0].error, name=_shown(name)
    )


def _expand(source: str) -> Iterator[Target]:
    """The targets of one source."""
    if os.path.isdir(source):
        yield from _found(_in_folder(source), f"folder '{source}' has")
    elif exists(source):
        yield from _of_file(str(Path(source)))
    elif numbers := re.search(r"\{([0-9]+)\.\.([0-9]+)\}", source):
        first, last = numbers.groups()
        # As in a shell: a leading zero anywhere means that all have as many digits.
        width = max(len(first), len(last)) if any(end[0] == "0" and len(end) > 1 for end in (first, last)) else 0
        step = 1 if int(first) <= int(last) else -1
        for number in range(int(first), int(last) + step, step):
            yield from _expand(f"{source[: numbers.start()]}{number:0{width}}{source[numbers.end() :]}")
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))  # none hidden
        yield from _found(filter(os.path.isfile, matches), f"pattern '{source}' matches")
    else:
        raise UserError(f"There is no file or folder '{source}'; check the path.")


def _in_folder(folder: str) -> list[str]:
    """The files that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and _is_file(entry))
    except OSError as error:
        raise UserError(f"The folder '{folder}' cannot be read ({error.strerror}); check its permissions.") from error
    beginning = str(Path(folder, "_"))[:-1]
    return [beginning + name for name in names]


def _is_file(entry: os.DirEntry[str]) -> bool:
    # An entry knows what it is without asking the file system again, unless it is a link, which may lead nowhere.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _found(paths: Iterable[str], given: str) -> Iterator[Target]:
    """The targets of those files in a folder or of a pattern that are pictures or shards."""
    none = True
    for path in paths:
        if is_picture(path) or is_shard(path):
            none = False
            yield from _of_file(path)
    if none:
        raise UserError(f"The {given} no pictures; they are the files ending in {', '.join(SUFFIXES)}, or .tar shards.")


def _of_file(path: str) -> Iterator[Target]:
    name = _shown(os.path.basename(path))
    if path.lower().endswith((".csv", ".jsonl")):
        yield from _read_list(Path(path))
    elif path.lower().endswith(COMPRESSED):
        # Nothing in it can be read without unpacking all that stands before.
        yield Target(
            (), error=f"The shard '{path}' is compressed; unpack it to a .tar, which is hardly larger.", name=path
        )
    elif is_shard(path):
        for picture, caption, error in find_samples(path):
            paths = (f"{path}/{picture}",) if picture else ()
            yield Target(paths, caption, error, name=_shown(path) if error else f"{name}/{_shown(picture)}")
    else:
        yield Target((path,), name=name)


def _read_list(path: Path) -> list[Target]:
    groups: dict[str | int, list[Target]] = {}
    for row in read_rows(path, "file", "file,caption"):
        try:
            subject, target = _listed(path, row)
        except UserError as error:
            line = row.value.get("line") if isinstance(row.value, dict) else None
            subject, target = "", Target((), error=str(error), name=str(line or f"line {row.line} of {path}"))
        groups.setdefault(subject or row.line, []).append(target)
    targets = [_merge(group, group[0].name) for group in groups.values()]
    if not targets:
        raise UserError(f"The list '{path}' names no pictures; give it at least one 'file'.")
    if all(target.error for target in targets):
        raise UserError(str(targets[0].error))
    return targets


def _listed(path: Path, row: Row) -> tuple[str, Target]:
    """The subject, "" if none is given, and the target of a line; a UserError if it is broken."""
    if row.error:
        raise UserError(row.error)
    where, value = f"Line {row.line} of '{path}'", row.value
    if not isinstance(value, dict) or not value.keys() <= _COLUMNS:
        raise UserError(f"{where} is not just 'file', 'caption' and 'subject'; drop the rest, put commas in quotes.")
    files = value.get("file")
    if not files and value.get("line"):
        raise UserError(f"{value.get('reason') or where + ' has failed before.'}")
    files = files if isinstance(files, list) else [files]
    if not files or not all(isinstance(file, str) and file.strip() for file in files):
        raise UserError(f"{where} has no usable 'file'; give the path of a picture, or in JSONL a list of paths.")
    caption, subject = (value.get(key) or "" for key in ("caption", "subject"))
    if not isinstance(caption, str) or not isinstance(subject, str):
        raise UserError(f"{where} has a 'caption' or 'subject' that is not text; put it in quotes.")
    paths = tuple(str(path.parent / file.strip()) for file in files)
    subject, caption = subject.strip(), caption.strip() or None
    if missing := next((file for file in paths if not exists(file)), None):
        error = f"{where} names '{missing}', which is no file; give a path relative to the list's folder."
        return "", Target(paths, caption, error, name=f"line {row.line} of {path}")
    return subject, Target(paths, caption, name=subject or _several(paths))
