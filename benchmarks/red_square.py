"""The words found for a red square and nine more of its kind: `python benchmarks/red_square.py`.

Ten plain shapes, large and in the middle of a white background, are inverted in one run. Prints the exact prompts, and whether the
shape's and the colour's word or a synonym is among the words.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from inversion import has

from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.emoji.world import Scene, render

PICTURES = ("red square", "blue circle", "green triangle", "yellow star", "pink heart", "black cross", "purple diamond",
            "orange ring", "cyan hexagon", "brown arrow")  # fmt: skip


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/invert.yaml")
    args, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(PICTURES):
            color, shape = name.split()
            scene = Scene(shape, color, "plain", "white", "large", "center", "plain", number)
            render(scene).save(Path(scratch) / f"{number} {name}.png")
        run = Path(scratch) / "run"
        lightning_prompts(["fit", "--config", args.config, "--data.images", scratch, "--run", str(run), *extra])
        problems = json.loads((run / "result.json").read_text())["problems"]
    print("| picture | prompt | colour | shape | held-out similarity |\n|---|---|---|---|---|")
    for problem in problems:
        name = Path(problem["target"]).stem[2:]
        found = ["yes" if has(problem["prompt"], word) else "no" for word in name.split()]
        print(f"| {name} | {problem['prompt']} | {' | '.join(found)} | {problem['heldout_clip_similarity']:.2f} |")


if __name__ == "__main__":
    main()
