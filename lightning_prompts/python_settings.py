"""Check settings given as Python values with the command line's parser."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import chain
from typing import Any, NoReturn, get_args

from pytorch_lightning.cli import LightningArgumentParser, OptimizerCallable

from lightning_prompts.backbones import Backbone, as_backbone
from lightning_prompts.errors import UserError, shortened
from lightning_prompts.parser_errors import one_sentence, similar_settings
from lightning_prompts.python_values import check_type, plain, shown
from lightning_prompts.text_settings import all_settings, with_groups

_FLAG = r"--(?:(?:model|data)\.|(?=(?:scorer|dictionary|language_model|lpips_weights|effort)\b))"
_VALUE = r"\d+(?:\.\d+)?\b|\[[^]]*\]|true\b|false\b|b?float\d+\b|(?:light|heavy)\b"


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(re.sub(r"--(?=\w)", "", one_sentence(message, self)))


def in_python(message: str) -> str:
    """Rewrite settings in a message as Python arguments, such as `--model.num_tokens 8` as `num_tokens=8`."""

    def argument(match: re.Match[str]) -> str:
        name, value = match.groups()
        if value is None:
            return str(name)
        return f"{name}={value.title() if value in ('true', 'false') else repr(value) if value[0].isalpha() else value}"

    return re.sub(rf"{_FLAG}([a-z][\w.]*\w)(?: ({_VALUE}))?", argument, message)


def checked_settings(
    kinds: Sequence[type], defaults: Mapping[str, Any], given: Mapping[str, Any], group: str = ""
) -> list[dict[str, Any]]:
    """Check settings and divide them among the classes that take them.

    The parser would read `"3"` as a number, `"null"` as None and a file name as the file's content. So the types are
    checked here, and the parser only checks the ranges of numbers and the values of a config; texts and objects are
    passed on unchanged.

    Args:
        kinds: The classes.
        defaults: Settings of a config, in which classes are given by name.
        given: Settings of the user, which may be objects. A group such as `backbone` may be a name, a dictionary
            or an object.
        group: The group that the settings belong to, for messages.

    Returns:
        All settings of each class.

    Raises:
        UserError: A setting is unknown, missing, or of the wrong type or range.
    """
    prefix = f"{group}." if group else ""
    given = {name: plain(prefix + name, value) for name, value in given.items()}
    names = [list(_parser(kind).get_defaults().as_dict()) for kind in kinds]
    known = {*chain.from_iterable(names)}
    if unknown := next((name for name in given if name not in known), None):
        raise _unknown(unknown, known, kinds, prefix)
    return [
        _checked(kind, {n: defaults[n] for n in own if n in defaults}, {n: given[n] for n in own if n in given}, group)
        for kind, own in zip(kinds, names, strict=True)
    ]


def _unknown(unknown: str, known: Collection[str], kinds: Sequence[type], prefix: str) -> UserError:
    """Return the error of a setting that no class takes; `prefix` is that of its group."""
    hints = {name: hint for kind in kinds for name, hint in all_settings(kind).items() if name in known}
    similar = similar_settings(unknown, dict(with_groups(hints)))
    means = [
        f"{home}={{{name!r}: ...}}" if home else repr(prefix + name)
        for home, _, name in (setting.rpartition(".") for setting in similar)
    ]
    hint = f"did you mean {' or '.join(means)}?" if means else f"give one of {', '.join(sorted(known))}."
    return UserError(f"The setting {shortened(prefix + unknown)!r} is unknown; {hint}")


def _checked(kind: type, defaults: dict[str, Any], given: dict[str, Any], group: str) -> dict[str, Any]:
    """Return the checked settings of one class, including its defaults."""
    hints = all_settings(kind)
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if is_dataclass(hints[name]):
            kept[name] = _group(name, hints[name], defaults.get(name), value)
            continue
        if OptimizerCallable in (hints[name], *get_args(hints[name])):  # the parser finds one by name, not by object
            is_parsed = isinstance(value, str | Mapping)
        else:
            check_type(f"{group}.{name}" if group else name, value, hints[name])
            is_parsed = _is_parsed(value)
        if not is_parsed:
            kept[name] = value
    parsed = {name: value for name, value in (defaults | given).items() if name not in kept}
    parser = _parser(kind, group, skip=set(kept))
    if "optimizer" in parsed and "optimizer" in defaults:
        parser.set_defaults({"optimizer": defaults["optimizer"]})  # so that settings alone keep its class
    settings = parser.instantiate(parser.parse_object({group: parsed} if group else parsed))
    found: dict[str, Any] = (settings[group] if group else settings).as_dict() if parser.get_defaults() else {}
    return found | kept


def _group(name: str, kind: type, default: Any, given: Any) -> Any:
    """Return a group of settings such as `backbone`; what is loaded already is kept."""
    if name == "backbone":
        given = {"name": given} if isinstance(given, str) else as_backbone(given)
        if isinstance(given, Backbone):
            return given
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping) or not all(isinstance(setting, str) for setting in given):
        taken = "a dictionary of settings" + ", a model's name, a loaded model" * (name == "backbone")
        raise UserError(f"The setting {name} cannot be {shown(given)}; it takes {taken} or {kind.__name__}.")
    (settings,) = checked_settings((kind,), default or {}, given, name)
    return kind(**settings)


def _parser(kind: type, group: str = "", skip: Collection[str] = ()) -> _Parser:
    parser = _Parser()
    parser.add_class_arguments(kind, group or None, skip=set(skip), instantiate=False)
    return parser


def _is_parsed(value: Any) -> bool:
    """Return whether the parser checks a value, which must be no text to interpret and no object to copy."""
    return all(isinstance(item, bool | int | float | None) for item in (value if isinstance(value, list) else [value]))
