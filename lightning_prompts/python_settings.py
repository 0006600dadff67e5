"""Check settings given as Python values with the command line's parser."""

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
    """Rewrite the settings in a command-line message as Python arguments, such as `--model.tokens 8` as `tokens=8`."""

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

    The parser would read `"3"` as a number, `"null"` as None and a file name as the file's content. So the types are
    checked here, and the parser only checks the ranges of numbers and the values of a config; texts and objects are
    passed on unchanged.

    Args:
        kinds: The classes.
        defaults: Settings of a config, in which classes are given by name.
        given: Settings of the user, which may be objects.

    Returns:
        All settings of each class.

    Raises:
        UserError: A setting is unknown, missing, or of the wrong type or range.
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
    """Return the checked settings of one class, including its defaults."""
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
    """Return whether the parser checks a value: no text, which it would interpret, and no object, which it would copy."""
    return all(isinstance(item, bool | int | float | None) for item in (value if isinstance(value, list) else [value]))
