"""Who has started this process, as which of how many: read from the environment before Lightning is imported or anything is joined."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning_prompts.errors import UserError

PARENT = "LIGHTNING_PROMPTS_PARENT"
"""The process that starts others with `--trainer.devices`, by which they know that their variables are not left over."""

OWN_STEPS = 0xFFFFFFF0  # steps from here on are SLURM's own, such as that of a batch script or of salloc's shell
SHELLS = ("bash", "interactive")  # names that SLURM gives to jobs in which a person types commands
PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MACHINE = ("NODE_RANK", "GROUP_RANK")
FOREIGN = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "JSM_NAMESPACE_SIZE")  # of Open MPI, of MPICH and of jsrun
TORCHRUN = "start the command with torchrun, which sets it, or unset TORCHELASTIC_RUN_ID"
SRUN = "start the command with srun, which sets it"


class Launched(NamedTuple):
    """What another launcher than Lightning's has started: how many processes on how many machines, and which of them this is."""

    by: str
    processes: int
    machines: int
    rank: int

    @classmethod
    def detect(cls) -> Launched | None:
        """Look into the environment, where torchrun and srun tell it; None where nothing else has started this process.

        Raises:
            UserError: The variables are incomplete, out of their range or contradict each other, or processes that they
                announce would never come.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may itself have been started by srun
            return _by_torchrun()
        if started_by_lightning():
            return None
        if (step := _by_srun()) is None:
            _refuse_left_over()
        return step

    def check_address(self) -> None:
        """Refuse an address, at which the processes are to meet, that is none.

        Raises:
            UserError: torchrun's is missing, or a port is out of range.
        """
        if self.by == "torchrun" and not os.environ.get("MASTER_ADDR"):
            raise UserError(f"MASTER_ADDR must name the machine of the first process, but is not set; {TORCHRUN}.")
        if self.by == "torchrun":
            _number("MASTER_PORT", 1, 65535, TORCHRUN)
        elif "MASTER_PORT" in os.environ:
            _number("MASTER_PORT", 1, 65535, "unset it")


def started_by_lightning() -> bool:
    """Tell whether a process of this program has started this one, as `--trainer.devices` has it do."""
    return os.environ.get(PARENT) == str(os.getppid())


def own_rank() -> int:
    """Return this process's number, known before Lightning is set up: launchers pass it in the environment."""
    if launched := Launched.detect():
        return launched.rank
    return _number("LOCAL_RANK", 0, None, "unset it") if started_by_lightning() else 0


@contextmanager
def starting_others() -> Iterator[None]:
    """Have Lightning start the other processes, all on this machine, whatever the environment says; forget them at the end."""
    _forget()
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for name in (*PROCESS, *MACHINE, "MASTER_ADDR", "MASTER_PORT", PARENT):
        os.environ.pop(name, None)


def _number(name: str, least: int, most: int | None, hint: str, most_is: str = "") -> int:
    """Read a variable that is a whole number in a range; `most_is` says where the largest comes from."""
    wanted = f"a whole number from {least} " + ("on" if most is None else f"to {most}")
    told = os.environ.get(name)
    try:
        number = int(told) if told is not None else least - 1
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        given = "is not set" if told is None else f"is {told!r}"
        raise UserError(f"{name} must be {wanted}{most_is and f' ({most_is})'}, but {given}; {hint}.")
    return number


def _agree(names: tuple[str, ...], value: int, reason: str, hint: str) -> None:
    """Refuse variables that are set and say something else."""
    for name in names:
        if name in os.environ and os.environ[name].strip() != str(value):
            raise UserError(f"{name} is {os.environ[name]!r}, but must be {value}, since {reason}; {hint}.")


def _by_torchrun() -> Launched:
    everywhere = _number("WORLD_SIZE", 1, None, TORCHRUN)
    here = _number("LOCAL_WORLD_SIZE", 1, everywhere, TORCHRUN, f"WORLD_SIZE is {everywhere}")
    rank = _number("RANK", 0, everywhere - 1, TORCHRUN, f"WORLD_SIZE is {everywhere}")
    _number("LOCAL_RANK", 0, here - 1, TORCHRUN, f"LOCAL_WORLD_SIZE is {here}")
    if everywhere % here:
        raise UserError(
            f"WORLD_SIZE is {everywhere} and LOCAL_WORLD_SIZE {here}, so that machines have different numbers of processes; give "
            "torchrun the same --nproc_per_node on each."
        )
    sizes = f"RANK is {rank}, WORLD_SIZE {everywhere} and LOCAL_WORLD_SIZE {here}"
    _agree(("LOCAL_RANK",), rank % here, sizes, TORCHRUN)
    _agree(("GROUP_RANK",), rank // here, sizes, TORCHRUN)
    _agree(("GROUP_WORLD_SIZE",), everywhere // here, sizes, "give torchrun the same --nproc_per_node on each machine")
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        _number("TORCHELASTIC_RESTART_COUNT", 0, None, TORCHRUN)
    return Launched("torchrun", here, everywhere // here, rank)


def _by_srun() -> Launched | None:
    """Read what SLURM tells; None outside of it, in a job with one task, and in a shell in which a person types."""
    told = os.environ
    step = next((name for name in ("SLURM_STEP_ID", "SLURM_STEPID") if name in told), None)
    if step is None or _number(step, 0, None, SRUN) >= OWN_STEPS:
        if told.get("SLURM_JOB_NAME") not in SHELLS:
            _refuse_batch()
        return None
    counted = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in told), "SLURM_NTASKS")
    tasks = _number(counted, 1, None, SRUN)
    rank = _number("SLURM_PROCID", 0, tasks - 1, SRUN, f"{counted} is {tasks}")
    if tasks == 1:
        return None
    if "SLURM_PTY_PORT" in told:  # of `srun --pty bash`: the shell is the first task, and nothing runs in the others
        if rank:
            raise UserError(
                f"SLURM_PTY_PORT is {told['SLURM_PTY_PORT']!r}, as in a shell, but SLURM_PROCID is {rank}; start several processes "
                "from such a shell with env -u SLURM_PTY_PORT srun."
            )
        return None
    reason = f"{counted} is {tasks}"
    nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in told else "SLURM_NNODES"
    machines = _number(nodes, 1, tasks, SRUN, reason)
    if "SLURM_NTASKS_PER_NODE" not in told:
        raise UserError("SLURM was asked for --ntasks, which may put any number on a machine; give --ntasks-per-node.")
    here = _number("SLURM_NTASKS_PER_NODE", 1, tasks, "give srun the same --ntasks-per-node as sbatch", reason)
    again = f"give srun --ntasks {here * machines} --ntasks-per-node {here}"
    if here * machines != tasks:
        raise UserError(
            f"SLURM_NTASKS_PER_NODE is {here} and {nodes} {machines}, but {counted} is {tasks} and not {here * machines}; {again}."
        )
    if "SLURM_NTASKS" not in told:  # Lightning reads it
        raise UserError(f"SLURM_NTASKS must be {tasks}, since {reason}, but is not set; {again}.")
    _agree(("SLURM_NTASKS",), tasks, reason, again)
    _agree(("SLURM_NNODES",), machines, f"{nodes} is {machines}", f"give srun --nodes {machines}")
    local = _number("SLURM_LOCALID", 0, here - 1, SRUN, f"SLURM_NTASKS_PER_NODE is {here}")
    node = _number("SLURM_NODEID", 0, machines - 1, SRUN, f"{nodes} is {machines}")
    for name, value, source in (
        ("RANK", rank, "SLURM_PROCID"),
        ("WORLD_SIZE", tasks, counted),
        ("LOCAL_RANK", local, "SLURM_LOCALID"),
        ("LOCAL_WORLD_SIZE", here, "SLURM_NTASKS_PER_NODE"),
        ("NODE_RANK", node, "SLURM_NODEID"),
        ("GROUP_RANK", node, "SLURM_NODEID"),
    ):
        _agree((name,), value, f"{source} is {value}", "start the command with srun or torchrun alone, or unset it")
    return Launched("srun", here, machines, rank)


def _refuse_batch() -> None:
    """Refuse to be the only process of a job with several tasks: the others, which srun starts, would be waited for."""
    told = os.environ
    hint = "start the command with srun, or ask SLURM for one task (--ntasks 1)"
    counts = [name for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE") if name in told]
    several = next((name for name in counts if _number(name, 1, None, hint) > 1), None)
    spread = told.get("SLURM_TASKS_PER_NODE", "")
    # Where no tasks were asked for SLURM counts one for each processor.
    if not counts and spread != told.get("SLURM_JOB_CPUS_PER_NODE") and _in_all(spread) > 1:
        several = "SLURM_TASKS_PER_NODE"
    if several:
        raise UserError(
            f"{several} is {told[several]!r}, but srun has not started this process (SLURM_STEP_ID is not that of a step of yours), "
            f"and the other processes would never come; {hint}."
        )
    if "SLURM_PROCID" in told:
        _number("SLURM_PROCID", 0, 0, SRUN, "the job has one task")


def _in_all(spread: str) -> int:
    """Add up SLURM's tasks of each machine, such as `2(x3),1`, which is 7; 0 where it is something else."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in spread.split(",")]
    return sum(int(part[1]) * int(part[2] or 1) for part in parts if part)


def _refuse_left_over() -> None:
    """Refuse variables of several processes where nothing has started any, such as those that a shell has exported."""
    told = {name: os.environ[name].strip() for name in (*PROCESS, *MACHINE) if name in os.environ}
    alone = {name: "1" if name.endswith("SIZE") else "0" for name in told}
    whole = {"RANK", "WORLD_SIZE"} <= told.keys()  # some platforms describe every process, also an only one
    wrong = [name for name in told if told[name] != alone[name] or (name in PROCESS and not whole)]
    if wrong:
        raise UserError(
            f"{wrong[0]} is {told[wrong[0]]!r}, but no launcher has started this process; start the command with torchrun or srun, "
            f"or unset {' and '.join(wrong)}."
        )
    for name in FOREIGN:
        if name in os.environ and _number(name, 1, None, "unset it") > 1:
            raise UserError(
                f"{name} is {os.environ[name]!r}, so that mpirun or jsrun has started several processes, which would not find each "
                "other; start the command with torchrun or srun."
            )
