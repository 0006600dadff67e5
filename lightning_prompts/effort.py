"""One setting for the length of any search: `--effort light`, or `effort="light"` in Python."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning_prompts.errors import UserError
from lightning_prompts.setting_types import MOST

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

Effort: TypeAlias = Literal["light", "medium", "heavy"]

FACTORS: Mapping[Effort, Fraction] = {"light": Fraction(1, 3), "medium": Fraction(1), "heavy": Fraction(3)}
"""Factors on the length of a search: a third and three times the steps, or the budget, of the config."""


def scale_length(
    effort: Effort, method: type[PromptMethod], settings: Mapping[str, Any], given: Collection[str]
) -> dict[str, int]:
    """Scale the length of a search by an effort, rounded up.

    Args:
        effort: The effort.
        method: Class of the method, whose `search_length` names the setting to scale.
        settings: All settings of the method, with its defaults.
        given: The settings that the user gave one by one, not in a config.

    Returns:
        The setting and its new value, such as `{"steps": 30}`; nothing for `medium`, which keeps the settings.

    Raises:
        UserError: The method has no length, or the user gave it too.
    """
    if effort == "medium":
        return {}
    length = method.search_length(settings)
    if length is None:
        raise UserError(
            f"--effort {effort} has no effect on {method.__name__}, whose search has no length to scale; leave it out."
        )
    name, value = length
    if name in given:
        raise UserError(
            f"--effort {effort} and --model.{name} {value} both set the length of the search; give only one of them."
        )
    return {name: min(math.ceil(value * FACTORS[effort]), MOST)}


def resumed_length(
    effort: Effort | None,
    method: type[PromptMethod],
    settings: Mapping[str, Any],
    saved: Mapping[str, Any],
    given: Collection[str],
    saved_effort: Effort,
) -> dict[str, int]:
    """Return the length with which a search resumes: that of the run, unless the user gave another one.

    Args:
        effort: The effort that the user gave; None for none.
        method: Class of the method.
        settings: All settings of the method, already scaled.
        saved: All settings of the method that the run was started with.
        given: The settings that the user gave one by one, not in a config.
        saved_effort: The effort that the run was started with.

    Returns:
        The setting and its value; nothing where the settings have the length already.

    Raises:
        UserError: The effort would change the length of the run.
    """
    now, before = method.search_length(settings), method.search_length(saved)
    if now is None or before is None or now == before:
        return {}
    name, value = before
    if effort:
        raise UserError(
            f"The run was started with --model.{name} {value} and cannot resume with --effort {effort}, which gives "
            f"{now[1]}; leave out --effort to resume, or give another --run."
        )
    return {} if saved_effort == "medium" or name in given else {name: value}
