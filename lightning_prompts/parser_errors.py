"""Turn errors of the command line's parser, and of the constructors that it calls, into one sentence."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.optimizers import optimizer_names, optimizer_settings
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
"""The values that a setting takes, in words, by the name of its type."""


def one_sentence(message: str, parser: Any) -> str:
    """Return an error of the parser, which may have many lines, as one sentence.

    Args:
        message: The error.
        parser: The parser, whose settings are searched for one similar to an unknown one.
    """
    text = re.sub(r"\s+", " ", message).strip()
    key = re.match(r'Parser key "([\w.]+)": ?', text)
    nested = _of_alternatives(text) if key else None
    sentence = (key and (_wrong_optimizer(key[1], text) or _wrong_group(key[1], text))) or _missing(text)
    if key and nested:  # an error of the parser of a class, whose settings lack the prefix of the class
        count = 0 if "is unknown" in nested else 2  # all settings of a hint, or the first two names of another error
        text = re.sub(r"--(?!help)(?:model\.)?(?=\w)", f"--{key[1]}.", nested, count=count)
    elif key:
        text = text[key.end() :]
    sentence = sentence or _unknown(text, parser) or (key and _wrong_value(key[1], text, message))
    if sentence:
        return sentence[:400]
    if key and not nested:
        text = f"--{key[1]}: {text}"
    return re.sub(r"\b(?:fit|validate|test|predict)\.(data|model)\b", r"--\1", text)[:400]


def _missing(text: str) -> str | None:
    """Name the settings that must be given."""
    missing = re.search(r"following arguments are required: (.*)", text)
    if not missing:
        return None
    required = [f"--{name.lstrip('-').rpartition('.')[2]}" for name in missing[1].split(", ")]
    required = ["--data.images or --data.prompts" if name == "--data" else name for name in required]
    return f"{' and '.join(required)} must be given, here or in a config file such as configs/invert.yaml."


def _wrong_group(key: str, text: str) -> str | None:
    """Name a setting of a group, such as --model.backbone, that is not a number in its range."""
    number = re.search(r"Not of type (\w+): .*NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$", text)
    return _number(f"{key}.{number[2]}", number[3], number[1], ", or null") if number else None


def _unknown(text: str, parser: Any) -> str | None:
    """Name a setting or an argument that does not exist, and a setting with a similar name."""
    unknown = re.search(
        r"unrecognized arguments?: --?([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected"
        r"|(?:Group '([\w.]+)' does not accept )?[Oo]ption '([\w.]+)'",
        text,
    )
    if unknown:
        given = ".".join(filter(None, unknown.groups()))
        names = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        if "optimizer" in names:  # whose settings depend on its class, and are not the parser's
            names |= {f"optimizer.{setting}" for setting in optimizer_settings()}
        similar = [f"--{name}" for name in similar_settings(given, names)]
        hint = f"did you mean {' or '.join(similar)}?" if similar else "see --help for all settings."
        return f"The setting --{given} is unknown; {hint}"
    if stray := re.match(r"unrecognized arguments: ([^-]\S*)", text):
        return f"The argument {stray[1]!r} is unknown; settings begin with --, such as --config configs/invert.yaml."
    return None


def _wrong_value(key: str, text: str, message: str) -> str | None:
    """Name a setting whose value has another type or is out of range, and what it takes."""
    if tensor := re.search(r"Subtypes: \[<class 'float'>, <class 'torch.Tensor'>\].* Given value: (\S+)", text):
        return f"The setting --{key} cannot be {tensor[1].replace('None', 'null')}; it takes {KINDS['float']}."
    if imported := re.search(r"class_path '(.*?)'|dot import path string: (\S+)|Import path (\S+) does not", text):
        name = next(filter(None, imported.groups()))
        own = ", or name the module of your own with --plugin" if key == "model" else ""
        return f"The class {name!r} cannot be --{key}; choose {_choice(message)}{own}."
    if number := re.match(
        r"Not of type (\w+): (?:.*(?:base 10|to float): '(.*)'|(.*) (?:does not conform|not an?))", text
    ):
        return _number(key, number[2] or number[3], number[1])
    if value := re.fullmatch(r"Expected an? (?:<class '(.*)'>|typing\.Literal\[(.*)\]|(.*))\. Got value: (.*)", text):
        wanted = f"one of {value[2]}" if value[2] else KINDS.get(value[1], value[1]) or value[3]
        return f"The setting --{key} cannot be {value[4]!r}; it takes {wanted}."
    if union := re.search(r"Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)", text):
        return f"The setting --{key} cannot be {union[2]!r}; it takes {_alternatives(*union.groups())}."
    return None


def similar_settings(unknown: str, known: Iterable[str]) -> list[str]:
    """Return the settings that an unknown one may mean: those of its name in any group, or else the most similar one.

    Args:
        unknown: The unknown setting, which may have a group, such as `dtype` or `sampler.dtype`.
        known: All settings, those of a group such as `backbone.dtype`.
    """
    by_name: dict[str, list[str]] = {}
    for setting in sorted(known):
        by_name.setdefault(setting.rpartition(".")[2], []).append(setting)
    name = unknown.rpartition(".")[2]
    if name in by_name:
        return by_name[name]
    settings = [setting for several in by_name.values() for setting in several]
    if close := difflib.get_close_matches(unknown, settings, 1):
        return close
    return [setting for similar in difflib.get_close_matches(name, by_name, 1) for setting in by_name[similar]]


def _wrong_optimizer(key: str, text: str) -> str | None:
    """Name a setting of an optimizer, of which the optimizer's own parser has said what is wrong, or the optimizers."""
    if key != "optimizer":
        return None
    if wrong := re.search(r"The setting (?:--)?\w.*", text):  # in Python, settings have no dashes
        return re.sub(r"(The setting |did you mean )(?:--)?", r"\1--optimizer.", wrong[0])
    if several := re.search(r"Multiple subclasses with name (\w+)", text):
        return f"There are several classes {several[1]}; give --optimizer torch.optim.{several[1]}."
    given = re.search(r"Expected a path but (\S*) either|(?:path string: |class_path=?'|Expected ')([\w.]+)", text)
    name = (given[1] or given[2] or "") if given else ""
    return f"The class {name!r} cannot be --optimizer; choose one of {', '.join(optimizer_names())}."


def _of_alternatives(text: str) -> str | None:
    """Return the error of the alternative that was meant, of the alternatives of a type that the parser has tried."""
    errors = re.search(r"Errors: - (.*?)(?: Given value type: |$)", text)
    reasons = errors[1].split(" - ") if errors else []
    mismatch = r"Expected|Not a valid|Not of type|a (?:class path|dict)"
    return next((reason for reason in reasons if not re.match(mismatch, reason)), None)


def _alternatives(kinds: str, given: str) -> str:
    """Return the values that a setting takes, in words, from the list of types in the parser's message."""
    words: list[str] = []
    for literals, name in re.findall(r"typing\.Literal\[(.*?)\]|<class '(?:[\w.]*\.)?(\w+)'>", kinds):
        words += [literal.strip(" '") for literal in literals.split(",")] if literals else [_of_kind(name, given)]
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)}, or {last}" if others else last


def refused_class(error: ValueError) -> str | None:
    """Return in one sentence why a class that a setting names could not be instantiated; None for any other error."""
    text = re.sub(r"\s+", " ", str(error))
    name, reason = re.search(r"class_path='(?:[\w.]*\.)?(\w+)'", text), _of_alternatives(text)
    if not text.startswith("Does not validate") or not name or not reason:
        return None
    reason = re.sub(r"^Problem with given class_path '[\w.]*': ", "", reason).replace(". HINT: ", "; ")
    return f"{name[1]} cannot be used: {reason[:400].rstrip('.')}."


def _number(setting: str, given: str, kind: str, otherwise: str = "") -> str:
    """Return the error of a setting that takes a number in a range, see `setting_types`."""
    return f"The setting --{setting} cannot be {given[:40]}; it takes {_of_kind(kind, given)}{otherwise}."


def _of_kind(kind: str, given: str) -> str:
    """Return the values of a type in words, with the largest number only where the given one is too large."""
    if kind in LEAST and re.fullmatch(r"\d{10,}", given):
        return f"a whole number from {LEAST[kind]} to {MOST}"
    return KINDS.get(kind, kind)


def _choice(message: str) -> str:
    """Return the classes that a setting takes, in words, from the base class in the parser's message."""
    base = re.search(r"<class '(lightning_prompts\.[\w.]+)'>", message)
    queue, names = [pydoc.locate(base[1])] if base else [], set()
    while queue:
        kind: Any = queue.pop()
        queue += kind.__subclasses__()
        if not inspect.isabstract(kind):
            names.add(kind.__name__)
    return f"one of {', '.join(sorted(names))}" if names else "one of those in --help"


def mistake_in(error: BaseException | None) -> UserError | None:
    """Return the UserError that a constructor raised and jsonargparse wrapped; None if there is none."""
    while error and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, UserError) else None
