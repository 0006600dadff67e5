"""Two processes find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):  # an odd number, so one rank has more to do than the other
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def fit(tiny, pictures, run, *extra):
    command = [sys.executable, "train.py", "fit", "--config", "configs/ph2p.yaml", "--data.images", str(pictures)]
    command += ["--run", str(run), "--model.backbone", str(tiny), "--data.steps", "8", "--data.samples", "2"]
    command += ["--model.restart_every", "3", "--model.score_every", "2"]
    command += ["--data.validation_samples", "2", "--model.sampling_steps", "2", "--trainer.accelerator", "cpu", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((run / "result.json").read_text())["problems"]


def test_two_ranks_find_the_prompts_of_one(tiny, pictures, tmp_path):
    alone = fit(tiny, pictures, tmp_path / "one")
    together = fit(tiny, pictures, tmp_path / "two", "--trainer.devices", "2", "--trainer.strategy", "problems")
    assert [p["key"] for p in together] == [p["key"] for p in alone]
    assert [p["prompt"] for p in together] == [p["prompt"] for p in alone]
    assert [p["validation_loss"] for p in together] == pytest.approx([p["validation_loss"] for p in alone], rel=1e-4)
    ranks = {path.name.split("-")[0] for path in (tmp_path / "two" / "checkpoints").iterdir()}
    assert ranks == {"rank0", "rank1"}


def test_ranks_need_not_take_the_same_number_of_steps(tiny, pictures, tmp_path):
    for extra in pictures.glob("[12].png"):
        extra.unlink()  # one rank has nothing to do
    (alone,) = fit(tiny, pictures, tmp_path / "one")
    (together,) = fit(tiny, pictures, tmp_path / "two", "--trainer.devices", "2", "--trainer.strategy", "problems")
    assert together["prompt"] == alone["prompt"]
