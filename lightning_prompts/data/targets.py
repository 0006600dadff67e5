"""Find the target images that a user names by files, folders, patterns, shards and lists."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_prompts.data.lists import Row, read_rows
from lightning_prompts.data.shards import COMPRESSED, SUFFIXES, exists, find_samples, is_image, is_shard
from lightning_prompts.errors import UserError

_COLUMNS = {"file", "caption", "subject", "line", "reason"}  # the last two are those of failed.jsonl
_NO_IMAGES = "No images were given; give an image, a folder, a pattern, a shard, or a .csv or .jsonl list."


@dataclass(frozen=True, slots=True)
class Target:
    """The target of one problem: an image, or several images of one subject.

    Attributes:
        paths: The image files, or their addresses in shards; at least one, except with an error.
        caption: The caption of the images; None if they have none.
        error: Why the target cannot be searched, in one sentence, such as a broken line of a list; None if it can.
        name: The name in messages and results: of a file, a folder or a subject. With an error it is the place of the
            mistake, and no other target has the same.
    """

    paths: tuple[str, ...]  # texts, since a Path takes ten times as much memory, and there may be many
    caption: str | None = None
    error: str | None = None
    name: str = field(kw_only=True)


def find_targets(sources: Sequence[str | Path], one_subject: bool = False) -> list[Target]:
    """Find the targets that a user names; a target that is named twice is kept once.

    Args:
        sources: Each an image file; a WebDataset shard, which is an uncompressed `.tar`; a folder of images or shards;
            a glob pattern of these; or a list of images: a `.csv` with the columns, or a `.jsonl` with the keys, `file`
            and optionally `caption` and `subject`. A range of numbers may be written as `{000..009}`.
        one_subject: Make a single target of all images.

    Returns:
        The targets in the order given, at least one of them without an error. A target whose captions disagree has
        none.

    Raises:
        UserError: A source has no images, or cannot be read.
    """
    if not sources:
        raise UserError(_NO_IMAGES)
    first: dict[object, Target] = {}
    repeated: dict[object, list[Target]] = {}
    for source in [sources] if isinstance(sources, str | Path) else sources:
        for target in _expand(os.fspath(source)):
            identity = _identity(target)
            if first.setdefault(identity, target) is not target:
                repeated.setdefault(identity, []).append(target)
    for identity, others in repeated.items():
        first[identity] = _merge([first[identity], *others], first[identity].name)
    targets = list(first.values())
    usable = [target for target in targets if not target.error]
    if not usable:
        raise UserError(str(targets[0].error))
    if not one_subject or len(usable) == 1:
        return targets
    whole = _merge(usable, "")
    folders = {os.path.basename(os.path.dirname(os.path.abspath(path))) for path in whole.paths}
    name = (folders.pop() if len(folders) == 1 else "") or _name_of_several(whole.paths)
    return [_merge([whole], name), *(target for target in targets if target.error)]


def check_sources(sources: Sequence[str | Path]) -> None:
    """Refuse sources of images that are missing or have no images, without reading all of them.

    Args:
        sources: See `find_targets`.

    Raises:
        UserError: There are no sources, or one cannot be used.
    """
    if not sources:
        raise UserError(_NO_IMAGES)
    for source in [sources] if isinstance(sources, str | Path) else sources:
        next(_expand(os.fspath(source)), None)


def _name_of_several(paths: Sequence[str]) -> str:
    return os.path.basename(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _printable(name: str) -> str:
    """Replace what no terminal can show in a file name by backslash escapes."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def _identity(target: Target) -> object:
    """Return a value that is equal for two targets if they are the same."""
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
        tuple(paths.values()), captions.pop() if len(captions) == 1 else None, parts[0].error, name=_printable(name)
    )


def _expand(source: str) -> Iterator[Target]:
    """Yield the targets of one source."""
    if os.path.isdir(source):
        yield from _targets_among(_files_in(source), f"folder '{source}' has")
    elif exists(source):
        yield from _targets_of(str(Path(source)))
    elif numbers := re.search(r"\{([0-9]+)\.\.([0-9]+)\}", source):
        first, last = numbers.groups()
        # As in a shell, a leading zero in either number pads all of them to the same number of digits.
        width = max(len(first), len(last)) if any(end[0] == "0" and len(end) > 1 for end in (first, last)) else 0
        step = 1 if int(first) <= int(last) else -1
        for number in range(int(first), int(last) + step, step):
            yield from _expand(f"{source[: numbers.start()]}{number:0{width}}{source[numbers.end() :]}")
    elif glob.has_magic(source):
        matches = sorted(glob.glob(source, recursive=True))  # without hidden files
        yield from _targets_among(filter(os.path.isfile, matches), f"pattern '{source}' matches")
    else:
        raise UserError(f"There is no file or folder '{source}'; check the path.")


def _files_in(folder: str) -> list[str]:
    """List the files that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and _is_file(entry))
    except OSError as error:
        raise UserError(f"The folder '{folder}' cannot be read ({error.strerror}); check its permissions.") from error
    prefix = str(Path(folder, "_"))[:-1]
    return [prefix + name for name in names]


def _is_file(entry: os.DirEntry[str]) -> bool:
    # An entry has its type without another system call, unless it is a link, which may be dangling.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _targets_among(paths: Iterable[str], given: str) -> Iterator[Target]:
    """Yield the targets of those files of a folder or pattern that are images or shards."""
    none = True
    for path in paths:
        if is_image(path) or is_shard(path):
            none = False
            yield from _targets_of(path)
    if none:
        raise UserError(f"The {given} no images; give files that end in {', '.join(SUFFIXES)}, or .tar shards.")


def _targets_of(path: str) -> Iterator[Target]:
    """Yield the targets of one file."""
    name = _printable(os.path.basename(path))
    if path.lower().endswith((".csv", ".jsonl")):
        yield from _read_list(Path(path))
    elif path.lower().endswith(COMPRESSED):
        # To read one file of it, everything before that would have to be unpacked.
        yield Target(
            (), error=f"The shard '{path}' is compressed; unpack it to a .tar, which is hardly larger.", name=path
        )
    elif is_shard(path):
        for member, caption, error in find_samples(path):
            paths = (f"{path}/{member}",) if member else ()
            yield Target(paths, caption, error, name=_printable(path) if error else f"{name}/{_printable(member)}")
    else:
        yield Target((path,), name=name)


def _read_list(path: Path) -> list[Target]:
    groups: dict[str | int, list[Target]] = {}
    for row in read_rows(path, "file", "file,caption"):
        try:
            subject, target = _target_of_row(path, row)
        except UserError as error:
            line = row.value.get("line") if isinstance(row.value, dict) else None
            subject, target = "", Target((), error=str(error), name=str(line or f"line {row.line} of {path}"))
        groups.setdefault(subject or row.line, []).append(target)
    targets = [_merge(group, group[0].name) for group in groups.values()]
    if not targets:
        raise UserError(f"The list '{path}' names no images; give it at least one 'file'.")
    if all(target.error for target in targets):
        raise UserError(str(targets[0].error))
    return targets


def _target_of_row(path: Path, row: Row) -> tuple[str, Target]:
    """Return the subject, "" if there is none, and the target of a row; raise a UserError if the row is broken."""
    if row.error:
        raise UserError(row.error)
    where, value = f"Line {row.line} of '{path}'", row.value
    if not isinstance(value, dict) or not value.keys() <= _COLUMNS:
        raise UserError(
            f"{where} must have no fields but 'file', 'caption' and 'subject'; remove others, and quote commas."
        )
    files = value.get("file")
    if not files and value.get("line"):
        raise UserError(f"{value.get('reason') or where + ' has failed before.'}")
    files = files if isinstance(files, list) else [files]
    if not files or not all(isinstance(file, str) and file.strip() for file in files):
        raise UserError(f"{where} has no usable 'file'; give the path of an image, or in JSONL a list of paths.")
    caption, subject = (value.get(key) or "" for key in ("caption", "subject"))
    if not isinstance(caption, str) or not isinstance(subject, str):
        raise UserError(f"{where} has a 'caption' or 'subject' that is not text; put it in quotes.")
    paths = tuple(str(path.parent / file.strip()) for file in files)
    subject, caption = subject.strip(), caption.strip() or None
    if missing := next((file for file in paths if not exists(file)), None):
        error = f"{where} names '{missing}', which is not a file; give a path relative to the list's folder."
        return "", Target(paths, caption, error, name=f"line {row.line} of {path}")
    return subject, Target(paths, caption, name=subject or _name_of_several(paths))
