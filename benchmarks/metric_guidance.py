"""What moving an encoded prompt does to its pictures: `python benchmarks/metric_guidance.py`.

Searches embeddings for plain captions of the embedded model's world and draws 100 fresh seeds from each, before and after. Prints for
each objective, and for gradients through one, five and all calls of the denoiser, how often it moves the right way on the seeds of
the search and on the fresh ones, by how much, how often the held-out CLIP still recognises the object among all of the model's,
and what it costs. An object is recognised in a prompt if it is in at least half of its pictures. 95% intervals. The figures of each
prompt go to benchmarks/figures/, a file a line; what is there is not measured again. Settings were tried on other prompts.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from inversion import interval, share
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.cli import TRAINER
from lightning_prompts.data.addresses import FRESH
from lightning_prompts.data.prompts import Prompts
from lightning_prompts.emoji import world
from lightning_prompts.methods import MetricGuidance
from lightning_prompts.objectives import Blurriness, ClipQuality, ClipSimilarity, Objective, Sharpness

SEED, TOGETHER, FRESH_SEEDS = 20_261_130, 10, 100
CONFIG = yaml.safe_load(Path("configs/metric_guidance.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures" / "metric_guidance"
GOOD, BAD = "a photo", "a blurry dark grainy photo"  # looks that the embedded model's captions know
LINES: dict[str, dict[str, Any]] = {
    "sharpness": {},
    "blurriness": {},
    "quality": {},
    "sharpness, 5 calls": {"grad_steps": 5},
    "sharpness, all calls": {"grad_steps": CONFIG["sampling_steps"]},
}
COLUMNS = ["prompt", "optimised_before", "optimised_after", "fresh_before", "fresh_after", "object_before", "object_after",
           "heldout_before", "heldout_after", "seconds"]  # fmt: skip


def captions(seed: int, count: int) -> list[tuple[str, str]]:
    """Different captions and their objects, drawn at random."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        thing, color = rng.choice(sorted(world.OBJECTS)), rng.choice(sorted(world.COLORS))
        found[f"a {thing} on a {color} background"] = thing
    return list(found.items())


def objective(line: str) -> Objective:
    """What a line improves."""
    kind = line.partition(",")[0]
    return {"sharpness": Sharpness, "blurriness": Blurriness}[kind]() if kind != "quality" else ClipQuality(GOOD, BAD)


@cache
def judge() -> tuple[ClipSimilarity, Tensor]:
    """The held-out CLIP, and its features (O, E) of all objects."""
    clip = ClipSimilarity(str(EMOJI.parent / "scorer"))
    return clip, clip.features_of([f"a {name}" for name in world.OBJECTS])


@torch.no_grad()
def measure(line: str, some: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Searches together and judges: a row a prompt."""
    with torch.enable_grad():
        method = MetricGuidance(**CONFIG | {"objective": objective(line)} | LINES[line])
        data = Prompts([prompt for prompt, _ in some])
        with tempfile.TemporaryDirectory() as scratch:
            how: dict[str, Any] = {**TRAINER, "accelerator": "cpu", "logger": False, "default_root_dir": scratch}
            begun = time.perf_counter()
            pl.Trainer(**how).fit(method, datamodule=data)
            seconds = (time.perf_counter() - begun) / len(some)
            problems = list(data.records.values())
            pictures = method.both(problems, method.draw_noise(problems, FRESH, FRESH_SEEDS))
    clip, things = judge()
    rows: list[dict[str, Any]] = [{"prompt": prompt, "seconds": seconds} for prompt, _ in some]
    for when, drawn in zip(("before", "after"), pictures, strict=True):
        metrics, features = method.metric(method.values_of(drawn, problems)), clip.features_of_many(drawn, 50)
        for row, problem, (prompt, thing), metric, seen in zip(rows, problems, some, metrics, features, strict=True):
            right = (seen @ things.T).argmax(1) == list(world.OBJECTS).index(thing)
            row[f"optimised_{when}"] = fmean(getattr(problem, f"metric_{when}"))
            row[f"fresh_{when}"] = float(metric.mean())
            row[f"object_{when}"] = float(right.float().mean())
            row[f"heldout_{when}"] = float((seen @ clip.features_of([prompt])[0]).mean())
    return rows


def table() -> str:
    """The lines that are measured."""
    head = ("right way, optimised", "right way, fresh", "fresh before", "gain on fresh", "object still recognised", "held-out similarity",
            "seconds a prompt", "gain a second")  # fmt: skip
    found = [f"| objective | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for line in LINES:
        if not (file := file_of(line)).exists():
            continue
        with file.open(newline="") as stream:
            rows = [{k: float(v) for k, v in row.items() if k != "prompt"} for row in csv.DictReader(stream)]
        sign = 1 if objective(line).higher_is_better else -1
        gains = [sign * (row["fresh_after"] - row["fresh_before"]) for row in rows]
        known = [row for row in rows if row["object_before"] >= 0.5]
        seconds = fmean(row["seconds"] for row in rows)
        cells = [
            share([sign * (row["optimised_after"] - row["optimised_before"]) > 0 for row in rows]),
            share([gain > 0 for gain in gains]),
            f"{fmean(row['fresh_before'] for row in rows):.4f}",
            interval(gains),
            f"{share([row['object_after'] >= 0.5 for row in known])} of {len(known)}",
            interval([row["heldout_after"] - row["heldout_before"] for row in rows]),
            f"{seconds:.1f}",
            f"{fmean(gains) / seconds:.5f}",
        ]
        found.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(found)


def file_of(line: str) -> Path:
    """Where the figures of a line are."""
    return FIGURES / f"{line.replace(', ', '_').replace(' ', '_')}.csv"


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", choices=LINES, help="measure one line")
    args = parser.parse_args()
    chosen = captions(SEED, args.count)
    for line in [args.only] if args.only else LINES:
        if file_of(line).exists():
            continue
        rows = [row for i in range(0, args.count, TOGETHER) for row in measure(line, chosen[i : i + TOGETHER])]
        FIGURES.mkdir(parents=True, exist_ok=True)
        with file_of(line).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({name: f"{v:.5f}" if isinstance(v, float) else v for name, v in row.items()})
    print(table())


if __name__ == "__main__":
    main()
