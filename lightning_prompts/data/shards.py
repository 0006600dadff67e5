"""WebDataset shards: list the images of a `.tar` and read one of them without unpacking the archive.

The address of an image is the shard's path followed by its name in the shard, `shards/000.tar/0001.jpg`. If `000.tar`
is a folder, this is the ordinary path of a file, so an address is never ambiguous.
"""

import functools
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prompts.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_CAPTION_BYTES = 1_000_000
_BLOCK = 512
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, LookupError)  # what tarfile raises on damaged headers


class Sample(NamedTuple):
    """An image of a shard, or an error of the shard.

    Attributes:
        name: The image's name in the shard; with an error, the image that is cut off, or "".
        caption: The image's caption; None if it has none.
        error: What is wrong with the shard, in one sentence; None if nothing is.
    """

    name: str
    caption: str | None = None
    error: str | None = None


def is_image(name: str) -> bool:
    """Return whether a file's name has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def is_shard(path: str) -> bool:
    """Return whether a file's name has the suffix of a shard."""
    return path.lower().endswith(".tar")


def split_address(path: Path) -> tuple[Path, str] | None:
    """Split an address into the shard and the name in it; return None if no shard is on the path."""
    for parent in path.parents:
        if is_shard(parent.name) and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def find_samples(shard: str) -> list[Sample]:
    """List the images of a shard with their captions, reading only the archive's headers and the captions.

    Every file with the suffix of an image is one. Its caption is the `.txt`, or `caption` in the `.json`, whose name is
    the same up to the last dot or, as in WebDataset, up to the first. Captions that cannot be read are ignored, since
    these files may hold anything.

    Args:
        shard: The shard's path.

    Returns:
        The images in their order. If the shard ends early, is damaged or has no images, the last sample has the error.
    """
    images: dict[str, tuple[str, str]] = {}  # the names up to the last dot and up to the first
    captions: dict[str, str] = {}
    cut_off, error = set[str](), None
    try:
        with _opened(shard) as (file, archive):
            end = os.fstat(file.fileno()).st_size
            for name, member in _members(archive):
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.rpartition(".")
                key = f"{folder}/{stem}"
                if is_image(name):
                    images[name] = key, f"{folder}/{base.partition('.')[0]}"
                if member.offset_data + member.size > end:
                    cut_off = {name} if is_image(name) else {other for other, keys in images.items() if key in keys}
                elif suffix.lower() in ("txt", "json") and member.size <= _MAX_CAPTION_BYTES:
                    file.seek(member.offset_data)
                    caption = _caption(suffix.lower(), file.read(member.size))
                    if caption and (suffix.lower() == "txt" or key not in captions):
                        captions[key] = caption
    except tarfile.TarError:
        whole = len(images.keys() - cut_off)
        error = f"The shard '{shard}' ends early or is damaged (samples found: {whole}); download or write it again."
    except UserError as mistake:
        error = str(mistake)
    lost = "".join(sorted(cut_off)[:1])
    samples = [
        Sample(name, captions.get(key) or captions.get(first))
        for name, (key, first) in images.items()
        if name not in cut_off
    ]
    if not (samples or error):
        error = f"The shard '{shard}' has no images; give one with files that end in {', '.join(SUFFIXES)}."
    return [*samples, Sample(lost, error=error)] if error else samples


def exists(path: str | Path) -> bool:
    """Return whether a path is that of a file or the address of an image in a shard.

    Raises:
        UserError: The path is an address in a shard that cannot be read.
    """
    if os.path.isfile(path):
        return True
    address = split_address(Path(path))
    return address is not None and _locate(*address) is not None


def read_member(shard: Path, name: str, limit: int) -> bytes:
    """Read at most `limit` bytes of an image in a shard.

    Raises:
        UserError: The shard cannot be read, does not have the image, or ends within it.
    """
    location = _locate(shard, name)
    if location is None:
        raise UserError(f"There is no image '{name}' in the shard '{shard}'; check its name.")
    offset, size = location
    with shard.open("rb") as file:
        file.seek(offset)
        data = file.read(min(size, limit))
    if len(data) < min(size, limit):
        raise UserError(f"The shard '{shard}' ends early, within '{name}'; download or write it again.")
    return data


def _locate(shard: Path, name: str) -> tuple[int, int] | None:
    """Return the offset and the size in bytes of an image in a shard; None if the shard does not have it."""
    status = os.stat(shard)
    # The key changes when the shard is written again, and is the same for every way to write its path.
    index = _index(str(shard.absolute()), (status.st_ino, status.st_size, status.st_mtime_ns))
    row = int(np.searchsorted(index[:, 0], hash(name), side="right")) - 1
    if row < 0 or index[row, 0] != hash(name):
        return None
    return int(index[row, 1]), int(index[row, 2])


@functools.lru_cache(maxsize=1024)
def _index(shard: str, stamp: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the hash of the name, the offset and the size of each image, sorted by hash.

    Each process reads the headers of a shard once and keeps 24 bytes per image; names would take ten times as much.
    `stamp` is part of the cache's key, so that a shard that has changed is indexed again.
    """
    rows: list[tuple[int, int, int]] = []
    with _opened(shard) as (_, archive), suppress(tarfile.TarError):  # what comes before the damage can be read
        for name, member in _members(archive):
            if is_image(name):
                rows.append((hash(name), member.offset_data, member.size))
    table = np.array(rows, np.int64).reshape(-1, 3)
    # A stable sort and a search from the right find the later of two files with one name, as unpacking would.
    return table[np.argsort(table[:, 0], kind="stable")]


@contextmanager
def _opened(shard: str) -> Iterator[tuple[BinaryIO, tarfile.TarFile]]:
    try:
        with open(shard, "rb") as file:
            try:
                archive = tarfile.TarFile(fileobj=file, encoding="utf-8")
            except _DAMAGE as error:
                raise UserError(
                    f"'{shard}' is not a .tar archive, is compressed, or ends within its first file; give a whole, "
                    "uncompressed .tar."
                ) from error
            yield file, archive
    except OSError as error:
        raise UserError(f"The shard '{shard}' cannot be read ({error.strerror}); check its permissions.") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the names and headers of the files that are not hidden; raise a TarError at damage or an early end."""
    try:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            # A damaged size may be negative, which would loop forever, or larger than any file.
            if not 0 <= member.size < 2**63 or archive.offset <= member.offset:
                raise tarfile.ReadError("invalid size")
            path = PurePosixPath(member.name.lstrip("/"))  # "./0001.jpg" is "0001.jpg"
            if member.isreg() and not member.issparse() and not any(part.startswith(".") for part in path.parts):
                yield str(path), member
        # tarfile also stops at damage; only an empty block is the end.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no end block")
    except _DAMAGE as error:
        raise tarfile.ReadError(str(error)) from error


def _caption(suffix: str, data: bytes) -> str | None:
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if suffix == "json" else text
    except (ValueError, RecursionError):
        return None
    if suffix == "json":
        value = value.get("caption") if isinstance(value, dict) else None
    return value.strip() or None if isinstance(value, str) else None
