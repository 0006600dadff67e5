"""Measure how much time a batch of images saves: `python benchmarks/batching.py --config configs/ph2p.yaml`.

Inverts the same targets in one process, then in one process per target, and prints both times and the scores of the
prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from inversion import TARGETS, has, interval

TRAIN = Path(__file__).parents[1] / "train.py"


def invert(config: str, images: list[Path], run: Path, extra: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """Invert images in a process of its own; return its seconds and the problems of its result."""
    command = [sys.executable, str(TRAIN), "fit", "--config", config, "--run", str(run)]
    begun = time.perf_counter()
    subprocess.run(
        [*command, "--data.images", json.dumps([str(path) for path in images]), *extra],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begun, json.loads((run / "result.json").read_text())["problems"]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/ph2p.yaml")
    parser.add_argument("--targets", default="evaluation", choices=["evaluation", "development"])
    parser.add_argument("--count", type=int, default=16)
    args, extra = parser.parse_known_args()
    folder = (TARGETS / args.targets).resolve()
    words = json.loads((folder / "words.json").read_text())
    images = sorted(folder.glob("*.png"))[: args.count]
    with tempfile.TemporaryDirectory() as scratch:
        seconds, batched = invert(args.config, images, Path(scratch) / "batched", extra)
        each = [invert(args.config, [image], Path(scratch) / image.stem, extra) for image in images]
    alone, apart = [problems[0] for _, problems in each], sum(part for part, _ in each)
    print("| | one run | one run per image |")
    print("|---|---|---|")
    print(f"| seconds, {len(images)} targets | {seconds:.0f} | {apart:.0f} |")
    losses = [sum(p["validation_loss"] for p in some) / len(images) for some in (batched, alone)]
    print(f"| validation loss | {losses[0]:.5f} | {losses[1]:.5f} |")
    similarities = [interval([p["heldout_clip_similarity"] for p in some]) for some in (batched, alone)]
    print("| held-out similarity | " + " | ".join(similarities) + " |")
    for kind in ("object", "background"):
        found = [[float(has(str(p["prompt"]), words[p["target"]][kind])) for p in some] for some in (batched, alone)]
        print(f"| {kind} word found | " + " | ".join(map(interval, found)) + " |")
    equal = sum(one["prompt"] == other["prompt"] for one, other in zip(batched, alone, strict=True))
    print(f"| time in one run / time in one run per image | {seconds / apart:.2f} | |")
    print(f"| equal prompts | {equal} of {len(images)} | |")


if __name__ == "__main__":
    main()
