"""Measure how often an inversion finds the words: `python benchmarks/inversion.py --config configs/ph2p.yaml`.

Prints the share of targets whose word for the object and for the background (or a synonym) is in the found prompt, with
95% intervals, the similarity of regenerations by the held-out CLIP, the denoiser samples (a backward pass counts as
one) and the seconds per image.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from scipy.stats import t as student

from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.emoji.world import SYNONYMS
from lightning_prompts.metrics.words import content_words

TARGETS = Path(__file__).parent / "targets"


def spread(values: Sequence[float]) -> float:
    """Return half the width of the mean's 95% interval, by Student's t."""
    count = len(values)
    quantile = float(student.ppf(0.975, count - 1)) if count > 1 else math.nan
    return quantile * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan


def interval(values: Sequence[float]) -> str:
    """Return the mean and its 95% interval."""
    return f"{statistics.fmean(values):.3f} ± {spread(values):.3f}"


def share(values: Sequence[bool]) -> str:
    """Return the share of true values and its 95% interval by Wilson, which is wide even if all or none are true."""
    low, high = binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    return f"{sum(values) / len(values):.3f} ({low:.3f} to {high:.3f})"


def has(prompt: str, word: str) -> bool:
    """Return whether a prompt has a word or one of its synonyms."""
    return bool(set(content_words(prompt)) & {word, *SYNONYMS.get(word, ())})


def words_of(targets: str) -> dict[str, dict[str, str]]:
    """Return the words that each target's prompt should have."""
    found: dict[str, dict[str, str]] = json.loads((TARGETS / targets / "words.json").read_text())
    return found


def rows_of(targets: str, count: int | None = None) -> list[dict[str, str]]:
    """Return the first targets, or all: `file`, a path, and `caption`."""
    folder = TARGETS / targets
    rows = [json.loads(line) for line in (folder / "targets.jsonl").read_text().splitlines()[:count]]
    return [{**row, "file": str(folder.resolve() / row["file"])} for row in rows]


def fit(config: str, rows: Sequence[dict[str, str]], run: Path, extra: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Invert the images of a list in one run, which resumes if it was stopped; return its problems."""
    if not (run / "result.json").exists():
        chosen = run.parent / f"{run.name}.jsonl"
        chosen.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_text("\n".join(json.dumps(row) for row in rows))
        images, folder = ["--data.images", str(chosen)], ["--run", str(run), "--ckpt_path", "last"]
        lightning_prompts(["fit", "--config", config, *images, *folder, *extra])
    problems: list[dict[str, Any]] = json.loads((run / "result.json").read_text())["problems"]
    return problems


def alone(run: Path, problem: dict[str, Any], folder: Path) -> str:
    """Create a run with one of a run's problems; return its folder."""
    (folder / "problems").mkdir(parents=True)
    shutil.copy(run / "config.yaml", folder)
    shutil.copy(run / "problems" / f"{problem['key']}.json", folder / "problems")
    return str(folder)


def table_of(config: str, targets: str, count: int, extra: list[str]) -> dict[str, str]:
    """Invert and score; return the column of a config."""
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        problems = fit(config, rows_of(targets, count), Path(scratch) / "run", extra)
        seconds = time.perf_counter() - begun
    words = words_of(targets)
    table = {"targets": f"{targets}, {len(problems)}", "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for kind in ("object", "background", "second"):
        wanted = [(words[p["target"]].get(kind), str(p["prompt"])) for p in problems]
        found = [has(prompt, word) for word, prompt in wanted if word]
        if found:
            table[f"{kind} word found"] = share(found)
    table["held-out similarity"] = interval([p["heldout_clip_similarity"] for p in problems])
    table["denoiser samples per image"] = f"{sum(p['unet_samples'] for p in problems) / len(problems):.0f}"
    table["seconds per image, search"] = f"{sum(p['seconds'] for p in problems) / len(problems):.1f}"
    table["seconds per image, whole run"] = f"{seconds / len(problems):.1f}"
    return table


def main() -> None:
    """Print one table with one column per config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="+", default=["configs/ph2p.yaml"])
    parser.add_argument("--targets", default="evaluation", choices=["evaluation", "outside", "development"])
    parser.add_argument("--count", type=int, default=200)
    args, extra = parser.parse_known_args()
    tables = [table_of(config, args.targets, args.count, extra) for config in args.config]
    print(f"| | {' | '.join(Path(config).stem for config in args.config)} |\n|{'---|' * (1 + len(tables))}")
    for name in tables[0]:
        print(f"| {name} | {' | '.join(table[name] for table in tables)} |")


if __name__ == "__main__":
    main()
