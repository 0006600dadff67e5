"""The script for SLURM, with stand-ins for SLURM's programs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
SRUN = """#!/bin/bash
echo "$@" > "$RECORDS/srun"
trap 'exit 143' TERM
echo $$ > "$RECORDS/pid"
for _ in $(seq 300); do [ -e "$RECORDS/end" ] && exit 3; sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
echo "$@" > "$RECORDS/scontrol"
kill -TERM "$(cat "$RECORDS/pid")"
"""


@pytest.fixture
def job(tmp_path):
    """Start the job; return it and the arguments of its programs."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORDS": str(tmp_path),
        "SLURM_JOB_ID": "77",
    }
    process = subprocess.Popen(["bash", SCRIPT, "my images", "runs/big", "--model.steps", "5"], env=environment)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()


def test_job_passes_its_arguments_to_the_search(job):
    process, records = job
    (records / "end").touch()
    assert process.wait(10) == 3  # the exit code of the search
    assert "--data.images my images --run runs/big --ckpt_path last" in (records / "srun").read_text()
    assert "--model.steps 5" in (records / "srun").read_text()


def test_job_is_requeued_before_its_time_limit(job):
    process, records = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 143
    assert (records / "scontrol").read_text() == "requeue 77\n"
