"""Start the processes of a command as a launcher does, but with everything imported already."""

import multiprocessing
import os
import socket
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from rounding import rounding_by_shape

from lightning_prompts.commands.main import main

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lightning_prompts.commands.cli", "lightning_prompts.backbones.loading"])


def run_ranks(args, log, ranks=1, launcher="torchrun", rounding=False, program=main):
    """Run a command with a number of processes and return their exit codes.

    Args:
        args: The arguments of `program`, such as the command and its settings.
        log: File to which all processes append what they print.
        ranks: Number of processes.
        launcher: The launcher to imitate.
        rounding: Whether the processes round by the shape of each call, see `rounding_by_shape`.
        program: What each process calls.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    environments = [{**address, **LAUNCHERS[launcher](rank, ranks)} if ranks > 1 else {} for rank in range(ranks)]
    processes = [
        FORKS.Process(target=child, args=(program, args, environment, log, rounding)) for environment in environments
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(250)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def torchrun(rank, ranks):
    """Return the variables that torchrun sets for a process."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "TORCHELASTIC_RUN_ID": "test",
    }
    return {name: str(value) for name, value in variables.items()}


def srun(rank, ranks):
    """Return the variables that srun sets for a process."""
    variables = {
        "NTASKS": ranks,
        "NTASKS_PER_NODE": ranks,
        "NNODES": 1,
        "PROCID": rank,
        "LOCALID": rank,
        "NODEID": 0,
        "JOB_ID": 14321,
        "JOB_NAME": "prompts",
        "STEP_ID": 0,
        "STEP_NUM_TASKS": ranks,
    }
    return {f"SLURM_{name}": str(value) for name, value in variables.items()}


LAUNCHERS = {"torchrun": torchrun, "srun": srun}


def child(program, args, environment, log, rounding):
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    device = rounding_by_shape() if rounding else nullcontext()
    with device, log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        program(args)
