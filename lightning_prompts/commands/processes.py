"""Choose devices and strategy of a command, before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_prompts.commands.settings_checks import count_problems
from lightning_prompts.distributed import resolve_devices
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import Launched, lightning_launcher, own_rank, started_by_lightning

log = logging.getLogger(__name__)


@contextmanager
def processes(config: Any, command: str, run: Path | None) -> Iterator[int]:
    """Set the Trainer's devices and strategy, and let Lightning start the other processes if no launcher has.

    Args:
        config: All settings of the command, which are changed. The strategy becomes `auto` for one process, and
            `problems` or `samples` for several.
        command: The command.
        run: The given folder of the run.

    Yields:
        The number of parts that the problems are divided into: 1 if all processes have the same problems.

    Raises:
        UserError: The devices do not exist, the strategy is unknown, or the processes have no common folder.
    """
    launched = Launched.detect()
    if launched and launched.processes * launched.machines > 1 and not run and command not in ("check", "dry-run"):
        raise UserError(f"Processes started by {launched.by} need a common folder; give --run runs/NAME.")
    ranks = _set_devices(config.trainer)
    if _divides(config, command):
        parts = _divide(config, command, ranks)
    else:
        parts = 1
        config.trainer.strategy = "auto"
        if not launched:  # else all of its processes take part
            config.trainer.devices = config.trainer.num_nodes = 1
    with ExitStack() as until_end:
        if config.trainer.strategy != "auto" and not launched and not started_by_lightning():
            until_end.enter_context(lightning_launcher())
        yield parts


def _divides(config: Any, command: str) -> bool:
    """Return whether several processes divide the work of a command."""
    if command == "predict":
        return not config.path and not config.mix and not _asks_user(config)
    return command == "fit" or (command in ("validate", "test") and not _asks_user(config))


def _asks_user(config: Any) -> bool:
    """Return whether the method is `HumanFeedback`, which runs in one process."""
    return str(config.model.class_path).endswith("HumanFeedback")


def _divide(config: Any, command: str, ranks: int) -> int:
    """Choose the strategy of a number of processes; return the number of parts that the problems are divided into."""
    strategy = config.trainer.strategy
    if strategy not in ("auto", "problems", "samples"):
        raise UserError(
            f"--trainer.strategy {strategy!r} divides a model or its gradients, and a search has neither to divide; "
            "give --trainer.strategy problems (each process searches its own) or samples (all search the same and "
            "divide the samples)."
        )
    if ranks == 1:
        config.trainer.strategy = "auto"
        return 1
    if command != "fit":  # the prompts are independent of each other, whatever strategy found them
        config.trainer.strategy = "problems"
        return ranks
    if _asks_user(config):
        raise UserError("HumanFeedback asks one user, so it runs in one process; give --trainer.devices 1.")
    problems = count_problems(config.data)
    if strategy == "auto":
        strategy = config.trainer.strategy = "problems" if problems >= ranks else "samples"
    if strategy == "problems" and problems < ranks and own_rank() == 0:
        log.warning(
            "%d of %d processes have nothing to do, as there are %d problems; --trainer.strategy samples divides the "
            "samples of each.",
            *(ranks - problems, ranks, problems),
        )
    return ranks if strategy == "problems" else 1


def _set_devices(trainer: Any) -> int:
    """Set the devices per machine and the number of machines; return the number of processes."""
    trainer.devices, trainer.num_nodes, ranks = resolve_devices(trainer, Launched.detect())
    return ranks


def cluster_environment() -> ClusterEnvironment:
    """Return Lightning's plugin for the launcher of this process, which Lightning would guess otherwise.

    SLURM does not queue a job again by itself: the job's script does, and resumes from the checkpoints of all ranks.
    """
    launched = Launched.detect()
    if launched is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if launched.by == "torchrun" else SLURMEnvironment(auto_requeue=False)
