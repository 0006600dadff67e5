"""Launchers are detected from the environment, and invalid variables are refused before any process connects."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from lightning_prompts import distributed
from lightning_prompts.commands.main import main
from lightning_prompts.commands.processes import cluster_environment
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import PARENT, Launched, lightning_launcher, own_rank

ROOT = Path(__file__).parents[2]
PREFIXES = ("SLURM_", "TORCHELASTIC_", "OMPI_", "LIGHTNING_PROMPTS_PARENT")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
         "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
# The second process of two on the second of two machines.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
# A batch script of `sbatch --nodes 2 --ntasks-per-node 2`, and the same process as above when srun has started it
# there.
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "search",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}  # fmt: skip
ONE = {**BATCH, "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_NTASKS_PER_NODE": "1",
       "SLURM_TASKS_PER_NODE": "1"}  # fmt: skip


@pytest.fixture
def set_environment(monkeypatch):
    """Set variables in an environment without any others of launchers; None removes a variable."""
    for name in [name for name in os.environ if name in NAMES or name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)

    def set_variables(*several, **more):
        for environment in (*several, more):
            for name, value in environment.items():
                monkeypatch.delenv(name, raising=False)
                if value is not None:
                    monkeypatch.setenv(name, value)

    return set_variables


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        (TORCHRUN, ("torchrun", 2, 2, 3)),
        (SRUN, ("srun", 2, 2, 3)),
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, ("srun", 2, 2, 3)),  # srun in a shell of salloc
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("srun", 2, 2, 3)),  # exported by scripts
        ({**BATCH, **TORCHRUN}, ("torchrun", 2, 2, 3)),
        ({**SRUN, **TORCHRUN}, ("torchrun", 2, 2, 3)),
        ({}, None),
        (ONE, None),
        ({**ONE, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**BATCH, "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --ntasks 1 in a larger job
        ({**BATCH, "SLURM_JOB_NAME": "interactive"}, None),  # a shell of salloc
        ({**BATCH, "SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_JOB_NAME": "zsh", "SLURM_PTY_PORT": "4711", "SLURM_PROCID": "0"}, None),  # srun --pty zsh
        # All processors of a machine, and no tasks asked for.
        (
            {"SLURM_JOB_ID": "77", "SLURM_TASKS_PER_NODE": "64", "SLURM_JOB_CPUS_PER_NODE": "64", "SLURM_PROCID": "0"},
            None,
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            None,
        ),  # on platforms that set it for a single process too
        ({"NODE_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, None),
    ],
)
def test_launcher_is_detected(environment, launched, set_environment):
    set_environment(environment)
    assert Launched.detect() == (launched and Launched(*launched))
    assert own_rank() == (launched[3] if launched else 0)
    if launched is None:  # Lightning would take some of them for processes of SLURM
        assert isinstance(cluster_environment(), LightningEnvironment)


REFUSED = [
    *[
        ({**TORCHRUN, name: None}, f"{name} must be .*but is not set; start the command with torchrun")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    ],
    *[
        (
            {**TORCHRUN, name: value},
            f"{name} must be a whole number from ., but is '{value}'|{name} must be .*, but is '{value}'",
        )
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        for value in ("x", "", "-1", "1.5")
    ],
    ({**TORCHRUN, "RANK": "4"}, r"RANK must be a whole number from 0 to 3 \(WORLD_SIZE is 4\), but is '4'"),
    ({**TORCHRUN, "LOCAL_RANK": "2"}, r"LOCAL_RANK must be .* from 0 to 1 \(LOCAL_WORLD_SIZE is 2\), but is '2'"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, r"LOCAL_WORLD_SIZE must be .* from 1 to 4 \(WORLD_SIZE is 4\), but is '5'"),
    ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1 on, but is '0'"),
    (
        {**TORCHRUN, "WORLD_SIZE": "5"},
        "WORLD_SIZE is 5 and LOCAL_WORLD_SIZE 2.* give torchrun the same --nproc_per_node",
    ),
    ({**TORCHRUN, "LOCAL_RANK": "0"}, "LOCAL_RANK is '0', but must be 1, since RANK is 3"),
    ({**TORCHRUN, "GROUP_RANK": "0"}, "GROUP_RANK is '0', but must be 1"),
    ({**TORCHRUN, "GROUP_WORLD_SIZE": "3"}, "GROUP_WORLD_SIZE is '3', but must be 2"),
    (
        BATCH,
        r"SLURM_NTASKS is '4', but srun did not start this process.*start the command with srun, or ask SLURM for one",
    ),
    ({**BATCH, "SLURM_STEP_ID": "4294967291"}, "SLURM_NTASKS is '4', but srun did not"),
    ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is '2', but srun did not"),
    ({"SLURM_NPROCS": "2"}, "SLURM_NPROCS is '2', but srun did not"),
    ({"SLURM_NTASKS_PER_NODE": "2"}, "SLURM_NTASKS_PER_NODE is '2', but srun did not"),
    ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, r"SLURM_TASKS_PER_NODE is '2\(x3\),1', but srun did not"),
    (
        {"SLURM_NTASKS": "two"},
        "SLURM_NTASKS must be a whole number from 1 on, but is 'two'; start the command with srun",
    ),
    ({**ONE, "SLURM_PROCID": "1"}, "SLURM_PROCID must be .*, but is '1'; start the command with srun"),
    *[
        ({**SRUN, name: None}, f"{name} must be .*, but is not set; start the command with srun")
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    ],
    *[
        ({**SRUN, name: value}, f"{name} must be .*, but is '{value}'")
        for name in (
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_NODEID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_NUM_NODES",
            "SLURM_NTASKS_PER_NODE",
            "SLURM_STEP_ID",
        )
        for value in ("x", "-1")
    ],
    ({**SRUN, "SLURM_PROCID": "4"}, r"SLURM_PROCID must be .*\(SLURM_STEP_NUM_TASKS is 4\), but is '4'"),
    (
        {**SRUN, "SLURM_NTASKS": "8"},
        "SLURM_NTASKS is '8', but must be 4, since SLURM_STEP_NUM_TASKS is 4; give srun --ntasks 4",
    ),
    ({**SRUN, "SLURM_NTASKS": None}, "SLURM_NTASKS must be 4, .*but is not set; give srun --ntasks 4"),
    (
        {**SRUN, "SLURM_NTASKS_PER_NODE": "1"},
        "SLURM_NTASKS_PER_NODE is 1 and SLURM_STEP_NUM_NODES 2, but .* is 4 and not 2",
    ),
    ({**SRUN, "SLURM_NNODES": "4"}, "SLURM_NNODES is '4', but must be 2"),
    ({**SRUN, "SLURM_PTY_PORT": "4711"}, "SLURM_PTY_PORT is '4711', as in a shell, but SLURM_PROCID is 3"),
    ({**SRUN, "RANK": "0"}, "RANK is '0', but must be 3, since SLURM_PROCID is 3"),
    ({**SRUN, "WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but must be 4, since SLURM_STEP_NUM_TASKS is 4"),
    ({**SRUN, "LOCAL_RANK": "0"}, "LOCAL_RANK is '0', but must be 1"),
    ({**SRUN, "NODE_RANK": "0"}, "NODE_RANK is '0', but must be 1"),
    ({"RANK": "0"}, "RANK is '0', but no launcher has started this process; .*or unset RANK"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but no launcher .*or unset WORLD_SIZE"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1', but no launcher"),
    ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is '2', but no launcher"),
    ({"NODE_RANK": "1"}, "NODE_RANK is '1', but no launcher"),
    ({"RANK": "x"}, "RANK is 'x', but no launcher"),
    (
        without(TORCHRUN, "TORCHELASTIC_RUN_ID"),
        "RANK is '3', but no launcher .*unset RANK and LOCAL_RANK and WORLD_SIZE",
    ),
    ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", PARENT: "1"}, "LOCAL_RANK is '1', but no launcher"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is '2', so mpirun or jsrun"),
]


@pytest.mark.parametrize(("environment", "message"), REFUSED)
def test_inconsistent_variables_are_refused(environment, message, set_environment):
    set_environment(environment)
    with pytest.raises(UserError, match=message) as refused:
        Launched.detect()
    assert str(refused.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "MASTER_ADDR": None}, "MASTER_ADDR must name the machine .*, but is not set"),
        ({**TORCHRUN, "MASTER_PORT": None}, "MASTER_PORT must be .*, but is not set"),
        *[({**some, "MASTER_PORT": port}, f"MASTER_PORT must be a whole number from 1 to 65535, but is '{port}'")
          for some in (TORCHRUN, SRUN) for port in ("70000", "0", "http")],
    ],
)  # fmt: skip
def test_invalid_master_address_is_refused(environment, message, set_environment):
    set_environment(environment)
    with pytest.raises(UserError, match=message):
        Launched.detect().check_address()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "RANK is 'x', but no launcher has started this process"),  # Lightning's import fails on it
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}, "start the command with srun"),
        pytest.param(
            {**TORCHRUN, "MASTER_PORT": "70000"},
            "MASTER_PORT must be a whole number from 1 to 65535",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_command_with_invalid_variables_gives_one_sentence(environment, message, tmp_path):
    others = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith(PREFIXES)}
    done = subprocess.run(
        [sys.executable, "train.py", "fit", "--config", "configs/pez.yaml", "--data.images", "docs/images/demo.png",
         "--trainer.accelerator", "cpu", "--run", str(tmp_path / "run")],
        cwd=ROOT, env={**others, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_works_with_any_variables(set_environment, capsys):
    set_environment(BATCH)
    with pytest.raises(SystemExit) as stopped:
        main(["show-space", "--help"])
    assert stopped.value.code == 0


def test_processes_started_by_lightning_are_recognized(set_environment):
    """Variables that a shell exported are ignored, and cleared afterwards."""
    set_environment(MASTER_ADDR="other-machine", MASTER_PORT="1", NODE_RANK="0")
    ask = "from lightning_prompts.launchers import *; print(Launched.detect(), own_rank())"
    with lightning_launcher():
        assert "MASTER_ADDR" not in os.environ
        os.environ.update(LOCAL_RANK="0", NODE_RANK="0", WORLD_SIZE="2")  # as Lightning does
        environment = {**os.environ, "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
        child = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
        assert child.stdout == "None 1\n", child.stderr
    assert Launched.detect() is None
    assert own_rank() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_process_without_its_peer_reports_it(rank, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=f"Process {rank} of 2 could not connect to process {1 - rank} at localhost:{port}"
    ):
        distributed.create_store("localhost", port, rank, 2)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"could not connect to process 1 at localhost:\d+ \(.*listen.*port is free"),
        (1, r"process 0 at localhost:\d+ .*nothing has answered"),
    ],
)
def test_port_of_another_program_is_reported(rank, message, monkeypatch):
    """The other program accepts the connection and never answers."""
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        start = time.monotonic()
        with pytest.raises(UserError, match=message):
            distributed.create_store("localhost", other.getsockname()[1], rank, 2)
    assert time.monotonic() - start < 10


def test_missing_processes_of_a_shared_store_are_named(monkeypatch):
    """Processes of torchrun share the store of its agent."""
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="missing: 1, 2"):
        distributed.handshake(torch.distributed.HashStore(), 0, 3)
