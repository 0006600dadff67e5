"""What the parser of the command line, or a constructor that it calls, has to say of a mistake, as one sentence."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.setting_types import IN_WORDS, LEAST, MOST

KINDS = IN_WORDS | {
    "bool": "true or false",
    "float": "a number",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
    "Byte": "whole numbers from 0 to 255",
}
"""What the command line says that a setting takes, by the name of its type."""


def one_sentence(message: str, parser: Any) -> str:
    """The parser's many lines as one sentence, with the nearest setting that exists."""
    text = re.sub(r"\s+", " ", message).strip()
    if missing := re.search(r"following arguments are required: (.*)", text):
        absent = [f"--{name.lstrip('-').rpartition('.')[2]}" for name in missing[1].split(", ")]
        absent = ["--data.images or --data.prompts" if name == "--data" else name for name in absent]
        return f"{' and '.join(absent)} must be given, here or in a config file such as configs/invert.yaml."
    key = re.match(r'Parser key "([\w.]+)": ?', text)
    optional = re.search(r"Not of type (\w+): .*NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$", text)
    if key and optional:
        return _number(f"{key[1]}.{optional[2]}", optional[3], optional[1], ", or null")
    nested = _of_alternatives(text)
    if key and nested:  # what the parser of a class has said, in which settings lack the class's own name
        text = re.sub(r"--(?!help)(?:model\.)?(?=\w)", f"--{key[1]}.", nested, count=2)
    elif key:
        text = text[key.end() :]
    unknown = re.search(
        r"unrecognized arguments?: --?([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected|(?:Option|option) '([\w.]+)'", text
    )
    if unknown:
        given = next(filter(None, unknown.groups()))
        names = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        close = difflib.get_close_matches(given, sorted(names), 1)
        hint = f"; did you mean --{close[0]}?" if close else "; see --help for all settings."
        return f"The setting --{given} is unknown{hint}"
    if stray := re.match(r"unrecognized arguments: ([^-]\S*)", text):
        return f"The argument {stray[1]!r} is none; settings begin with --, such as --config configs/invert.yaml."
    imported = re.search(r"class_path '(.*?)'|dot import path string: (\S+)|Import path (\S+) does not", text)
    if key and imported:
        name = next(filter(None, imported.groups()))
        return f"The class {name!r} cannot be --{key[1]}; choose {_choice(message)}."
    if key and (
        number := re.match(
            r"Not of type (\w+): (?:.*(?:base 10|to float): '(.*)'|(.*) (?:does not conform|not an?))", text
        )
    ):
        return _number(key[1], number[2] or number[3], number[1])
    value = re.fullmatch(r"Expected an? (?:<class '(.*)'>|typing\.Literal\[(.*)\]|(.*))\. Got value: (.*)", text)
    if key and value:
        wanted = f"one of {value[2]}" if value[2] else KINDS.get(value[1], value[1]) or value[3]
        text = f"{value[4]!r}; it takes {wanted}."
        return f"The setting --{key[1]} cannot be {text[:400]}"
    union = re.search(r"Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)", text)
    if key and union and not nested:
        return f"The setting --{key[1]} cannot be {union[2]!r}; it takes {_alternatives(*union.groups())}."[:400]
    if key and not nested:
        text = f"--{key[1]}: {text}"
    text = re.sub(r"\b(?:fit|validate|test|predict)\.(data|model)\b", r"--\1", text)
    return text[:400]


def _of_alternatives(text: str) -> str | None:
    """Return what is wrong with the alternative of a type that was meant, of all that the parser has tried."""
    errors = re.search(r"Errors: - (.*?)(?: Given value type: |$)", text)
    told = errors[1].split(" - ") if errors else []
    return next(
        (one for one in told if not re.match(r"Expected|Not a valid|Not of type|a (?:class path|dict)", one)), None
    )


def _alternatives(kinds: str, given: str) -> str:
    """Return what a setting takes, in words, from the list of types in the parser's message."""
    words: list[str] = []
    for literals, name in re.findall(r"typing\.Literal\[(.*?)\]|<class '(?:[\w.]*\.)?(\w+)'>", kinds):
        words += [literal.strip(" '") for literal in literals.split(",")] if literals else [_of_kind(name, given)]
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)}, or {last}" if others else last


def refused_class(error: ValueError) -> str | None:
    """Return as a sentence why a class that a setting names could not be instantiated; None for any other error."""
    text = re.sub(r"\s+", " ", str(error))
    named, why = re.search(r"class_path='(?:[\w.]*\.)?(\w+)'", text), _of_alternatives(text)
    if not text.startswith("Does not validate") or not named or not why:
        return None
    why = re.sub(r"^Problem with given class_path '[\w.]*': ", "", why).replace(". HINT: ", "; ")
    return f"{named[1]} cannot be used: {why[:400].rstrip('.')}."


def _number(setting: str, given: str, kind: str, otherwise: str = "") -> str:
    """Say what a setting takes that is a number in a range, see `ranges`."""
    return f"The setting --{setting} cannot be {given[:40]}; it takes {_of_kind(kind, given)}{otherwise}."


def _of_kind(kind: str, given: str) -> str:
    """Return what a setting of a type takes, in words; the largest number only where the given one is too large."""
    if kind in LEAST and re.fullmatch(r"\d{10,}", given):
        return f"a whole number from {LEAST[kind]} to {MOST}"
    return KINDS.get(kind, kind)


def _choice(message: str) -> str:
    """The classes that could stand where the parser has refused one."""
    base = re.search(r"<class '(lightning_prompts\.[\w.]+)'>", message)
    open_, found = [pydoc.locate(base[1])] if base else [], set()
    while open_:
        kind: Any = open_.pop()
        open_ += kind.__subclasses__()
        if not inspect.isabstract(kind):
            found.add(kind.__name__)
    return f"one of {', '.join(sorted(found))}" if found else "one that --help names"


def mistake_in(error: BaseException | None) -> UserError | None:
    """The person's mistake that a constructor has reported and jsonargparse wrapped."""
    while error and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, UserError) else None
