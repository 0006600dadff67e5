"""Distributed runs (`--trainer.devices 8`, torchrun or srun): ranks divide the problems or their samples."""

from __future__ import annotations

import atexit
import logging
import secrets
import time
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

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

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments import ClusterEnvironment

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_PROCESSES = 1024  # per machine
JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to connect: the machines of a job may start minutes apart
RANK_TIMEOUT = timedelta(days=30)  # between collectives: a rank may work long, and torchrun and srun detect lost ones


def resolve_devices(trainer: Any, launched: Launched | None) -> tuple[Any, int, int]:
    """Resolve the trainer's devices, machines and processes.

    Args:
        trainer: The trainer's settings.
        launched: The processes of an external launcher, if one started this process.

    Returns:
        The devices per machine, the number of machines, and the number of processes in total.

    Raises:
        UserError: The settings are invalid, contradict the launcher, or ask for more than there is.
    """
    devices, num_nodes = trainer.devices, int(trainer.num_nodes)
    accelerators = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if trainer.accelerator not in accelerators:
        raise UserError(
            f"--trainer.accelerator cannot be {trainer.accelerator!r}; it takes one of "
            f"{', '.join(sorted({*accelerators}))}."
        )
    if num_nodes < 1:
        raise UserError(f"--trainer.num_nodes cannot be {num_nodes}; it takes a whole number from 1 on.")
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    gpus = torch.cuda.device_count() if on_gpu else None
    if str(devices) in ("auto", "-1"):
        local = gpus or 1
    elif isinstance(devices, list) or "," in str(devices):
        names = devices if isinstance(devices, list) else [name.strip() for name in devices.split(",") if name.strip()]
        local = len({str(name) for name in names})
        if gpus is None or not local or local < len(names):
            wanted = "a number of processes" if gpus is None else "the indices of different GPUs"
            raise UserError(f"--trainer.devices cannot be {devices}; it takes {wanted} here.")
    else:
        local = _parse_count(devices)
    if launched:
        if (local, num_nodes) not in ((1, 1), (launched.processes, launched.machines)):
            raise UserError(
                f"{launched.by} has started {launched.processes} processes on {launched.machines} machines, but "
                f"--trainer.devices is {devices} and --trainer.num_nodes {num_nodes}; leave both out."
            )
        devices = local = launched.processes
        num_nodes = launched.machines
    elif num_nodes > 1:
        raise UserError(
            f"--trainer.num_nodes {num_nodes} needs a launcher, since this process cannot start processes on other "
            "machines; start the command on them with torchrun or srun."
        )
    if gpus == 0:
        raise UserError(
            f"--trainer.accelerator cannot be {trainer.accelerator!r}, since this machine has no GPU; give cpu or auto."
        )
    if gpus is not None and local > gpus:
        raise UserError(
            f"--trainer.devices asks for {local} GPUs, but this machine has {gpus}; give --trainer.devices {gpus}."
        )
    if launched and local * num_nodes > 1:
        launched.check_address()
    return devices, num_nodes, local * num_nodes


def _parse_count(devices: Any) -> int:
    """Return the number of devices, given as a number or text."""
    try:
        count = int(devices)
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_PROCESSES:
        raise UserError(
            f"--trainer.devices cannot be {devices!r}; it takes a number of processes from 1 to {MAX_PROCESSES}, or "
            "auto."
        )
    return count


class _UnwrappedDDP(DDPStrategy):
    """DDP without a wrapped module: there is no gradient for Lightning to reduce."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            process_group_backend=kwargs.pop("process_group_backend", None), timeout=RANK_TIMEOUT, **kwargs
        )

    def setup_distributed(self) -> None:
        """Connect to the other processes within minutes; collectives may then take much longer."""
        if not dist.is_initialized():
            self.set_world_ranks()
            environment = cast("ClusterEnvironment", self.cluster_environment)
            address, port = environment.main_address, environment.main_port
            store = create_store(address, port, self.global_rank, self.world_size)
            device = self.root_device if self.root_device.type != "cpu" else None
            backend = self._get_process_group_backend()
            dist.init_process_group(
                backend, timeout=RANK_TIMEOUT, world_size=self.world_size, rank=self.global_rank, store=store,
                device_id=device,
            )  # fmt: skip
            if backend == "nccl":
                atexit.register(_destroy_dist_connection)  # as Lightning does for a group that it creates
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Skip the barriers of Lightning, at which a rank would wait for those with more problems."""


class ProblemParallel(_UnwrappedDDP):
    """Divide the problems among the ranks, which do not communicate between start and end.

    Each rank searches its own problems for as many steps as they need, and writes its own checkpoints and records. Rank
    0 merges the results.
    """

    strategy_name = "problems"

    def setup(self, trainer: pl.Trainer) -> None:
        """Handle SIGTERM without Lightning's broadcast: the ranks may be at different steps, or done."""
        super().setup(trainer)
        connector = trainer._signal_connector

        def on_sigterm(signum: int, frame: Any) -> None:
            if not connector.received_sigterm and self.launcher:
                self.launcher.kill(signum)
            connector.received_sigterm = True

        connector._sigterm_notifier_fn = on_sigterm  # type: ignore[method-assign,assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return this rank's own object."""
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Return this rank's own tensor."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return this rank's own decision."""
        return decision

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint on every rank."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class SampleParallel(_UnwrappedDDP):
    """Search the same problems on all ranks, and divide the samples of every step; rank 0 writes."""

    strategy_name = "samples"

    def setup(self, trainer: pl.Trainer) -> None:
        """Stop all ranks at the same step when any of them receives SIGTERM."""
        super().setup(trainer)
        connector, received = trainer._signal_connector, torch.zeros(1, device=self.root_device)

        def on_sigterm(signum: int, frame: Any) -> None:
            if not received and self.launcher:
                self.launcher.kill(signum)
            received.fill_(1)

        def stop_together() -> None:
            received_by_any = received.clone()
            dist.all_reduce(received_by_any, dist.ReduceOp.MAX)
            if received_by_any:
                connector.received_sigterm = True
                raise SIGTERMException

        connector._sigterm_notifier_fn = on_sigterm  # type: ignore[method-assign,assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = stop_together  # type: ignore[method-assign]


def create_store(address: str, port: int, rank: int, ranks: int) -> Any:
    """Connect all processes at rank 0's address, and return their common store.

    Raises:
        UserError: Some processes did not connect in time.
    """
    minutes, began = int(JOIN_TIMEOUT.total_seconds() / 60), time.monotonic()
    if rank == 0 and ranks > 1:
        log.info("Waiting up to %d minutes for all %d processes to connect to %s:%d.", minutes, ranks, address, port)
    try:
        store = _connect(f"tcp://{address}:{port}?rank={rank}&world_size={ranks}")
        store = PrefixStore(handshake(store, rank, ranks), store)
    except (dist.DistError, TimeoutError) as error:
        others = "process 0" if rank else "process 1" if ranks == 2 else f"processes 1 to {ranks - 1}"
        within = f" within {minutes} minutes" if time.monotonic() - began >= JOIN_TIMEOUT.total_seconds() else ""
        raise UserError(
            f"Process {rank} of {ranks} could not connect to {others} at {address}:{port}{within} "
            f"({first_sentence(error).rstrip('.')}); check that the command was started on every machine, that this "
            "port is free on the first one, and that every machine can reach this address."
        ) from error
    store.set_timeout(RANK_TIMEOUT)
    return store


def _connect(url: str) -> Any:
    """Connect to the common store, in a thread, since another program at that port may never answer.

    Raises:
        TimeoutError: Nothing answered in time.
    """
    results: list[Any] = []

    def connect() -> None:
        try:
            results.append(next(rendezvous(url, timeout=JOIN_TIMEOUT))[0])
        except Exception as error:
            results.append(error)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(JOIN_TIMEOUT.total_seconds())
    (store,) = results or [TimeoutError("nothing has answered there")]
    if isinstance(store, Exception):
        raise store
    return store


def handshake(store: Any, rank: int, ranks: int) -> str:
    """Agree with the other live processes on a name, in a store that may have entries of dead ones.

    Raises:
        TimeoutError: Some processes did not connect in time.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)
        name = str(store.get(f"welcome/{own}").decode())  # only a live rank 0 can have written this
        store.set(f"met/{name}/{rank}", "")
        return name
    left, end = set(range(1, ranks)), time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while left:
        if time.monotonic() > end:
            raise TimeoutError(f"missing: {', '.join(map(str, sorted(left)))}")
        for other in left:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        left = {other for other in left if not store.check([f"met/{own}/{other}"])}
        time.sleep(0.05)
    return own


def num_sample_ranks(trainer: pl.Trainer) -> int:
    """Return the number of ranks that divide the samples of every call; 1 if each rank has its own problems."""
    return trainer.world_size if isinstance(trainer.strategy, SampleParallel) else 1


def shard_indices(count: int, size: int) -> tuple[range, int]:
    """Divide the indices of `count` samples among the ranks.

    If every rank gets at least `size` samples, each makes whole calls of `size`, so that all ranks together make
    exactly the calls of a single process, including its smaller last one. Otherwise all ranks get about the same number
    of samples. A rank for which none are left computes the last sample again, so that its results have the structure of
    the others'.

    Returns:
        This rank's indices, and the largest number that any rank has.
    """
    share = -(-count // dist.get_world_size())
    if share > size:
        share = min(-(-share // size) * size, count)
    begin = min(dist.get_rank() * share, count - 1)
    return range(begin, min(begin + share, count)), share


def all_gather(own: T, share: int, count: int) -> T:
    """Gather the results of all ranks for their samples, see `shard_indices`.

    Args:
        own: Tensors (b, ...), in any structure, of this rank's b <= `share` samples.
        share: Largest number of samples that any rank has.
        count: Number of samples in total.

    Returns:
        The same structure, with tensors (count, ...).
    """

    def gather(tensor: Tensor) -> Tensor:
        local = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        padded = local.new_zeros(share, *local.shape[1:])  # all ranks must send the same shape
        padded[: len(local)] = local
        parts = local.new_empty(dist.get_world_size() * share, *local.shape[1:])
        dist.all_gather_into_tensor(parts, padded)
        return parts[:count].to(tensor.device)

    all_gather: T = pytree.tree_map_only(Tensor, gather, own)
    return all_gather


def broadcast(value: T) -> T:
    """Return rank 0's value, so that ranks that compute the same do not diverge by a different last digit."""
    if isinstance(value, Tensor):
        received = value.detach().clone()
        dist.broadcast(received, 0)
        return received  # type: ignore[return-value]
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank reaches this call; return at once in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


for _strategy in (ProblemParallel, SampleParallel):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_strategy.__doc__)
