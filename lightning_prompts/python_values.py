"""Convert Python values given to a call, and check their types."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_prompts.errors import UserError, shortened
from lightning_prompts.setting_types import IN_WORDS

_WANTED = IN_WORDS | {
    "bool": "True or False",
    "float": "a finite number",
    "NoneType": "None",
    "Byte": "a whole number from 0 to 255",
}


def plain(name: str, value: Any) -> Any:
    """Convert paths to texts, and arrays, tensors, tuples and ranges to lists or numbers, also in dictionaries.

    Other values are kept.

    Raises:
        UserError: A text is not UTF-8.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise UserError(f"The setting {name} cannot be {shortened(value)!r}, which is not UTF-8; correct it.")
    if isinstance(value, str):
        return str(value)  # for NumPy's str_ too
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(f"{name}.{key}", item) for key, item in value.items()}
    return [plain(name, item) for item in value] if isinstance(value, list | tuple | range) else value


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check a plain value against the type hint of a setting; its range is not checked.

    Raises:
        UserError: The value has another type, or is infinite or NaN.
    """
    if not _fits(value, hint):
        raise UserError(f"The setting {name} cannot be {shown(value)}; it takes {_wanted(hint)}.")


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check plain arguments against a function's type hints; see `check_type`."""
    hints = get_type_hints(function)
    for name, value in given.items():
        check_type(name, value, hints[name])


def shown(value: Any) -> str:
    """Describe a value in a message: a plain one by its repr, another by its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return shortened(repr(value))
    if isinstance(value, list | tuple):
        if all(item is None or isinstance(item, bool | int | float | str) for item in value):
            return shortened(repr(value), 80)
        return f"a list with items of type {', '.join(dict.fromkeys(type(item).__name__ for item in value))}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _fits(value: Any, hint: Any) -> bool:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Literal:
        return isinstance(value, str) and value in args
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_fits, value, args))
    if kind is not None:  # a list or a sequence
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is bool or not issubclass(hint, int | float):
        return isinstance(value, hint)
    if isinstance(value, bool) or not isinstance(value, int | float if issubclass(hint, float) else int):
        return False
    return issubclass(hint, int) or abs(value) <= sys.float_info.max


def _wanted(hint: Any) -> str:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_wanted, args))
    if kind is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind is tuple:
        return f"a list of {len(args)}, each item {_wanted(args[0])}"
    if kind is not None:
        return f"a list, each item {_wanted(args[0])}"
    article = "an" if hint.__name__[0] in "AEIOU" else "a"
    return _WANTED.get(hint.__name__, f"{article} {hint.__name__}")
