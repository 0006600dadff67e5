"""Detect the launcher of this process from its environment, before Lightning is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning_prompts.errors import UserError

PARENT = "LIGHTNING_PROMPTS_PARENT"
"""Variable with the id of the process that started this one, which shows that RANK and others are not stale."""

RESERVED_STEPS = 0xFFFFFFF0  # SLURM's own step ids start here, such as those of a batch script or of salloc's shell
SHELLS = ("bash", "interactive")  # SLURM's names for jobs of an interactive shell
PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MACHINE = ("NODE_RANK", "GROUP_RANK")
UNSUPPORTED = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "JSM_NAMESPACE_SIZE")  # of Open MPI, MPICH and jsrun
TORCHRUN = "start the command with torchrun, which sets it, or unset TORCHELASTIC_RUN_ID"
SRUN = "start the command with srun, which sets it"


class Launched(NamedTuple):
    """The processes that torchrun or srun started.

    Attributes:
        by: Name of the launcher.
        processes: Processes per machine.
        machines: Number of machines.
        rank: Global rank of this process.
    """

    by: str
    processes: int
    machines: int
    rank: int

    @classmethod
    def detect(cls) -> Launched | None:
        """Read the variables of torchrun and srun; return None if neither started this process.

        Raises:
            UserError: The variables are incomplete, out of range or contradictory, or some of the processes that they
                announce would never start.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may itself have been started by srun
            return _by_torchrun()
        if started_by_lightning():
            return None
        if (step := _by_srun()) is None:
            _refuse_stale()
        return step

    def check_address(self) -> None:
        """Check the address at which the processes connect.

        Raises:
            UserError: torchrun's address is missing, or the port is out of range.
        """
        if self.by == "torchrun" and not os.environ.get("MASTER_ADDR"):
            raise UserError(f"MASTER_ADDR must name the machine of the first process, but is not set; {TORCHRUN}.")
        if self.by == "torchrun":
            _number("MASTER_PORT", 1, 65535, TORCHRUN)
        elif "MASTER_PORT" in os.environ:
            _number("MASTER_PORT", 1, 65535, "unset it")


def started_by_lightning() -> bool:
    """Return whether another process of this program started this one, for `--trainer.devices`."""
    return os.environ.get(PARENT) == str(os.getppid())


def own_rank() -> int:
    """Return this process's global rank before Lightning is set up, from the launcher's variables."""
    if launched := Launched.detect():
        return launched.rank
    return _number("LOCAL_RANK", 0, None, "unset it") if started_by_lightning() else 0


@contextmanager
def lightning_launcher() -> Iterator[None]:
    """Let Lightning start the other processes on this machine; clear their variables before and after."""
    _clear_environment()
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        _clear_environment()


def _clear_environment() -> None:
    for name in (*PROCESS, *MACHINE, "MASTER_ADDR", "MASTER_PORT", PARENT):
        os.environ.pop(name, None)


def _number(name: str, least: int, most: int | None, hint: str, most_is: str = "") -> int:
    """Read a whole number in a range from a variable.

    Args:
        name: The variable.
        least: Smallest value.
        most: Largest value; None for no limit.
        hint: What the error message advises.
        most_is: Which variable sets the largest value, for the error message.
    """
    wanted = f"a whole number from {least} " + ("on" if most is None else f"to {most}")
    text = os.environ.get(name)
    try:
        number = int(text) if text is not None else least - 1
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        given = "is not set" if text is None else f"is {text!r}"
        raise UserError(f"{name} must be {wanted}{most_is and f' ({most_is})'}, but {given}; {hint}.")
    return number


def _check_consistent(names: tuple[str, ...], value: int, reason: str, hint: str) -> None:
    """Refuse variables that are set to another value."""
    for name in names:
        if name in os.environ and os.environ[name].strip() != str(value):
            raise UserError(f"{name} is {os.environ[name]!r}, but must be {value}, since {reason}; {hint}.")


def _by_torchrun() -> Launched:
    """Read the variables that torchrun sets, and check that they agree."""
    world = _number("WORLD_SIZE", 1, None, TORCHRUN)
    local_world = _number("LOCAL_WORLD_SIZE", 1, world, TORCHRUN, f"WORLD_SIZE is {world}")
    rank = _number("RANK", 0, world - 1, TORCHRUN, f"WORLD_SIZE is {world}")
    _number("LOCAL_RANK", 0, local_world - 1, TORCHRUN, f"LOCAL_WORLD_SIZE is {local_world}")
    if world % local_world:
        raise UserError(
            f"WORLD_SIZE is {world} and LOCAL_WORLD_SIZE {local_world}, so that machines have different numbers of "
            "processes; give torchrun the same --nproc_per_node on each."
        )
    sizes = f"RANK is {rank}, WORLD_SIZE {world} and LOCAL_WORLD_SIZE {local_world}"
    machines = world // local_world
    _check_consistent(("LOCAL_RANK",), rank % local_world, sizes, TORCHRUN)
    _check_consistent(("GROUP_RANK",), rank // local_world, sizes, TORCHRUN)
    _check_consistent(("GROUP_WORLD_SIZE",), machines, sizes, "give torchrun the same --nproc_per_node on each machine")
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        _number("TORCHELASTIC_RESTART_COUNT", 0, None, TORCHRUN)
    return Launched("torchrun", local_world, machines, rank)


def _by_srun() -> Launched | None:
    """Read SLURM's variables; return None outside SLURM, in a job with one task, and in an interactive shell."""
    environ = os.environ
    step = next((name for name in ("SLURM_STEP_ID", "SLURM_STEPID") if name in environ), None)
    if step is None or _number(step, 0, None, SRUN) >= RESERVED_STEPS:
        if environ.get("SLURM_JOB_NAME") not in SHELLS:
            _refuse_batch()
        return None
    counted = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environ), "SLURM_NTASKS")
    tasks = _number(counted, 1, None, SRUN)
    rank = _number("SLURM_PROCID", 0, tasks - 1, SRUN, f"{counted} is {tasks}")
    if tasks == 1:
        return None
    if "SLURM_PTY_PORT" in environ:  # set by `srun --pty bash`: the shell is the first task, and the others are idle
        if rank:
            raise UserError(
                f"SLURM_PTY_PORT is {environ['SLURM_PTY_PORT']!r}, as in a shell, but SLURM_PROCID is {rank}; start "
                "several processes from such a shell with env -u SLURM_PTY_PORT srun."
            )
        return None
    machines, per_node = _machines_of_step(tasks, counted)
    local = _number("SLURM_LOCALID", 0, per_node - 1, SRUN, f"SLURM_NTASKS_PER_NODE is {per_node}")
    node = _number("SLURM_NODEID", 0, machines - 1, SRUN, f"the step has {machines} machines")
    for name, value, source in (
        ("RANK", rank, "SLURM_PROCID"),
        ("WORLD_SIZE", tasks, counted),
        ("LOCAL_RANK", local, "SLURM_LOCALID"),
        ("LOCAL_WORLD_SIZE", per_node, "SLURM_NTASKS_PER_NODE"),
        ("NODE_RANK", node, "SLURM_NODEID"),
        ("GROUP_RANK", node, "SLURM_NODEID"),
    ):
        _check_consistent(
            (name,), value, f"{source} is {value}", "start the command with srun or torchrun alone, or unset it"
        )
    return Launched("srun", per_node, machines, rank)


def _machines_of_step(tasks: int, counted: str) -> tuple[int, int]:
    """Return the machines of a step of srun and the processes on each; refuse numbers that contradict each other.

    Args:
        tasks: Processes of the step.
        counted: The variable that has their number.
    """
    environ, reason = os.environ, f"{counted} is {tasks}"
    nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_NNODES"
    machines = _number(nodes, 1, tasks, SRUN, reason)
    if "SLURM_NTASKS_PER_NODE" not in environ:
        raise UserError(
            "SLURM was given --ntasks, which does not fix the number of processes per machine; give --ntasks-per-node."
        )
    per_node = _number("SLURM_NTASKS_PER_NODE", 1, tasks, "give srun the same --ntasks-per-node as sbatch", reason)
    again = f"give srun --ntasks {per_node * machines} --ntasks-per-node {per_node}"
    if per_node * machines != tasks:
        raise UserError(
            f"SLURM_NTASKS_PER_NODE is {per_node} and {nodes} {machines}, but {counted} is {tasks} and not "
            f"{per_node * machines}; {again}."
        )
    if "SLURM_NTASKS" not in environ:  # Lightning reads it
        raise UserError(f"SLURM_NTASKS must be {tasks}, since {reason}, but is not set; {again}.")
    _check_consistent(("SLURM_NTASKS",), tasks, reason, again)
    _check_consistent(("SLURM_NNODES",), machines, f"{nodes} is {machines}", f"give srun --nodes {machines}")
    return machines, per_node


def _refuse_batch() -> None:
    """Refuse to run outside srun in a job with several tasks: this process would wait for the others forever."""
    environ = os.environ
    hint = "start the command with srun, or ask SLURM for one task (--ntasks 1)"
    counts = [name for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE") if name in environ]
    several = next((name for name in counts if _number(name, 1, None, hint) > 1), None)
    per_node = environ.get("SLURM_TASKS_PER_NODE", "")
    # If no tasks were requested, SLURM counts one per processor.
    if not counts and per_node != environ.get("SLURM_JOB_CPUS_PER_NODE") and _total_tasks(per_node) > 1:
        several = "SLURM_TASKS_PER_NODE"
    if several:
        raise UserError(
            f"{several} is {environ[several]!r}, but srun did not start this process (SLURM_STEP_ID is not that of a "
            f"step of yours), and the other processes would never start; {hint}."
        )
    if "SLURM_PROCID" in environ:
        _number("SLURM_PROCID", 0, 0, SRUN, "the job has one task")


def _total_tasks(spread: str) -> int:
    """Return the sum of SLURM's tasks per machine, such as 7 for `2(x3),1`; 0 for any other format."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in spread.split(",")]
    return sum(int(part[1]) * int(part[2] or 1) for part in parts if part)


def _refuse_stale() -> None:
    """Refuse variables of several processes without a launcher, such as those that a shell exported."""
    given = {name: os.environ[name].strip() for name in (*PROCESS, *MACHINE) if name in os.environ}
    alone = {name: "1" if name.endswith("SIZE") else "0" for name in given}
    complete = {"RANK", "WORLD_SIZE"} <= given.keys()  # some platforms set them for single processes too
    wrong = [name for name in given if given[name] != alone[name] or (name in PROCESS and not complete)]
    if wrong:
        raise UserError(
            f"{wrong[0]} is {given[wrong[0]]!r}, but no launcher has started this process; start the command with "
            f"torchrun or srun, or unset {' and '.join(wrong)}."
        )
    for name in UNSUPPORTED:
        if name in os.environ and _number(name, 1, None, "unset it") > 1:
            raise UserError(
                f"{name} is {os.environ[name]!r}, so mpirun or jsrun started several processes, which cannot connect "
                "to each other; start the command with torchrun or srun."
            )
