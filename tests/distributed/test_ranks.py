"""Several processes find what one finds: each with its own problems, or all with a share of every call."""

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
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
METHODS = {
    "ph2p": ["--model.restart_every", "3", "--model.score_every", "2", "--model.microbatch", "4", "--data.steps", "8",
             "--data.samples", "4", "--data.validation_samples", "8"],
    "ph2p_lbfgs": ["--model.microbatch", "4", "--data.steps", "3", "--data.samples", "4", "--data.validation_samples", "8"],
    "invert": ["--model.start", "random", "--model.clip_weight", "0", "--model.trial_weight", "0", "--model.candidates", "4",
               "--model.screen", "1", "--model.microbatch", "4", "--data.steps", "3", "--data.samples", "4",
               "--data.validation_samples", "8"],
    "dpo_diff": ["--model.schedule", "fix-1", "--model.gradient_share", "0.3", "--model.seeds", "4", "--model.budget", "12",
                 "--model.guidance_scale", "2", "--model.microbatch", "4"],
    "metric_guidance": ["--model.objective", "Sharpness", "--model.seeds", "4", "--model.steps", "4", "--model.microbatch", "4",
                        "--model.optimizer", "sgd", "--model.lr", "0.1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three pictures and three prompts, an odd number, so that one rank has more to do than the other."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a red cat\ntwo dogs beside a tree\na small square\n")
    return folder


def arguments(tiny, inputs, run, method, *extra):
    steered = method in ("dpo_diff", "metric_guidance")
    given = ["--data.prompts", str(inputs / "prompts.txt")] if steered else ["--data.images", str(inputs)]
    command = [
        "train.py",
        "fit",
        "--config",
        f"configs/{method}.yaml",
        *given,
        "--run",
        str(run),
        "--model.backbone",
        str(tiny),
    ]
    return [*command, "--model.sampling_steps", "2", "--trainer.accelerator", "cpu", *METHODS[method], *extra]


def fit(*args, launcher=(), environment=ENVIRONMENT, run=None):
    done = subprocess.run(
        [sys.executable, *launcher, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found(args[args.index("--run") + 1])


def found(run):
    problems = json.loads((Path(run) / "result.json").read_text())["problems"]
    return [{name: value for name, value in problem.items() if name != "seconds"} for problem in problems]


@pytest.fixture(scope="module")
def alone(tiny, inputs, tmp_path_factory):
    """What one process finds with a method."""
    kept = {}

    def run(method):
        if method not in kept:
            kept[method] = fit(*arguments(tiny, inputs, tmp_path_factory.mktemp("alone") / "run", method))
        return kept[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_share_samples_find_exactly_what_one_finds(method, tiny, inputs, alone, tmp_path):
    """At one microbatch and one thread: every call has the same samples, whichever rank makes it."""
    two = ("--trainer.devices", "2", "--trainer.strategy", "samples")
    assert fit(*arguments(tiny, inputs, tmp_path / "two", method, *two)) == alone(method)
    assert [path.name.split("-")[0] for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["rank0"] * 2


@pytest.mark.parametrize("method", ["ph2p", "dpo_diff", "metric_guidance"])
def test_ranks_with_their_own_problems_find_what_one_finds(method, tiny, inputs, alone, tmp_path):
    two = ("--trainer.devices", "2")  # which chooses the strategy
    together = fit(*arguments(tiny, inputs, tmp_path / "two", method, *two))
    for one, other in zip(together, alone(method), strict=True):
        assert (one["key"], one["prompt"], one["unet_samples"]) == (
            other["key"],
            other["prompt"],
            other["unet_samples"],
        )
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    assert {path.name.split("-")[0] for path in (tmp_path / "two" / "checkpoints").iterdir()} == {"rank0", "rank1"}
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [problem["key"] for problem in together]
    assert not list((tmp_path / "two").glob("results-rank*"))


def test_ranks_need_not_take_the_same_number_of_steps(tiny, inputs, alone, tmp_path):
    """One has nothing to do."""
    one = ("--data.images", str(inputs / "0.png"), "--trainer.devices", "2", "--trainer.strategy", "problems")
    (together,) = fit(*arguments(tiny, inputs, tmp_path / "two", "ph2p", *one))
    assert together["prompt"] == alone("ph2p")[0]["prompt"]
