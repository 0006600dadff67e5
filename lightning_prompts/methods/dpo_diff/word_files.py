"""Word files in the JSON layout of DPO-Diff's released files, in both of its spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError

SPELLINGS = {"synonyms": ("synonym", "sub"), "antonyms": ("antonym", "opp")}
LAYOUT = '{"a prompt": {"synonym": {"word": ["other", "words"]}, "antonym": {"word": ["opposite"]}}}'


def read_word_file(path: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Read substitutes by prompt, kind (`synonyms` or `antonyms`) and word.

    Args:
        path: A JSON file: an object of prompts, each with `synonym` or `sub` and `antonym` or `opp`, an object that has
            a list of substitutes for each word. Other keys are ignored.

    Raises:
        UserError: The file is not JSON or has another layout.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"The space {path!r} cannot be read ({error.strerror}); give a JSON file.") from error
    except RecursionError as error:
        raise UserError(f"{path!r} is nested too deeply; the layout is {LAYOUT}.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"Line {error.lineno} of {path!r} is not valid JSON ({error.msg}); the layout is {LAYOUT}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 text; save the space as UTF-8.") from error
    if not isinstance(content, dict) or not content:
        raise _layout_error(path, "it is not an object of prompts")
    return {prompt: _kinds(path, prompt, entry) for prompt, entry in content.items()}


def _kinds(path: str, prompt: str, entry: Any) -> dict[str, dict[str, list[str]]]:
    if not isinstance(entry, dict):
        raise _layout_error(path, f"the value of {prompt!r} is not an object")
    kinds = {}
    for kind, names in SPELLINGS.items():
        given: Any = next((entry[name] for name in names if name in entry), {})
        if not isinstance(given, dict):
            raise _layout_error(path, f"the {kind} of {prompt!r} are not an object of words")
        for word, others in given.items():
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                raise _layout_error(path, f"the {kind} of {word!r} in {prompt!r} are not a list of texts")
            if not others:
                raise _layout_error(path, f"the {kind} of {word!r} in {prompt!r} are empty")
        kinds[kind] = given
    return kinds


def _layout_error(path: str, reason: str) -> UserError:
    return UserError(f"The space {path!r} must have the layout {LAYOUT}; {reason}.")
