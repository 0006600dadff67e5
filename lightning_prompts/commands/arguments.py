"""Prepare the arguments of a command for the parser."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_prompts.callbacks import Scores
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.errors import UserError
from lightning_prompts.methods import PromptMethod
from lightning_prompts.text_settings import Text, keep_texts, text_settings


def prepare_arguments(command: str, args: Sequence[str]) -> list[str]:
    """Add the class of the data if it is not given, and keep the parser from reading texts as YAML, see `keep_texts`.

    Args:
        command: The command.
        args: Its settings.

    Raises:
        UserError: A setting is empty that cannot be, or a text is not UTF-8.
    """
    settings = {"data": text_settings(ProblemData), "model": text_settings(PromptMethod), "": text_settings(Scores)}
    if command == "predict":
        settings[""]["prompts"] = Text(several=True, optional=False)
    prepared = keep_texts(_with_data_class(args), settings)
    if empty := next((arg for arg in prepared if re.fullmatch(r"--[\w.]+=", arg)), None):
        raise UserError(f"The setting {empty[:-1]} cannot be empty; give a value, or leave it out.")
    return prepared


def _with_data_class(args: Sequence[str]) -> list[str]:
    """Put the class of the data first if settings of it are given; a config or --data after it takes precedence."""
    given = [arg for arg in args if arg.startswith("--data.") and not arg.startswith("--data.help")]
    name = "Prompts" if any(arg.startswith("--data.prompts") for arg in given) else "ImagesToPrompts"
    return ["--data", name, *args] if given else [*args]
