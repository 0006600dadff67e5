"""Several processes: `--trainer.devices 8`, torchrun or srun; each with its own problems, or all with a share of every problem's work."""

from __future__ import annotations

import atexit
import logging
import secrets
import time
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.distributed import _destroy_dist_connection
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.launchers import Launched

T = TypeVar("T")

log = logging.getLogger(__name__)

MOST_PROCESSES = 1024  # on a machine
JOINING = timedelta(minutes=10)  # until all processes have come: machines of a job may start minutes apart
LONG = timedelta(days=30)  # of a rank's work until it meets the others; torchrun and srun notice those that are lost


def ranks_of(trainer: Any, launched: Launched | None) -> tuple[Any, int, int]:
    """Devices of each machine, machines and processes in all; a UserError where there are not so many."""
    asked, machines = trainer.devices, int(trainer.num_nodes)
    accelerators = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if trainer.accelerator not in accelerators:
        raise UserError(
            f"--trainer.accelerator cannot be {trainer.accelerator!r}; it takes one of {', '.join(sorted({*accelerators}))}."
        )
    if machines < 1:
        raise UserError(f"--trainer.num_nodes cannot be {machines}; it takes a whole number from 1 on.")
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    there = torch.cuda.device_count() if on_gpu else None
    if str(asked) in ("auto", "-1"):
        here = there or 1
    elif isinstance(asked, list) or "," in str(asked):
        names = asked if isinstance(asked, list) else [name.strip() for name in asked.split(",") if name.strip()]
        here = len({str(name) for name in names})
        if there is None or not here or here < len(names):
            wanted = "a number of processes" if there is None else "the numbers of different GPUs"
            raise UserError(f"--trainer.devices cannot be {asked}; it takes {wanted} here.")
    else:
        here = _count(asked)
    if launched:
        if (here, machines) not in ((1, 1), (launched.processes, launched.machines)):
            raise UserError(
                f"{launched.by} has started {launched.processes} processes on {launched.machines} machines, and --trainer.devices "
                f"{asked} with --trainer.num_nodes {machines} are others; leave both out."
            )
        asked = here = launched.processes
        machines = launched.machines
    elif machines > 1:
        raise UserError("Several machines are not reached from here; start the command on them with torchrun or srun.")
    if there == 0:
        raise UserError(
            f"--trainer.accelerator cannot be {trainer.accelerator!r}, since this machine has no GPU; give cpu or auto."
        )
    if there is not None and here > there:
        raise UserError(f"{here} GPUs were asked for and this machine has {there}; give --trainer.devices {there}.")
    if launched and here * machines > 1:
        launched.check_address()
    return asked, machines, here * machines


def _count(devices: Any) -> int:
    """Return how many devices were asked for as a number."""
    try:
        count = int(devices)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST_PROCESSES:
        raise UserError(
            f"--trainer.devices cannot be {devices!r}; it takes a number of processes from 1 to {MOST_PROCESSES}, or auto."
        )
    return count


class _Apart(DDPStrategy):
    """Processes of which Lightning reduces nothing: there is no gradient of a wrapped module to exchange."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(process_group_backend=kwargs.pop("process_group_backend", None), timeout=LONG, **kwargs)

    def setup_distributed(self) -> None:
        """Meet the other processes, or say within minutes that they do not come; once met, they may work for long."""
        if not dist.is_initialized():
            self.set_world_ranks()
            environment = self.cluster_environment
            store = joined(environment.main_address, environment.main_port, self.global_rank, self.world_size)  # type: ignore[union-attr]
            device = self.root_device if self.root_device.type != "cpu" else None
            backend = self._get_process_group_backend()
            dist.init_process_group(
                backend, timeout=LONG, world_size=self.world_size, rank=self.global_rank, store=store,
                device_id=device,
            )  # fmt: skip
            if backend == "nccl":
                atexit.register(_destroy_dist_connection)  # as Lightning does for a group that it has made
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Does not wait."""


class ProblemParallel(_Apart):
    """Ranks do not speak to each other between start and end.

    Each has as many problems as fall to it, takes as many steps as these need and writes its own checkpoints; records by key are
    the only exchange. So nothing is wrapped, reduced or waited for, until rank 0 merges the results.
    """

    strategy_name = "problems"

    def setup(self, trainer: pl.Trainer) -> None:
        """Has no rank tell the others that it was told to stop: they may be at different steps, or gone."""
        super().setup(trainer)
        connector = trainer._signal_connector

        def told(signum: int, frame: Any) -> None:
            if not connector.received_sigterm and self.launcher:
                self.launcher.kill(signum)
            connector.received_sigterm = True

        connector._sigterm_notifier_fn = told  # type: ignore[method-assign,assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Keeps one's own."""
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps one's own."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decides alone."""
        return decision

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every rank saves its own."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class SampleParallel(_Apart):
    """All ranks search the same problems, in the same steps, and divide the samples of every step, see `shared`.

    Rank 0 writes.
    """

    strategy_name = "samples"

    def setup(self, trainer: pl.Trainer) -> None:
        """Has all ranks stop at the same step, whichever of them was told to."""
        super().setup(trainer)
        connector, heard = trainer._signal_connector, torch.zeros(1, device=self.root_device)

        def told(signum: int, frame: Any) -> None:
            if not heard and self.launcher:
                self.launcher.kill(signum)
            heard.fill_(1)

        def agree() -> None:
            anyone = heard.clone()
            dist.all_reduce(anyone, dist.ReduceOp.MAX)
            if anyone:
                connector.received_sigterm = True
                raise SIGTERMException

        connector._sigterm_notifier_fn = told  # type: ignore[method-assign,assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = agree  # type: ignore[method-assign]


def joined(address: str, port: int, rank: int, ranks: int) -> Any:
    """Meet all processes at the first one's address; return a store that they have in common.

    Raises:
        UserError: Not all of them have come in time.
    """
    minutes, began = int(JOINING.total_seconds() / 60), time.monotonic()
    if rank == 0 and ranks > 1:
        log.info("Waiting up to %d minutes for all of %d processes to meet at %s:%d.", minutes, ranks, address, port)
    try:
        store = _connected(f"tcp://{address}:{port}?rank={rank}&world_size={ranks}")
        store = PrefixStore(met(store, rank, ranks), store)
    except (dist.DistError, TimeoutError) as error:
        others = "process 0" if rank else "process 1" if ranks == 2 else f"processes 1 to {ranks - 1}"
        within = f" within {minutes} minutes" if time.monotonic() - began >= JOINING.total_seconds() else ""
        raise UserError(
            f"Process {rank} of {ranks} has not met {others} at {address}:{port}{within} "
            f"({first_sentence(error).rstrip('.')}); check that the command was started on every machine, that this port is free on "
            "the first one, and that this address can be reached from each."
        ) from error
    store.set_timeout(LONG)
    return store


def _connected(url: str) -> Any:
    """Connect to the store of all processes; in a thread, since another program at that port may never answer.

    Raises:
        TimeoutError: Nothing has answered in time.
    """
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(next(rendezvous(url, timeout=JOINING))[0])
        except Exception as error:
            found.append(error)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(JOINING.total_seconds())
    (store,) = found or [TimeoutError("nothing has answered there")]
    if isinstance(store, Exception):
        raise store
    return store


def met(store: Any, rank: int, ranks: int) -> str:
    """A name that the processes which are alive agree on, through a store in which dead ones have left theirs.

    Raises:
        TimeoutError: Some have not come in time.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)
        name = str(store.get(f"welcome/{own}").decode())  # nobody but a rank 0 that is alive can have written this
        store.set(f"met/{name}/{rank}", "")
        return name
    left, end = set(range(1, ranks)), time.monotonic() + JOINING.total_seconds()
    while left:
        if time.monotonic() > end:
            raise TimeoutError(f"missing: {', '.join(map(str, sorted(left)))}")
        for other in left:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        left = {other for other in left if not store.check([f"met/{own}/{other}"])}
        time.sleep(0.05)
    return own


def sharing(trainer: pl.Trainer) -> int:
    """How many ranks divide the samples of every call; 1 where each has its own problems, or is alone."""
    return trainer.world_size if isinstance(trainer.strategy, SampleParallel) else 1


def shared(count: int, size: int) -> tuple[range, int]:
    """Divide the numbers of `count` samples among the ranks.

    With at least `size` samples for every rank each gets whole calls of `size`, so that all ranks together make exactly the calls of
    a single process, the last and smaller one included. With fewer, each gets about as many samples as the others. A rank for which
    none are left gets the last sample, too, so that what it computes has the structure of what the others compute.

    Returns:
        This rank's samples, and the most that any rank has.
    """
    share = -(-count // dist.get_world_size())
    if share > size:
        share = min(-(-share // size) * size, count)
    begin = min(dist.get_rank() * share, count - 1)
    return range(begin, min(begin + share, count)), share


def gathered(own: T, share: int, count: int) -> T:
    """Collect what all ranks have computed for their `shared` samples.

    Args:
        own: Tensors (b, ...), in any structure, of this rank's b <= `share` samples.
        share: The most samples that any rank has.
        count: How many samples there are in all.

    Returns:
        The same structure, with tensors (count, ...).
    """

    def whole(tensor: Tensor) -> Tensor:
        here = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        filled = here.new_zeros(share, *here.shape[1:])  # every rank sends as much as the others
        filled[: len(here)] = here
        parts = here.new_empty(dist.get_world_size() * share, *here.shape[1:])
        dist.all_gather_into_tensor(parts, filled)
        return parts[:count].to(tensor.device)

    found: T = pytree.tree_map_only(Tensor, whole, own)
    return found


def of_rank_zero(value: T) -> T:
    """What rank 0 has; for all that ranks compute alike, of which a last digit that differs must not lead them apart."""
    if isinstance(value, Tensor):
        there = value.detach().clone()
        dist.broadcast(there, 0)
        return there  # type: ignore[return-value]
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


def of_all_ranks(value: T) -> list[T]:
    """What each rank has."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def wait_for_all() -> None:
    """Waits until every rank has come here; returns at once where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


for _strategy in (ProblemParallel, SampleParallel):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_strategy.__doc__)
