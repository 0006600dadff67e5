"""Shared parts of the benchmarks of large jobs: small searches on the embedded model, started from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import parquet
from safetensors import safe_open

from lightning_prompts.emoji import world

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "figures"
# One thread per process, so that ranks do not compete for cores and all processes round in the same way.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
METHODS = {
    "PH2P": ["ph2p", "--model.steps", "24", "--model.restart_every", "8", "--model.score_every_n_steps", "4"],
    "PH2P by L-BFGS": ["ph2p_lbfgs", "--model.steps", "3"],
    "GCG": ["invert", "--model.steps", "3", "--model.candidates", "8", "--model.rerank.num_inference_steps", "4"],
    "DPO-Diff": ["dpo_diff", "--model.budget", "12", "--model.seeds", "2", "--model.sampler.num_inference_steps", "6",
    "--model.schedule", "step-2-2"],
    "MetricGuidance": ["metric_guidance", "--model.objective", "Sharpness", "--model.steps", "5", "--model.seeds", "2"],
}  # fmt: skip
PROMPTS = ("a dog on a blue background", "a big red square", "a small cat on a green background", "two trees", "a car")


def write_images(folder: Path, count: int) -> Path:
    """Write this many images of a rectangle on a plain background; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        colors = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        pixels = np.broadcast_to(colors[0], (world.SIZE, world.SIZE, 3)).copy()
        x, y, side = rng.integers(4, 36, 3)
        pixels[y : y + side // 2 + 8, x : x + side // 2 + 8] = colors[1]
        _save(folder / f"{i:05d}.png", pixels)
    return folder


def _save(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def command(method: str, scratch: Path, run: Path, *extra: str) -> list[str]:
    """Return the arguments of a search for five images or prompts, two at a time."""
    config, *settings = METHODS[method]
    inputs = write_images(scratch / "images", 5)
    given = ["--data.images", str(inputs)]
    if config in ("dpo_diff", "metric_guidance"):
        given = ["--data.prompts", json.dumps(PROMPTS)]
    return ["train.py", "fit", "--config", f"configs/{config}.yaml", *given, "--run", str(run), *settings,
            "--model.batch_size", "2", "--model.log_images_every_n_steps", "0", "--trainer.accelerator", "cpu",
            *extra]  # fmt: skip


def start(
    args: list[str], launcher: tuple[str, ...] = (), before: tuple[str, ...] = (), **more: str
) -> subprocess.Popen[bytes]:
    """Start a search in a process group of its own, with a launcher of processes if one is given."""
    return subprocess.Popen(
        [*before, sys.executable, *launcher, *args], cwd=ROOT, env={**ENVIRONMENT, **more}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes], expected: int = 0) -> None:
    """Wait until a search has finished successfully."""
    _, errors = process.communicate()
    if process.returncode != expected:
        raise SystemExit(f"The search ended with exit code {process.returncode}:\n{errors.decode()[-3000:]}")


def results(run: Path) -> list[dict[str, Any]]:
    """Return the results without the times."""
    problems = json.loads((run / "result.json").read_text())["problems"]
    return [{name: value for name, value in problem.items() if name != "seconds"} for problem in problems]


def unreadable(run: Path) -> list[str]:
    """Return the files of a run that are not readable, or left over."""
    return [str(file.relative_to(run)) for file in sorted(run.rglob("*")) if file.is_file() and not _readable(file)]


def _readable(file: Path) -> bool:
    from PIL import Image

    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".jsonl":
            [json.loads(line) for line in file.read_bytes().splitlines()]
        elif file.suffix == ".ckpt":
            torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118  # no dictionary
        elif file.suffix == ".parquet":
            parquet.read_table(file)
        elif file.suffix == ".png":
            Image.open(file).verify()
        return file.suffix != ".tmp"
    except Exception:  # any error of a reader on a broken file
        return False
