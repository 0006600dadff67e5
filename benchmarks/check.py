"""Compare the schedule that `check` suggests with the tuned one: `python benchmarks/check.py`.

Runs `train.py check` with configs/ph2p.yaml on the development targets, then inverts these targets with that config and
with the one that `check` has written. For each config, prints its schedule, the share of prompts with the object's and
the background's word, the held-out similarity, and its difference from the first config's, target by target, with 95%
intervals. --runs keeps finished runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tables
import yaml
from inversion import TARGETS, fit, has, interval, rows_of, share, words_of

from lightning_prompts.commands.main import main as lightning_prompts

FIGURES = Path(__file__).parent / "figures" / "check.csv"
CONFIG = "configs/ph2p.yaml"


def suggested(runs: Path) -> Path:
    """Return the config that `check` writes; run `check` if there is none yet."""
    config = runs / "suggested.yaml"
    if not config.exists():
        runs.mkdir(parents=True, exist_ok=True)
        images = str(TARGETS / "development" / "targets.jsonl")
        lightning_prompts(["check", "--config", CONFIG, "--data.images", images, "--write", str(config)])
    return config


def measure(name: str, config: Path, runs: Path) -> None:
    """Invert the development targets with a config and add one row per target to the figures."""
    data = yaml.safe_load(config.read_text())["data"]["init_args"]
    words = words_of("development")
    rows = []
    for problem in fit(str(config), rows_of("development"), runs / name, ["--model.log_images_every_n_steps=0"]):
        wanted = words[problem["target"]]
        found: dict[str, Any] = {kind: int(has(problem["prompt"], wanted[kind])) for kind in ("object", "background")}
        low, high = data["timestep_range"]
        schedule = {"low": low, "high": high, "samples": data["num_noise_samples"]}
        score = {"similarity": problem["heldout_clip_similarity"], "unet_samples": problem["unet_samples"]}
        rows.append({"config": name, "target": problem["target"], **schedule, **found, **score})
    tables.add(FIGURES, rows)


def table() -> str:
    """Return the table of the measured figures."""
    measured = tables.read(FIGURES)
    head = (
        "timesteps, samples per step",
        "object word",
        "background word",
        "held-out similarity",
        "difference",
        "samples per image",
    )
    lines = [f"| | {' | '.join(head)} |", "|---|---|---|---|---|---|---|"]
    first: dict[str, float] = {}
    for name in dict.fromkeys(row["config"] for row in measured):
        rows = [row for row in measured if row["config"] == name]
        found = {row["target"]: row["similarity"] for row in rows}
        first = first or found
        cells = [
            f"[{rows[0]['low']:.0f}, {rows[0]['high']:.0f}), {rows[0]['samples']:.0f}",
            share([bool(row["object"]) for row in rows]),
            share([bool(row["background"]) for row in rows]),
            interval(list(found.values())),
            "" if found is first else interval([value - first[target] for target, value in found.items()]),
            f"{sum(row['unet_samples'] for row in rows) / len(rows):.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/check"))
    runs = parser.parse_args().runs
    there = {row["config"] for row in tables.read(FIGURES)}
    for name in ("ph2p.yaml", "suggested"):
        if name not in there:
            measure(name, Path(CONFIG) if name == "ph2p.yaml" else suggested(runs), runs)
    print(table())


if __name__ == "__main__":
    main()
