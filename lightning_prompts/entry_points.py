"""Classes of other packages, which these declare as entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lightning_prompts.errors import UserError, import_failure


def load_entry_points(group: str, kind: str) -> Iterator[tuple[EntryPoint, Any]]:
    """Import what installed packages declare in a group.

    Args:
        group: The group, such as `lightning_prompts.methods`.
        kind: The singular of what it has, for messages.

    Yields:
        Each entry point and the object that it names.

    Raises:
        UserError: An entry point cannot be imported.
    """
    for point in entry_points(group=group):
        try:
            found = point.load()
        except Exception as error:  # the other package's code may raise anything
            raise UserError(
                f"The {kind} {point.name!r} ({point.value}) cannot be imported ({import_failure(error)}); correct or "
                "uninstall its package."
            ) from error
        yield point, found
