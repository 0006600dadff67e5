"""The script for SLURM, with stand-ins for SLURM's programs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
SRUN = """#!/bin/bash
echo "$@" > "$TOLD/srun"
trap 'exit 143' TERM
echo $$ > "$TOLD/pid"
for _ in $(seq 300); do [ -e "$TOLD/end" ] && exit 3; sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
echo "$@" > "$TOLD/scontrol"
kill -TERM "$(cat "$TOLD/pid")"
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
        "TOLD": str(tmp_path),
        "SLURM_JOB_ID": "77",
    }
    process = subprocess.Popen(["bash", SCRIPT, "my images", "runs/big", "--model.steps", "5"], env=environment)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()


def test_the_search_is_told_what_the_job_was(job):
    process, told = job
    (told / "end").touch()
    assert process.wait(10) == 3  # as the search
    assert "--data.images my images --run runs/big --ckpt_path last" in (told / "srun").read_text()
    assert "--model.steps 5" in (told / "srun").read_text()


def test_before_its_end_it_is_queued_again_and_the_search_ends_first(job):
    process, told = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 143
    assert (told / "scontrol").read_text() == "requeue 77\n"
