"""Save checkpoints in one piece, and find the newest that can be read."""

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
    from lightning_prompts.engine.datamodule import ProblemData, Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

FIELDS = {field.name for field in fields(Problem)}
NAME = re.compile(r"rank(\d+)-step(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, verify, and rename.

    Lightning's own class writes to the temporary folder and may fail silently.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save a checkpoint in one piece."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # write nothing that could not be read again
        atomic_write(path, buffer.getvalue())


class SavedConfig(Checkpoint):
    """Write the settings of a run when its search starts or resumes, so that a refused command does not change them.

    Lightning calls a `Checkpoint` after the other callbacks.

    Args:
        path: The file.
        settings: The settings as YAML.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Write the settings; this hook is also called when a search resumes in the middle of an epoch."""
        atomic_write(self.path, self.settings.encode())


class PromptCheckpoint(Checkpoint):
    """Keep the two newest checkpoints; a `Checkpoint` is called after the callbacks that project and score.

    Args:
        folder: The folder of the checkpoints.
        seconds: Time between saves. A checkpoint is also saved whenever a problem finished or took its first step, so
            that a resumed search repeats no finished problem and has the same problems in the batch.
    """

    def __init__(self, folder: Path, seconds: float = 20) -> None:
        self.folder, self.seconds = folder, seconds
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Save if a problem changed its status or enough time has passed."""
        changed = any(not row.active or row.steps == 1 for row in pl_module.batch.rows)
        if changed or time.monotonic() - self._saved >= self.seconds:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Save at the end."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: PromptMethod, exception: BaseException) -> None:
        """Log how to resume a search that the user or a signal stopped."""
        if trainer.training and trainer.is_global_zero and isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            log.info("Stopped; the same command with --run %s --ckpt_path last resumes it.", self.folder.parent)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = time.monotonic()
        data: ProblemData = trainer.datamodule  # type: ignore[attr-defined]
        rank = data.part[0]
        try:
            trainer.save_checkpoint(self.folder / f"rank{rank}-step{trainer.fit_loop.total_batch_idx + 1:08d}.ckpt")
        except OSError as error:  # the prompts are in their records, and the older checkpoint is still there
            log.warning("The checkpoint could not be written (%s); the run continues.", error)
            return
        for old in _newest_first(self.folder, rank)[2:] if data.folder.writes else ():
            old.unlink(missing_ok=True)


def last_checkpoint(folder: Path, rank: int = 0) -> Path | None:
    """Return a rank's newest checkpoint that can be read."""
    for path in _newest_first(folder, rank):
        if is_checkpoint(path):
            return path
        log.warning("The checkpoint %s is broken; using the one before.", path)
    return None


class SavedBatch(TypedDict):
    """The batch in a checkpoint: each list has an entry per row."""

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
    """The parts of a checkpoint that a search needs to resume."""

    batch: SavedBatch
    state_dict: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[Any]
    loops: dict[str, Any]
    callbacks: dict[str, Any]
    epoch: int
    global_step: int


def checkpoints_of_all(folder: Path) -> list[dict[str, Any]]:
    """Load the newest checkpoint of every rank that has one."""
    paths = [path for rank in ranks_in(folder) if (path := last_checkpoint(folder, rank))]
    return [torch.load(path, weights_only=True, map_location="cpu") for path in paths]


def ranks_in(folder: Path) -> list[int]:
    """Return the ranks that have checkpoints."""
    names = (NAME.fullmatch(path.name) for path in folder.glob("rank*-step*.ckpt"))
    return sorted({int(name[1]) for name in names if name})


def parts_of(path: Path) -> int:
    """Return the number of parts into which the problems were divided when a checkpoint was saved."""
    return int(torch.load(path, weights_only=True, map_location="cpu")["batch"]["parts"])


def _newest_first(folder: Path, rank: int) -> list[Path]:
    """Return a rank's checkpoints by time: a search that resumed from an older one saves at lower steps."""
    paths = (path for path in folder.glob(f"rank{rank}-step*.ckpt") if NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a complete checkpoint of this package."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        _type().validate_python(saved)
        batch, (prompts,) = saved["batch"], saved["state_dict"].values()
        rows = {len(values) for values in batch.values() if isinstance(values, list)}
        # Lightning saves the state {} where a method has no optimizer, as GCG has none.
        known = all(not state or {"state", "param_groups"} <= state.keys() for state in saved["optimizer_states"])
        known &= all(record.keys() <= FIELDS for record in batch["records"]) and "pytorch-lightning_version" in saved
        return rows == {len(prompts)} and known and "fit_loop" in saved["loops"] and batch["parts"] > 0
    except Exception:  # the type depends on the kind of file
        return False


@cache
def _type() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Saved)
