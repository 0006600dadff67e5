"""Protect settings that take text from the command line's parser, which would read them as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from lightning_prompts.errors import UserError

LISTS = {list[str], Sequence[str]}


class Text(NamedTuple):
    """The type of a setting that takes text.

    Attributes:
        several: Whether it takes several texts.
        optional: Whether it takes null.
        listed: Whether a single text must be a list too.
    """

    several: bool
    optional: bool
    listed: bool = False


def text_settings(base: type) -> dict[str, Text]:
    """Return the settings of a class and its subclasses that take only text, by name."""
    found: dict[str, Text] = {}
    others: set[str] = set()
    for kind in _with_subclasses(base):
        for name, hint in with_groups(own_settings(kind)):
            kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
            if kinds & {str, *LISTS} and kinds <= {str, *LISTS, NoneType}:
                found[name] = Text(bool(kinds & LISTS), NoneType in kinds, str not in kinds)
            else:
                others.add(name)
    return {name: text for name, text in found.items() if name not in others}


def with_groups(hints: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield settings and their type hints, those of a group such as `backbone` as `backbone.dtype`.

    A group with a setting `name` can be given by that alone: `--model.backbone sdxl` is `--model.backbone.name sdxl`.
    """
    for name, hint in hints.items():
        group = settings_of_group(hint)
        yield from ((f"{name}.{inner}", kind) for inner, kind in group.items())
        if not group:
            yield name, hint


def settings_of_group(hint: Any) -> dict[str, Any]:
    """Return the type hints of the settings in a group; none if the hint is not that of a group."""
    return get_type_hints(hint) if is_dataclass(hint) else {}


def own_settings(kind: type) -> dict[str, Any]:
    """Return the type hints of the settings that a class adds to those of its bases."""
    return get_type_hints(vars(kind)["__init__"]) if "__init__" in vars(kind) else {}


def all_settings(kind: type) -> dict[str, Any]:
    """Return the type hints of all settings of a class, including those of its bases."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        hints |= own_settings(base)
    return hints


def _with_subclasses(base: type) -> Iterable[type]:
    """Yield a class and all of its subclasses."""
    yield base
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        yield from _with_subclasses(kind)


def keep_texts(args: Sequence[str], settings: Mapping[str, Mapping[str, Text]]) -> list[str]:
    """Replace text settings of a command by configs, in which the text is a quoted string.

    The parser would read `style: watercolor`, `[a]`, `# one` and `null` as YAML.

    Args:
        args: The arguments of the command. A setting of several texts takes them one after the other, or as a JSON
            list.
        settings: The settings that take text, by `data`, `model`, or "" for those of the command.

    Returns:
        The arguments for the parser.

    Raises:
        UserError: A text is not UTF-8, reads as null in a setting that takes null, or is a list that is not JSON.
    """
    kept: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        part, setting, text = _setting(name, settings)
        if name == "--config":
            if equals or rest:
                kept += _config_arguments(value if equals else rest.pop(0), settings)
            else:
                kept.append(arg)
            continue
        end = next((i for i, following in enumerate(rest) if following.startswith("--")), len(rest))
        given = [value] if equals else rest[: end if text and text.several else min(end, 1)]
        if not text or not given or (text.optional and given == ["null"]):
            kept.append(arg)
            continue
        if invalid := [each for each in given if re.search("[\ud800-\udfff]", each)]:
            raise UserError(
                f"The setting {name} cannot be {invalid[0]!r}, which is not UTF-8; rename the file, or name its folder."
            )
        if text.optional and not text.several and _is_null(given[0]):
            raise UserError(f"The setting {name} cannot be {given[0]!r}; it takes a text, or null for none.")
        if text.listed and len(given) == 1 and given[0].lstrip().startswith("[") and _texts(given) == given:
            raise UserError(
                f"The setting {name} cannot be {given[0]!r}; it takes words one after the other, or a JSON list such "
                "as "
                '\'["red", "blue"]\'.'
            )
        rest = rest if equals else rest[len(given) :]
        kept += _config(part, setting, _texts(given) if text.several else given[0])
    return kept


def _setting(name: str, settings: Mapping[str, Mapping[str, Text]]) -> tuple[str, str, Text | None]:
    """Return the part (`data`, `model` or "") of a setting, its name in the part, and its type if it takes text."""
    match = re.fullmatch(r"--(?:(model|data)\.(?:init_args\.)?)?([\w.]+)", name)
    if not match:
        return "", "", None
    part, setting = match[1] or "", match[2].replace(".init_args.", ".")
    texts = settings.get(part, {})
    if f"{setting}.name" in texts:  # a group by its name
        setting = f"{setting}.name"
    return part, setting, texts.get(setting)


def _is_null(text: str) -> bool:
    """Return whether the parser would read a text as None."""
    try:
        return yaml.safe_load(text) is None
    except (yaml.YAMLError, ValueError):
        return False


def _texts(given: Sequence[str]) -> list[str]:
    """Return the given texts, or the items of a JSON list."""
    if len(given) == 1 and given[0].lstrip().startswith("["):
        try:
            listed = json.loads(given[0])
        except (ValueError, RecursionError):
            return list(given)
        if all(isinstance(text, str) for text in listed):
            return [str(text) for text in listed]
    return list(given)


def _config(part: str, name: str, value: Any) -> list[str]:
    """Return a setting as a `--config` argument, in which its text is not read as YAML again."""
    group, _, inner = name.partition(".")
    setting = {group: {inner: value}} if inner else {name: value}
    # YAML as ASCII in one line, since YAML does not read JSON's escapes of characters beyond 16 bits.
    return [
        "--config",
        yaml.safe_dump({part: {"init_args": setting}} if part else setting, default_flow_style=True, width=10**9),
    ]


def _config_arguments(file: str, settings: Mapping[str, Mapping[str, Text]]) -> list[str]:
    """Return the arguments for a config file, with the settings corrected that the parser would misread.

    The name of a group, as in `backbone: sdxl`, becomes the group's `name`, since the parser would not merge it with
    other settings of the group. One text of a setting that takes several becomes a list, since the parser would read it
    as YAML again.
    """
    corrected: list[str] = []
    named = False
    try:
        config = yaml.safe_load(Path(file).read_bytes())
        for part in [part for part in ("data", "model") if part in config]:
            given, texts = config[part].get("init_args") or {}, settings.get(part, {})
            for name in [name for name, value in given.items() if isinstance(value, str)]:
                if f"{name}.name" in texts:
                    given[name], named = {"name": given[name]}, True
                elif name in texts and texts[name].several:
                    corrected += _config(part, name, [given[name]])
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError):
        return ["--config", file]  # the parser reports the mistake
    whole = str(yaml.safe_dump(config, default_flow_style=True, width=10**9)) if named else file
    return ["--config", whole, *corrected]
