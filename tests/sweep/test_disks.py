"""Tests with full or read-only disks; mounting them requires root."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a disk needs root"),
]


@pytest.fixture
def disk(tmp_path):
    """Mount a small disk."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *options, str(mounted)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return mounted

    yield mount
    subprocess.run(["umount", str(mounted)], capture_output=True, check=False)


def command(*args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def search(tiny, tmp_path, run):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    return (
        f"fit --run {run} --model=PEZ --model.backbone={tiny} --model.num_tokens=2 "
        "--model.sampler.num_inference_steps=2 --ckpt_path=last --data=ImagesToPrompts "
        f"--data.images={tmp_path / 'a.png'} --model.steps=20 --data.num_noise_samples=1"
    ).split()


@pytest.mark.parametrize("size", ["16k", "24k", "40k", "64k", "90k"])
def test_full_disk_is_reported_and_the_search_resumes(size, tiny, tmp_path, disk):
    mounted = disk("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    done = command(*search(tiny, tmp_path, mounted / "run"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert str(mounted) in last
    subprocess.run(["mount", "-o", "remount,size=100m", str(mounted)], check=True)
    done = command(*search(tiny, tmp_path, mounted / "run"))
    assert done.returncode == 0, done.stderr
    assert (mounted / "run" / "result.json").exists()


def test_read_only_run_is_refused_before_loading_a_model(tiny, tmp_path, disk):
    assert command(*search(tiny, tmp_path, tmp_path / "runs" / "run")).returncode == 0
    mounted = disk("--bind", str(tmp_path / "runs"))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(mounted)], check=True)
    for name in ("test", "predict"):
        done = command(name, "--run", mounted / "run", "--model.backbone=/nowhere")
        assert (done.returncode, "Read-only file system" in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    done = command("validate", "--run", mounted / "run")
    assert done.returncode == 0, done.stderr
