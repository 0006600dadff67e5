"""Build the Trainer of a run and its callbacks, for the command line and for the calls of `lightning_prompts.api`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from lightning_prompts.callbacks import OwnerGuard
from lightning_prompts.engine.checkpoint import PromptCheckpoint, SavedConfig
from lightning_prompts.engine.trainer_settings import TRAINER
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock

TRAINER_DEFAULTS: dict[str, Any] = TRAINER | {"enable_checkpointing": True}
"""Trainer settings of a run. PromptCheckpoint is its checkpoint callback, so Lightning adds none."""


def run_callbacks(
    lock: RunLock | None,
    results: pl.Callback,
    *,
    user_callbacks: Sequence[pl.Callback] = (),
    folder: RunFolder | None = None,
    config: str = "",
) -> list[pl.Callback]:
    """Return the callbacks of a run, in the order in which the Trainer gets them.

    Args:
        lock: The lock on the run's folder; None without a folder, and in processes after the first.
        results: The callback that writes the results.
        user_callbacks: The user's callbacks, which are called before the results are written.
        folder: Folder to save checkpoints in; None to save none.
        config: Settings to save in the folder when the search starts, as YAML; empty to save none.
    """
    saving: list[pl.Callback] = []
    if folder:
        saving = [SavedConfig(folder.config, config)] if config else []
        saving.append(PromptCheckpoint(folder.checkpoints))
    return [OwnerGuard(lock), *user_callbacks, results, *saving]


def build_trainer(settings: Mapping[str, Any], callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Build the Trainer.

    Args:
        settings: Settings of the Trainer, other than its callbacks.
        callbacks: Its callbacks.

    Raises:
        UserError: The Trainer refuses a setting.
    """
    try:
        return pl.Trainer(**{**settings, "callbacks": [*callbacks]})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"The Trainer does not take these settings: {first_sentence(error)}") from error


@contextmanager
def held_folder(folder: RunFolder) -> Iterator[RunLock]:
    """Hold the lock on a run's folder, and delete a new folder again if an error ends the run before its search starts.

    Raises:
        UserError: Another process works in the folder, or it is a file or cannot be written.
    """
    new = not folder.path.exists()
    with folder.locked() as lock:
        try:
            yield lock
        except BaseException:
            if new and not lock.taken:
                folder.discard()
            raise
