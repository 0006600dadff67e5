"""Settings given as Python values, checked by the parser of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from lightning_prompts.commands.parser_errors import one_sentence
from lightning_prompts.errors import UserError, shortened
from lightning_prompts.python_values import check_type, plain
from lightning_prompts.text_settings import all_settings

_FLAG = r"--(?:(?:model|data)\.|(?=(?:scorer|dictionary|language_model|lpips_weights)\b))"
_VALUE = r"\d+(?:\.\d+)?\b|\[[^]]*\]|true\b|false\b|b?float\d+\b"


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(re.sub(r"--(?=\w)", "", one_sentence(message, self)))


def in_python(message: str) -> str:
    """Name settings in a message of the command line as Python arguments, such as `--model.tokens 8` as `tokens=8`."""

    def argument(match: re.Match[str]) -> str:
        name, value = match.groups()
        if value is None:
            return str(name)
        return f"{name}={value.title() if value in ('true', 'false') else repr(value) if 'float' in value else value}"

    return re.sub(rf"{_FLAG}([a-z]\w*)(?: ({_VALUE}))?", argument, message)


def checked_settings(
    kinds: Sequence[type], defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Check settings and divide them among the classes that take them.

    The parser reads text: to it `"3"` is a number, `"null"` nothing and the name of a file what is in it. So the types are checked
    before, it gets numbers and what a config says, and decides on ranges; texts and objects are kept as they stand.

    Args:
        kinds: The classes.
        defaults: Settings of a config, among which classes have names.
        given: Settings of a user, among which objects stand for themselves.

    Returns:
        All settings of each class.

    Raises:
        UserError: A setting is unknown, missing or has another type or range.
    """
    given = {name: plain(name, value) for name, value in given.items()}
    names = [list(_parser(kind).get_defaults().keys()) for kind in kinds]
    known = sorted({*chain.from_iterable(names)})
    if unknown := next((name for name in given if name not in known), None):
        close = difflib.get_close_matches(unknown, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(known)}."
        raise UserError(f"The setting {shortened(unknown)!r} is unknown; {hint}")
    return [
        _checked(kind, *({name: values[name] for name in own if name in values} for values in (defaults, given)))
        for kind, own in zip(kinds, names, strict=True)
    ]


def _checked(kind: type, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a class."""
    hints = all_settings(kind)
    for name, value in given.items():
        check_type(name, value, hints[name])
    kept = {name: value for name, value in given.items() if not _is_parsed(value)}
    parsed = {name: value for name, value in (defaults | given).items() if name not in kept}
    parser = _parser(kind, skip=set(kept))
    settings: dict[str, Any] = parser.instantiate(parser.parse_object(parsed)).as_dict()
    return settings | kept


def _parser(kind: type, skip: Collection[str] = ()) -> _Parser:
    parser = _Parser()
    parser.add_class_arguments(kind, skip=set(skip), instantiate=False)
    return parser


def _is_parsed(value: Any) -> bool:
    """Return whether a value is one that the parser neither interprets, as texts, nor copies, as objects."""
    return all(isinstance(item, bool | int | float | None) for item in (value if isinstance(value, list) else [value]))
