"""Methods and families of other packages: declared by an installed package, or named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lightning_prompts.backbones import Backbone
from lightning_prompts.entry_points import load_entry_points
from lightning_prompts.errors import UserError, import_failure
from lightning_prompts.methods import PromptMethod

ENTRY_POINTS = "lightning_prompts.methods"
"""The entry points by which other packages declare their methods."""


def import_plugins(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Import the methods of other packages.

    A package declares its methods in its pyproject.toml:

    ```toml
    [project.entry-points."lightning_prompts.methods"]
    MyMethod = "my_package.my_module:MyMethod"
    ```

    A module without entry points is named on the command line, as `--plugin my_module`; it may also have a family of
    models, which its import registers. A config cannot name one: configs are data, and an import runs code.

    Args:
        args: The settings of a command.

    Returns:
        The settings without `--plugin`, and the imported modules, whose classes a config may name from now on.

    Raises:
        UserError: A plugin cannot be imported or has neither method nor family, or an entry point is not a method.
    """
    modules, rest = _declared(), list[str]()
    remaining = list(args)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        if name != "--plugin":
            rest.append(f"{name}{equals}{value}")
            continue
        value = value if equals else remaining.pop(0) if remaining else ""
        if not value or value.startswith("-"):
            raise UserError("--plugin needs the name of a module, for example --plugin my_methods.")
        _import(value)
        modules.append(value)
    return rest, modules


def _declared() -> list[str]:
    """Import the methods that installed packages declare; return their modules."""
    modules = []
    for point, method in load_entry_points(ENTRY_POINTS, "method"):
        if not isinstance(method, type) or not issubclass(method, PromptMethod):
            raise UserError(
                f"The entry point {point.name!r} ({point.value}) is not a subclass of PromptMethod; correct or "
                "uninstall its package."
            )
        modules.append(method.__module__)
    return modules


def _import(module: str) -> None:
    """Import a module that defines or imports methods or families."""
    try:
        found = vars(importlib.import_module(module))
    except Exception as error:  # the module's code may raise anything
        raise UserError(
            f"--plugin {module} cannot be imported ({import_failure(error)}); check its name and its code."
        ) from error
    if not any(isinstance(value, type) and issubclass(value, PromptMethod | Backbone) for value in found.values()):
        raise UserError(
            f"--plugin {module} has neither a method nor a family, which are subclasses of PromptMethod and Backbone; "
            "name the module that has one."
        )
