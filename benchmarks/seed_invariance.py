"""Measure how much one embedding fixes the image of every seed: `python benchmarks/seed_invariance.py`.

Takes ten plain captions of the embedded model's world and, as targets, the images of ten seeds for each. For each line,
a variant of the method, generates images from 20 fresh seeds of the plain prompt and of the found embedding, and prints
how similar they are to the target, by the held-out CLIP and by the peak signal-to-noise ratio. Closed is the share of
the plain prompt's distance to the target that the embedding removes, for one minus the similarity and for the mean
squared error. Intervals are 95% intervals over the captions. The figures of each target go to benchmarks/figures/, one
file per line; existing ones are not measured again. The settings were tuned on other captions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import tables
import torch
import yaml
from inversion import interval
from metric_guidance import captions, heldout_clip

from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, SeedInvariance
from lightning_prompts.runs.record import SeedInvarianceResult
from lightning_prompts.sampling.seeding import FINAL

SEED, CAPTIONS, TARGETS, FRESH_SEEDS = 20_261_140, 10, 10, 20
CONFIG = yaml.safe_load(Path("configs/seed_invariance.yaml").read_text())["model"]["init_args"]
PAPER = {
    "compare": "latents",
    "stages": [1, 2, 3],
    "grad_steps": 1,
    "ramp": 1.0,
    "seeds_per_step": 3,
    "steps": 120,
}
LINES: dict[str, dict[str, Any]] = {
    "all rows": {},
    "only the CLIP": {"pixels": 0.0},
    "one row": {"one_row": True},
    "only prompt_embeds": {"unconditional": False},
    "as in the paper": {**PAPER, "one_row": True, "unconditional": False},
}
FIGURES = Path(__file__).parent / "figures" / "seed_invariance"


def measure(line: str, prompt: str) -> list[dict[str, Any]]:
    """Search all targets of a caption together and score them; return one row per target."""
    method = SeedInvariance(**CONFIG | LINES[line] | {"target_seeds": list(range(TARGETS))})
    data = Prompts(prompt)
    with tempfile.TemporaryDirectory() as scratch:
        trainer_settings: dict[str, Any] = {
            **TRAINER,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": scratch,
        }
        pl.Trainer(**trainer_settings).fit(method, datamodule=data)
        problems = list(data.folder.load().values())
        with torch.no_grad():
            drawn = method.images_before_and_after(problems, method.draw_noise(problems, FINAL, FRESH_SEEDS))
            wanted = method.targets(problems).unsqueeze(1)
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "target": SeedInvarianceResult.of(problem).target_seed, "seconds": problem.seconds}
        for problem in problems
    ]
    clip, _ = heldout_clip()
    seen = clip.features_of_many(wanted, 50)
    for when, images in zip(("before", "after"), drawn, strict=True):
        similarity = (clip.features_of_many(images, 50) * seen).sum(2).mean(1)
        error = (images - wanted).square().flatten(2).mean(2)
        ratio = (10 * torch.log10(4 / error)).mean(1)
        for i, row in enumerate(rows):
            row |= {
                f"clip_{when}": float(similarity[i]),
                f"error_{when}": float(error[i].mean()),
                f"psnr_{when}": float(ratio[i]),
            }
    return rows


def file_of(line: str) -> Path:
    """Return the file with the figures of a line."""
    return FIGURES / f"{line.replace(' ', '_')}.csv"


def rows_of(line: str) -> list[dict[str, Any]]:
    """Return the figures of a line, one row per target."""
    return tables.read(file_of(line))


def table() -> str:
    """Return the table of the lines with at least two captions."""
    head = ("captions", "held-out similarity", "closed", "PSNR in dB", "squared error closed", "seconds per target")
    found = [f"| embedding | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for line in LINES:
        by_caption: dict[str, list[dict[str, Any]]] = {}
        for row in rows_of(line):
            by_caption.setdefault(row["prompt"], []).append(row)
        if len(by_caption) < 2:  # no interval
            continue
        names = by_caption[next(iter(by_caption))][0].keys() - {"prompt", "target"}
        mean = [{name: fmean(row[name] for row in rows) for name in names} for rows in by_caption.values()]
        whole = {name: fmean(row[name] for row in mean) for name in names}
        cells = [
            str(len(mean)),
            f"{whole['clip_before']:.4f} → {whole['clip_after']:.4f}",
            interval([(row["clip_after"] - row["clip_before"]) / (1 - row["clip_before"]) for row in mean]),
            f"{whole['psnr_before']:.2f} → {whole['psnr_after']:.2f}",
            interval([1 - row["error_after"] / row["error_before"] for row in mean]),
            f"{whole['seconds']:.0f}",
        ]
        found.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(found)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="number of captions")
    parser.add_argument("--only", choices=LINES, help="measure one line")
    args = parser.parse_args()
    for line in [args.only] if args.only else LINES:
        known = {row["prompt"] for row in rows_of(line)}
        for prompt in [prompt for prompt, _ in captions(SEED, CAPTIONS)[: args.captions] if prompt not in known]:
            tables.add(file_of(line), measure(line, prompt))
    print(table())


if __name__ == "__main__":
    main()
