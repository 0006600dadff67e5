"""Choosing among moves of an encoded prompt, against choosing among edits of its words: `python benchmarks/human_feedback.py`.

A scripted chooser wants a picture that it alone knows: the embedded model's, of the same object, but of another size, place,
colour and pattern than the prompt says. It sees five pictures a round, twenty times, and judges by the CLIP that goes with the
model; it goes to the one that it likes best, or stays where it is if it likes that more. In one interface the pictures are the
candidates of `HumanFeedback`, with a choice of strengths; in the other they are drawn from random edits of the prompt, one word
added, exchanged or left out, and a choice takes the edit. Prints how like the wanted picture the last one is by the held-out
CLIP, and the time from a choice to the next five pictures. Other targets were used to choose the settings.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from inversion import interval
from torch import Tensor

from lightning_prompts.callbacks.grid import to_image
from lightning_prompts.cli import TRAINER
from lightning_prompts.data.prompts import Prompts
from lightning_prompts.emoji import world
from lightning_prompts.methods import HumanFeedback
from lightning_prompts.methods.human_feedback import Scripted

SEED, TARGETS, CHOICES = 20_261_150, 8, 20
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
CONFIG = yaml.safe_load(Path("configs/human_feedback.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures" / "human_feedback.csv"


def targets(seed: int, count: int) -> list[tuple[str, str]]:
    """What the person says, and what they want."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        thing, (said, wanted) = rng.choice(sorted(world.OBJECTS)), rng.sample(sorted(world.COLORS), 2)
        size, pattern = rng.choice(["small", "large"]), rng.choice(["", "striped ", "dotted "])
        place = rng.choice(["at the top", "at the bottom", "on the left", "on the right"])
        found.append(
            (f"a {thing} on a {said} background", f"a {size} {thing} on a {pattern}{wanted} background {place}")
        )
    return found


def edit(text: str, words: list[str], rng: random.Random) -> str:
    """A text with one word added, exchanged or, unless it is the only one, left out."""
    change, varied = rng.choice(["add", "exchange", "leave out"]), text.split()
    place = rng.randrange(len(varied) + (change == "add"))
    if change == "leave out" and len(varied) > 1:
        del varied[place]
    else:
        varied[place : place + (change != "add")] = [rng.choice(words)]
    return " ".join(varied)


def edited(method: HumanFeedback, chooser: Scripted, prompt: str, seed: int) -> tuple[str, Tensor]:
    """The prompt that twenty choices among edits lead to, and its picture (3, H, W)."""
    rng, noise, count = random.Random(seed), method.noise[:, 0], int(method.candidates)
    picture = method.draw([prompt], noise)[0]
    for _ in range(CHOICES):
        edits = [edit(prompt, method.words, rng) for _ in range(count)]
        drawn = method.draw(edits, noise.expand(count, -1, -1, -1))
        seen = chooser.likes([picture, *drawn])
        best = int(seen[1:].argmax())
        if seen[1 + best] > seen[0]:
            prompt, picture = edits[best], drawn[best]
    return prompt, picture


def measure(said: str, wanted: str, seed: int) -> dict[str, Any]:
    """Both ways to a target."""
    from metric_guidance import judge

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "wanted.png"
        painter = HumanFeedback(**CONFIG)
        noise = torch.randn(1, *painter.backbone.latent_shape, generator=torch.Generator().manual_seed(seed))
        (picture,) = painter.draw([wanted], noise)
        to_image(picture).save(file)
        chooser = Scripted(str(file), strengths=STRENGTHS)
        method = HumanFeedback(**CONFIG | {"chooser": chooser, "steps": CHOICES})
        data = Prompts(said, seed=seed)
        how: dict[str, Any] = {**TRAINER, "accelerator": "cpu", "logger": False, "default_root_dir": scratch}
        begun = time.perf_counter()
        pl.Trainer(**how).fit(method, datamodule=data)
        seconds = (time.perf_counter() - begun) / CHOICES
        prompt, by_words = edited(method, chooser, said, seed)
    clip, _ = judge()
    similar = (
        clip.features(torch.stack([method.drawn[0], method.drawn[-1], by_words])) @ clip.features(picture[None])[0]
    )
    (problem,) = data.records.values()
    names = ("before", "by_moves", "by_edits")
    return {
        "said": said, "wanted": wanted, **dict(zip(names, similar.tolist(), strict=True)),
        "moves": len(problem.moves), "edited": prompt, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=TARGETS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the targets")
    args = parser.parse_args()
    rows = [measure(*pair, args.seed + i) for i, pair in enumerate(targets(args.seed, args.count))]
    if args.seed == SEED:
        with FIGURES.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("| said | wanted | before | by moves | by edits | moves |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['said']} | {row['wanted']} | {row['before']:.3f} | {row['by_moves']:.3f} | {row['by_edits']:.3f} | {row['moves']} |"
        )
    nearer = [row["by_moves"] > row["by_edits"] for row in rows]
    print(f"nearer by moves: {sum(nearer)} of {len(nearer)}")
    print(f"by moves less by edits: {interval([row['by_moves'] - row['by_edits'] for row in rows])}")
    print(f"seconds a round: {fmean(row['seconds'] for row in rows):.1f}")


if __name__ == "__main__":
    main()
