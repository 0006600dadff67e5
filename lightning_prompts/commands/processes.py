"""Choose devices and strategy of a command, before any model is loaded."""

from __future__ import annotations

import logging
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_prompts.commands.settings_checks import count_problems
from lightning_prompts.distributed import resolve_devices
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import Launched, own_rank

log = logging.getLogger(__name__)


def use_one_process(config: Any) -> None:
    """Set the Trainer's devices and strategy for a command that does not divide its work.

    All processes of a launcher take part, and Lightning starts no others.

    Args:
        config: All settings of the command, which are changed.
    """
    _set_devices(config.trainer)
    config.trainer.strategy = "auto"
    if not Launched.detect():
        config.trainer.devices = config.trainer.num_nodes = 1


def divide_search(config: Any) -> int:
    """Set the Trainer's devices and strategy for a search.

    Args:
        config: All settings of `fit`, which are changed. The strategy becomes `auto` for one process, and `problems` or
            `samples` for several.

    Returns:
        The number of parts that the problems are divided into: 1 if all processes search the same problems.

    Raises:
        UserError: The devices do not exist, or the strategy is unknown.
    """
    ranks = _set_devices(config.trainer)
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
    if config.model.class_path.endswith("HumanFeedback"):
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
