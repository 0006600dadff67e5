"""Invert a red square and nine other shapes: `python benchmarks/red_square.py`.

Inverts ten plain shapes, large and in the middle of a white background, in one run. Prints the exact prompts, and
whether they contain the word for the shape and the color, or a synonym.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from inversion import has

from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.emoji.world import Scene, render

SHAPES = ("red square", "blue circle", "green triangle", "yellow star", "pink heart", "black cross", "purple diamond",
            "orange ring", "cyan hexagon", "brown arrow")  # fmt: skip


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/invert.yaml")
    args, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(SHAPES):
            color, shape = name.split()
            scene = Scene(shape, color, "plain", "white", "large", "center", "plain", number)
            render(scene).save(Path(scratch) / f"{number} {name}.png")
        run = Path(scratch) / "run"
        lightning_prompts(["fit", "--config", args.config, "--data.images", scratch, "--run", str(run), *extra])
        problems = json.loads((run / "result.json").read_text())["problems"]
    print("| image | prompt | color | shape | held-out similarity |\n|---|---|---|---|---|")
    for problem in problems:
        name = Path(problem["target"]).stem[2:]
        found = ["yes" if has(problem["prompt"], word) else "no" for word in name.split()]
        print(f"| {name} | {problem['prompt']} | {' | '.join(found)} | {problem['heldout_clip_similarity']:.2f} |")


if __name__ == "__main__":
    main()
