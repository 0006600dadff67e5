"""Measure the effect of metric guidance on images: `python benchmarks/metric_guidance.py`.

Searches embeddings for plain captions of the embedded model's world and generates images from 100 fresh seeds of each,
before and after. Prints for each objective, and for gradients through one, five and all denoiser calls, how often the
metric improves on the seeds of the search and on the fresh ones, by how much, how often the held-out CLIP still
recognizes the object among all of the model's, and the cost. An object is kept in a prompt if most of its images show
it both before and after, and in an image if the image of the same seed showed it. Intervals are 95% intervals. The
figures of each prompt go to benchmarks/figures/, one file per line of the table; existing ones are not measured again.
The settings were tuned on other prompts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import tables
import torch
import yaml
from inversion import interval, share, spread
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.emoji import world
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, MetricGuidance
from lightning_prompts.objectives import Blurriness, ClipQuality, ClipSimilarity, Objective, Sharpness
from lightning_prompts.sampling.seeding import FINAL

SEED, COUNT, BATCH, FRESH_SEEDS = 20_261_130, 50, 10, 100
CONFIG = yaml.safe_load(Path("configs/metric_guidance.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures" / "metric_guidance"
GOOD, BAD = "a photo", "a blurry dark grainy photo"  # looks that occur in the embedded model's captions
LINES: dict[str, dict[str, Any]] = {
    "sharpness": {},
    "blurriness": {},
    "quality": {},
    "sharpness, 5 calls": {"grad_steps": 5},
    "sharpness, all calls": {"grad_steps": 10},  # of the config's 10 denoising steps on the embedded model
}


def captions(seed: int, count: int) -> list[tuple[str, str]]:
    """Sample different captions and their objects."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        thing, color = rng.choice(sorted(world.OBJECTS)), rng.choice(sorted(world.COLORS))
        found[f"a {thing} on a {color} background"] = thing
    return list(found.items())


def objective(line: str) -> Objective:
    """Return the objective of a line."""
    kind = line.partition(",")[0]
    return {"sharpness": Sharpness, "blurriness": Blurriness}[kind]() if kind != "quality" else ClipQuality(GOOD, BAD)


@cache
def heldout_clip() -> tuple[ClipSimilarity, Tensor]:
    """Return the held-out CLIP, and its features (O, E) of all objects."""
    clip = ClipSimilarity(str(EMOJI.parent / "scorer"))
    return clip, clip.features_of([f"a {name}" for name in world.OBJECTS])


@torch.no_grad()
def measure(line: str, some: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Search prompts together and score them; return one row per prompt."""
    with torch.enable_grad():
        method = MetricGuidance(**CONFIG | {"objective": objective(line)} | LINES[line])
        data = Prompts([prompt for prompt, _ in some])
        with tempfile.TemporaryDirectory() as scratch:
            trainer_settings: dict[str, Any] = {
                **TRAINER,
                "accelerator": "cpu",
                "logger": False,
                "default_root_dir": scratch,
            }
            begun = time.perf_counter()
            pl.Trainer(**trainer_settings).fit(method, datamodule=data)
            seconds = (time.perf_counter() - begun) / len(some)
            problems = list(data.folder.load().values())
            images = method.images_before_and_after(problems, method.draw_noise(problems, FINAL, FRESH_SEEDS))
    clip, things = heldout_clip()
    good, bad = clip.features_of([GOOD, BAD])
    seen_right: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = [{"prompt": prompt, "seconds": seconds} for prompt, _ in some]
    for when, drawn in zip(("before", "after"), images, strict=True):
        metrics, features = method.metric(method.values_of(drawn, problems)), clip.features_of_many(drawn, 50)
        for row, problem, (prompt, thing), metric, seen in zip(rows, problems, some, metrics, features, strict=True):
            right = (seen @ things.T).argmax(1) == list(world.OBJECTS).index(thing)
            row[f"optimized_{when}"] = fmean(getattr(problem, f"metric_{when}"))
            row[f"fresh_{when}"] = float(metric.mean())
            row[f"object_{when}"] = float(right.float().mean())
            was = seen_right.setdefault(prompt, right)
            row["object_kept"] = float(right[was].float().mean()) if was.any() else float("nan")
            row[f"heldout_{when}"] = float((seen @ clip.features_of([prompt])[0]).mean())
            row[f"heldout_quality_{when}"] = float((100 * seen @ (good - bad)).sigmoid().mean())
    return rows


def table() -> str:
    """Return the table of the lines that are complete."""
    head = ("improved, seeds of the search", "improved, fresh seeds", "metric before", "gain", "object kept, prompts",
            "object kept, images",
            "held-out similarity", "held-out quality", "seconds per prompt", "gain per second")  # fmt: skip
    found = [f"| objective | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for line in LINES:
        if len(rows := rows_of(line)) < COUNT:
            continue
        sign = 1 if objective(line).higher_is_better else -1
        gain = {
            of: [sign * (row[f"{of}_after"] - row[f"{of}_before"]) for row in rows] for of in ("optimized", "fresh")
        }
        known = [row for row in rows if row["object_before"] >= 0.5]
        seconds = fmean(row["seconds"] for row in rows)
        cells = [
            share([gain > 0 for gain in gain["optimized"]]),
            share([gain > 0 for gain in gain["fresh"]]),
            f"{fmean(row['fresh_before'] for row in rows):.4f}",
            f"{fmean(gain['fresh']):.4f} ± {spread(gain['fresh']):.4f}",
            f"{share([row['object_after'] >= 0.5 for row in known])} of {len(known)}",
            interval([row["object_kept"] for row in rows if row["object_before"]]),
            interval([row["heldout_after"] - row["heldout_before"] for row in rows]),
            interval([row["heldout_quality_after"] - row["heldout_quality_before"] for row in rows]),
            f"{seconds:.1f}",
            f"{fmean(gain['fresh']) / seconds:.5f}",
        ]
        found.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(found)


def file_of(line: str) -> Path:
    """Return the file with the figures of a line."""
    return FIGURES / f"{line.replace(', ', '_').replace(' ', '_')}.csv"


def rows_of(line: str) -> list[dict[str, Any]]:
    """Return the figures of a line, one row per prompt."""
    return tables.read(file_of(line))


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=LINES, help="measure one line")
    args = parser.parse_args()
    chosen = captions(SEED, COUNT)
    for line in [args.only] if args.only else LINES:
        known = {row["prompt"] for row in rows_of(line)}
        missing = [caption for caption in chosen if caption[0] not in known]
        for some in (missing[i : i + BATCH] for i in range(0, len(missing), BATCH)):
            tables.add(file_of(line), measure(line, some))
    print(table())


if __name__ == "__main__":
    main()
