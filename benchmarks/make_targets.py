"""Render the target images: `python benchmarks/make_targets.py`, which needs the emoji font and package.

`evaluation` (200 scenes of the grammar) and `outside` (40 scenes that it cannot describe) are for reporting;
`development` (48) is for tuning. Their seeds differ from each other and from those of the training data.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lightning_prompts.emoji import world

TARGETS = Path(__file__).parent / "targets"
OTHER_COLORS = {"teal": (0, 110, 110), "maroon": (110, 10, 40), "olive": (120, 120, 20), "lavender": (205, 190, 250)}


def write(name: str, rows: list[tuple[Image.Image, str, dict[str, str]]]) -> None:
    """Write images, the list with captions that `--data.images` takes, and the words for word recall."""
    folder = TARGETS / name
    folder.mkdir(parents=True, exist_ok=True)
    lines, words = [], {}
    for i, (image, caption, wanted) in enumerate(rows):
        image.save(folder / f"{i:03}.png", optimize=True)
        lines.append(json.dumps({"file": f"{i:03}.png", "caption": caption}))
        words[f"{i:03}.png"] = wanted
    (folder / "targets.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "words.json").write_text(json.dumps(words, indent=0) + "\n")


def inside(seed: int, count: int) -> list[tuple[Image.Image, str, dict[str, str]]]:
    """Return scenes that the grammar describes."""
    rng = random.Random(seed)
    scenes = [world.random_scene(rng) for _ in range(count)]
    return [
        (
            world.render(scene),
            world.caption(scene, rng, keep=1, synonym_share=0),
            {"object": scene.object, "background": scene.background},
        )
        for scene in scenes
    ]


def outside(seed: int, count: int) -> list[tuple[Image.Image, str, dict[str, str]]]:
    """Return scenes with two objects side by side, or with a background color that no caption names."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        scene = replace(world.random_scene(rng), look="plain")
        if i % 2:
            left = replace(scene, size="small", place="left")
            right = replace(world.random_scene(rng), size="small", place="right")
            caption = f"a {left.object} and a {right.object}"
            rows.append((world.render(left, second=right), caption, {"object": left.object, "second": right.object}))
        else:
            name = rng.choice(list(OTHER_COLORS))
            usual = world.COLORS[scene.background]
            world.COLORS[scene.background] = OTHER_COLORS[name]
            rows.append((world.render(scene), f"a {scene.object} on a {name} background", {"object": scene.object}))
            world.COLORS[scene.background] = usual
    return rows


if __name__ == "__main__":
    write("evaluation", inside(20_261_120, 200))
    write("outside", outside(20_261_121, 40))
    write("development", inside(20_261_122, 48))
