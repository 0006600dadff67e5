"""WebDataset shards: the samples of a `.tar`, and how one of its pictures is read without unpacking it.

The address of a picture is the shard's path with the name in the shard behind it, `shards/000.tar/0001.jpg`. It can mean nothing else:
where `000.tar` is a folder, it is the path of a file.
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
_CAPTION_BYTES = 1_000_000  # more is no caption
_BLOCK = 512
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, LookupError)  # what tarfile raises on damaged headers


class Sample(NamedTuple):
    """A picture of a shard, or what is wrong with the shard.

    Attributes:
        name: The picture's name in the shard, "" if there is none.
        caption: The words that came with it.
        error: Why there is no picture, in one sentence.
    """

    name: str
    caption: str | None = None
    error: str | None = None


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return name.lower().endswith(SUFFIXES)


def is_shard(path: str) -> bool:
    """Whether a file is a shard by its name."""
    return path.lower().endswith(".tar")


def split_address(path: Path) -> tuple[Path, str] | None:
    """The shard and the name in it that an address means; None if no shard is on the path."""
    for parent in path.parents:
        if is_shard(parent.name) and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def find_samples(shard: str) -> list[Sample]:
    """Lists the pictures of a shard with their captions, by the archive's headers.

    Every file with a suffix of pictures is one. Its caption is the `.txt`, or `caption` in the `.json`, whose name is the same up to the
    last dot or, as in WebDataset, up to the first; one that cannot be read is none, as these files may hold anything.

    Args:
        shard: The file.

    Returns:
        The pictures in their order, and at the end, where the shard ends early, is damaged or has none, a sample with the error.
    """
    pictures: dict[str, tuple[str, str]] = {}  # the names up to the last dot and up to the first
    captions: dict[str, str] = {}
    cut, error = set[str](), None
    try:
        with _opened(shard) as (file, archive):
            end = os.fstat(file.fileno()).st_size
            for name, member in _members(archive):
                folder, _, base = name.rpartition("/")
                stem, _, kind = base.rpartition(".")
                key = f"{folder}/{stem}"
                if is_picture(name):
                    pictures[name] = key, f"{folder}/{base.partition('.')[0]}"
                if member.offset_data + member.size > end:
                    cut = {name} if is_picture(name) else {other for other, keys in pictures.items() if key in keys}
                elif kind.lower() in ("txt", "json") and member.size <= _CAPTION_BYTES:
                    file.seek(member.offset_data)
                    caption = _caption(kind.lower(), file.read(member.size))
                    if caption and (kind.lower() == "txt" or key not in captions):
                        captions[key] = caption
    except tarfile.TarError:
        whole = len(pictures.keys() - cut)
        error = f"The shard '{shard}' ends early or is damaged (samples found: {whole}); download or write it again."
    except UserError as none:
        error = str(none)
    lost = "".join(sorted(cut)[:1])
    samples = [
        Sample(name, captions.get(key) or captions.get(first))
        for name, (key, first) in pictures.items()
        if name not in cut
    ]
    if not (samples or error):
        error = f"The shard '{shard}' has no pictures; they are the files in it ending in {', '.join(SUFFIXES)}."
    return [*samples, Sample(lost, error=error)] if error else samples


def exists(path: str | Path) -> bool:
    """Whether a path is that of a file or the address of a picture in a shard.

    Raises:
        UserError: It is the address in a shard that cannot be read.
    """
    if os.path.isfile(path):
        return True
    address = split_address(Path(path))
    return address is not None and _place(*address) is not None


def read_member(shard: Path, name: str, limit: int) -> bytes:
    """Reads at most `limit` bytes of a picture in a shard.

    Raises:
        UserError: The shard cannot be read, does not have the picture, or ends within it.
    """
    place = _place(shard, name)
    if place is None:
        raise UserError(f"There is no picture '{name}' in the shard '{shard}'; check its name.")
    offset, size = place
    with shard.open("rb") as file:
        file.seek(offset)
        data = file.read(min(size, limit))
    if len(data) < min(size, limit):
        raise UserError(f"The shard '{shard}' ends early, within '{name}'; download or write it again.")
    return data


def _place(shard: Path, name: str) -> tuple[int, int] | None:
    """Where in a shard the bytes of a picture begin, and how many there are."""
    status = os.stat(shard)
    # By what changes when a shard is written again, and is the same from wherever it is named.
    index = _index(str(shard.absolute()), (status.st_ino, status.st_size, status.st_mtime_ns))
    row = int(np.searchsorted(index[:, 0], hash(name), side="right")) - 1
    if row < 0 or index[row, 0] != hash(name):
        return None
    return int(index[row, 1]), int(index[row, 2])


@functools.lru_cache(maxsize=1024)
def _index(shard: str, stamp: tuple[int, ...]) -> NDArray[np.int64]:
    """Hash of the name, offset and size of each picture, sorted by hash.

    Each process reads the headers of a shard once and keeps 24 bytes a picture; names, of which targets have copies, would take ten
    times as much. `stamp` is only there to forget what was known of a file that has changed.
    """
    rows: list[tuple[int, int, int]] = []
    with _opened(shard) as (_, archive), suppress(tarfile.TarError):  # what stands before damage can be read
        for name, member in _members(archive):
            if is_picture(name):
                rows.append((hash(name), member.offset_data, member.size))
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[
        np.argsort(table[:, 0], kind="stable")
    ]  # of two with one name the later, as when an archive is unpacked


@contextmanager
def _opened(shard: str) -> Iterator[tuple[BinaryIO, tarfile.TarFile]]:
    try:
        with open(shard, "rb") as file:
            try:
                archive = tarfile.TarFile(fileobj=file, encoding="utf-8")
            except _DAMAGE as error:
                raise UserError(
                    f"'{shard}' is no .tar archive, is compressed, or ends within its first file; give a whole, uncompressed .tar."
                ) from error
            yield file, archive
    except OSError as error:
        raise UserError(f"The shard '{shard}' cannot be read ({error.strerror}); check its permissions.") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of an archive that are not hidden, and their names; at damage or an early end a TarError."""
    try:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            # Damaged sizes may be below zero, with which it would go round for ever, or more than any file has.
            if not 0 <= member.size < 2**63 or archive.offset <= member.offset:
                raise tarfile.ReadError("a size is none")
            path = PurePosixPath(member.name.lstrip("/"))  # "./0001.jpg" is "0001.jpg"
            if member.isreg() and not member.issparse() and not any(part.startswith(".") for part in path.parts):
                yield str(path), member
        # Only now is it known whether this was the end, which is an empty block: tarfile stops at damage, too.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("there is no end")
    except _DAMAGE as error:
        raise tarfile.ReadError(str(error)) from error


def _caption(kind: str, data: bytes) -> str | None:
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if kind == "json" else text
    except (ValueError, RecursionError):
        return None
    if kind == "json":
        value = value.get("caption") if isinstance(value, dict) else None
    return value.strip() or None if isinstance(value, str) else None
