"""Measure how much time a batch of prompts saves: `python benchmarks/prompt_batching.py`.

Searches 100 prompts in one process; the first of them in one process each; and the very first ones like the released
code, which generates one seed of one candidate at a time. Prints the seconds per prompt of whole processes, and the
differences of the losses.
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

from batching import TRAIN
from prompt_pool import sample_prompts

SEED = 20_261_123


def searched(prompts: list[str], run: Path, extra: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """Search in a process of its own; return its seconds and the problems of its result."""
    command = [sys.executable, str(TRAIN), "fit", "--config", "configs/dpo_diff.yaml", "--run", str(run)]
    begun = time.perf_counter()
    subprocess.run(
        [*command, "--data.prompts", json.dumps(prompts), *extra], check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL
    )  # fmt: skip
    return time.perf_counter() - begun, json.loads((run / "result.json").read_text())["problems"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--alone", type=int, default=10, help="prompts that are searched one at a time")
    parser.add_argument("--looped", type=int, default=5, help="prompts that are searched image by image")
    parser.add_argument("--budget", type=int, default=5)
    args = parser.parse_args()
    prompts = [one.prompt for one in sample_prompts(SEED, args.count)]
    budget = ["--model.budget", str(args.budget)]
    print("| | prompts | seconds per prompt | largest difference of a loss |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        seconds, batched = searched(prompts, Path(scratch) / "batched", budget)
        print(f"| all in one run | {args.count} | {seconds / args.count:.1f} | |", flush=True)
        for name, count, extra in (
            ("one at a time", args.alone, budget),
            ("one candidate, one seed at a time", args.looped, [*budget, "--model.microbatch", "1"]),
        ):
            each = [
                searched([prompt], Path(scratch) / name / str(i), extra) for i, prompt in enumerate(prompts[:count])
            ]
            differences = [
                abs(a - b)
                for (_, (alone,)), among in zip(each, batched, strict=False)
                for a, b in zip(alone["loss_after"], among["loss_after"], strict=True)
            ]
            print(f"| {name} | {count} | {sum(s for s, _ in each) / count:.1f} | {max(differences):.1e} |", flush=True)


if __name__ == "__main__":
    main()
