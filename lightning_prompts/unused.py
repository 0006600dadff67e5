"""Refuse settings that would have no effect."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_prompts.errors import UserError


def refuse_unused(owner: type, because: str, given: Mapping[str, Any], prefix: str = "--model") -> None:
    """Refuse settings that are not at their defaults although another setting makes them ineffective.

    Args:
        owner: The class of the settings.
        because: The other setting, such as "with --model.solver random".
        given: Values by the settings' names.
        prefix: Prefix of the names on the command line.

    Raises:
        UserError: A value is not the default.
    """
    for name, value in given.items():
        default = default_of(owner, name)
        if value != default:
            raise UserError(f"{prefix}.{name} has no effect {because}, got {value}; leave it out or at {default}.")


def default_of(owner: type, name: str) -> Any:
    """Return the default of a setting of a class or of one of its bases."""
    for base in owner.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        if name in parameters:
            return parameters[name].default
    raise AttributeError(f"{owner.__name__} has no setting {name!r}.")
