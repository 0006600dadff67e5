"""Set the length of a search by `--effort`, and keep it when the search resumes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lightning_prompts.commands.settings_checks import class_of
from lightning_prompts.effort import resumed_length, scale_length
from lightning_prompts.runs.saved_settings import SavedSettings


def given_settings(args: Sequence[str]) -> set[str]:
    """Return the settings that are given one by one: those of the method by name, others such as `--effort`."""
    return {arg.partition("=")[0].removeprefix("--model.").removeprefix("init_args.") for arg in args}


def set_length(config: Any, given: Collection[str]) -> None:
    """Scale the length of a search by its effort.

    Args:
        config: All settings of a command, which are changed.
        given: See `given_settings`.

    Raises:
        UserError: The method has no length, or the length is given too.
    """
    model = config.model
    scaled = scale_length(config.effort, class_of(model.class_path), model.init_args.as_dict(), given)
    for name, value in scaled.items():
        model.init_args[name] = value


def take_over_settings(config: Any, saved: SavedSettings, given: Collection[str]) -> None:
    """Take over the length of a run and the files of its model, where the command that resumes it does not set them.

    Args:
        config: All settings of the command, which are changed.
        saved: The settings of the run.
        given: See `given_settings`.

    Raises:
        UserError: The effort would change the length of the run.
    """
    before, model = saved.load()["model"], config.model
    for name in ("revision", "variant"):
        if model.init_args.backbone[name] is None:
            model.init_args.backbone[name] = before["init_args"]["backbone"].get(name)
    if model.class_path != before.get("class_path"):
        return  # which `check_resumable` refuses
    effort = config.effort if config.effort != "medium" or "--effort" in given else None
    settings = model.init_args.as_dict()
    length = resumed_length(
        effort, class_of(model.class_path), settings, settings | before["init_args"], given, saved.effort
    )
    for name, value in length.items():
        model.init_args[name], config.effort = value, saved.effort
