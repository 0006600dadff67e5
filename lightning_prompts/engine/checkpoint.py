"""Checkpoints that are whole or not there."""

from __future__ import annotations

import io
import logging
import os
import re
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import TypedDict

from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.record import Problem

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

FIELDS = {field.name for field in fields(Problem)}
NAME = re.compile(r"rank(\d+)-step(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, verifies and renames; Lightning's own stages in the temporary folder and may fail silently."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # what could not be read again is not written
        atomic_write(path, buffer.getvalue())


class SavedConfig(Checkpoint):
    """Writes a run's settings when its search begins or goes on; what is refused before leaves those of the run as they were.

    Lightning calls a `Checkpoint` after other callbacks, and several in their order.

    Args:
        path: Where they go.
        settings: The settings as YAML.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Writes them; a wave that goes on in its middle has no other beginning."""
        atomic_write(self.path, self.settings.encode())


class PromptCheckpoint(Checkpoint):
    """Keeps the two newest states of the wave; as a `Checkpoint` it comes after what projects and scores.

    Args:
        folder: Where they go.
        seconds: Time between saves. It is saved, too, whenever a problem has finished or has taken its first step: so when a search
            that was killed goes on, what has left the wave is not searched again, and what joins does so in the same company.
    """

    def __init__(self, folder: Path, seconds: float = 20) -> None:
        self.folder, self.seconds = folder, seconds
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Saves when it is time."""
        changed = any(not row.active or row.steps == 1 for row in pl_module.batch.rows)
        if changed or time.monotonic() - self._saved >= self.seconds:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Saves at the end."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: PromptMethod, exception: BaseException) -> None:
        """Says how a search that a person or a signal has stopped goes on."""
        if trainer.training and trainer.is_global_zero and isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            log.info("Stopped; the same command with --run %s --ckpt_path last goes on.", self.folder.parent)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = time.monotonic()
        rank = trainer.datamodule.part[0]  # type: ignore[attr-defined]
        try:
            trainer.save_checkpoint(self.folder / f"rank{rank}-step{trainer.fit_loop.total_batch_idx + 1:08d}.ckpt")
        except OSError as error:  # prompts are safe in their records; an older state is still there to go on from
            log.warning("The checkpoint could not be written (%s); the run goes on.", error)
            return
        for old in _newest_first(self.folder, rank)[2:] if trainer.datamodule.folder.writes else ():  # type: ignore[attr-defined]
            old.unlink(missing_ok=True)


def last_checkpoint(folder: Path, rank: int = 0) -> Path | None:
    """A rank's newest checkpoint that can be read; a broken one is passed over for the one before."""
    for path in _newest_first(folder, rank):
        if is_checkpoint(path):
            return path
        log.warning("The checkpoint %s is broken; the one before is used.", path)
    return None


class SavedBatch(TypedDict):
    """What a checkpoint holds of the batch: in every list an entry for each row."""

    records: list[Problem]
    active: list[bool]
    steps: list[int]
    stale: list[int]
    halvings: list[int]
    skipped: list[int]
    best: list[Any]
    parts: int
    microbatch: int


class Saved(TypedDict):
    """What Lightning's and this package's parts of a checkpoint have in common."""

    batch: SavedBatch
    state_dict: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[Any]
    loops: dict[str, Any]
    callbacks: dict[str, Any]
    epoch: int
    global_step: int


def checkpoints_of_all(folder: Path) -> list[dict[str, Any]]:
    """The newest checkpoint of every rank that has left one."""
    paths = [path for rank in ranks_in(folder) if (path := last_checkpoint(folder, rank))]
    return [torch.load(path, weights_only=True, map_location="cpu") for path in paths]


def ranks_in(folder: Path) -> list[int]:
    """The ranks that have left checkpoints."""
    names = (NAME.fullmatch(path.name) for path in folder.glob("rank*-step*.ckpt"))
    return sorted({int(name[1]) for name in names if name})


def parts_of(path: Path) -> int:
    """Into how many parts the problems were divided when a checkpoint was saved."""
    return int(torch.load(path, weights_only=True, map_location="cpu")["batch"]["parts"])


def _newest_first(folder: Path, rank: int) -> list[Path]:
    """A rank's; a search that went on from an older one is at a lower step than those that it has left behind."""
    paths = (path for path in folder.glob(f"rank{rank}-step*.ckpt") if NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file is a checkpoint of this package that can be read, and has all that a search continues with."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        _type().validate_python(saved)
        batch, (prompts,) = saved["batch"], saved["state_dict"].values()
        rows = {len(values) for values in batch.values() if isinstance(values, list)}
        # Lightning saves the state {} where a method has no optimizer, as GCG has none.
        known = all(not state or {"state", "param_groups"} <= state.keys() for state in saved["optimizer_states"])
        known &= all(record.keys() <= FIELDS for record in batch["records"]) and "pytorch-lightning_version" in saved
        return rows == {len(prompts)} and known and "fit_loop" in saved["loops"] and batch["parts"] > 0
    except Exception:  # whatever a file that is none makes of torch's unpickler
        return False


@cache
def _type() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Saved)
