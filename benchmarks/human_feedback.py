"""Compare moves of an encoded prompt with edits of its words: `python benchmarks/human_feedback.py`.

A scripted chooser has a target image, and a prompt that describes it only in part. Eight targets are from `outside`:
the object stands on a color that no caption of the embedded model names, and the prompt names the object. Eight are
scenes from `evaluation`, and the prompt names the object and the color of the background, but not the rest, which words
could describe. The chooser sees five images per round, for twenty rounds; it moves to the one that it prefers, or keeps
the current image if it prefers that. With moves, the images are the candidates of `HumanFeedback`, and the preferred
one at full and at half strength; with edits, they come from random edits of the prompt (one word added, replaced or
removed), and a choice takes the edit. Prints the similarity of the last image to the target by the held-out CLIP. The
settings were tuned on other images.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import tables
import torch
import yaml
from inversion import TARGETS, interval, words_of
from metric_guidance import heldout_clip
from torch import Tensor

from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, HumanFeedback
from lightning_prompts.methods.steering.human_feedback import Scripted
from lightning_prompts.runs.record import HumanFeedbackResult

COUNT, CHOICES, STRENGTHS = 8, 20, (0.5, 1.0)
CONFIG = yaml.safe_load(Path("configs/human_feedback.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures" / "human_feedback"


def tasks(targets: str) -> list[tuple[str, Path]]:
    """Return the prompts and the files of the target images."""
    words = words_of(targets)
    if targets == "outside":  # every second target has such a color
        return [(f"a {of['object']}", TARGETS / targets / name) for name, of in list(words.items())[: 2 * COUNT : 2]]
    pairs = [(f"a {of['object']} on a {of['background']} background", name) for name, of in words.items()]
    return [(text, TARGETS / targets / name) for text, name in pairs[:COUNT]]


def edit(text: str, words: list[str], rng: random.Random) -> str:
    """Return a text with one word added, replaced or, unless it is the only one, removed."""
    change, varied = rng.choice(["add", "replace", "remove"]), text.split()
    place = rng.randrange(len(varied) + (change == "add"))
    if change == "remove" and len(varied) > 1:
        del varied[place]
    else:
        varied[place : place + (change != "add")] = [rng.choice(words)]
    return " ".join(varied)


def edited_prompt(method: HumanFeedback, chooser: Scripted, prompt: str, seed: int) -> tuple[str, Tensor]:
    """Return the prompt after twenty choices among edits, and its image (3, H, W)."""
    rng, noise, count = random.Random(seed), method.noise[:, 0], int(method.candidates)
    image = method.generate([prompt], noise)[0]
    for _ in range(CHOICES):
        edits = [edit(prompt, method.words, rng) for _ in range(count)]
        drawn = method.generate(edits, noise.expand(count, -1, -1, -1))
        similarities = chooser.similarities([image, *drawn])
        best = int(similarities[1:].argmax())
        if similarities[1 + best] > similarities[0]:
            prompt, image = edits[best], drawn[best]
    return prompt, image


def measure(prompt: str, file: Path, seed: int) -> dict[str, Any]:
    """Measure moves and edits for one target."""
    chooser = Scripted(str(file), strengths=STRENGTHS)
    method = HumanFeedback(**CONFIG | {"chooser": chooser, "steps": CHOICES})
    data = Prompts(prompt, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer_settings: dict[str, Any] = {
            **TRAINER,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": scratch,
        }
        pl.Trainer(**trainer_settings).fit(method, datamodule=data)
        edited, by_words = edited_prompt(method, chooser, prompt, seed)
    clip, _ = heldout_clip()
    similarities = clip.features(torch.stack([chooser.wanted, method.images[0], method.images[-1], by_words]))
    similar = dict(zip(("before", "by_moves", "by_edits"), (similarities[1:] @ similarities[0]).tolist(), strict=True))
    (problem,) = data.folder.load().values()
    return {
        "prompt": prompt,
        "image": file.name,
        **similar,
        "moves": len(HumanFeedbackResult.of(problem).moves),
        "edited": edited,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per target, and a summary."""
    head = ("prompt", "image", "before", "by moves", "by word edits")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    moves, edits = ([row[f"by_{way}"] for row in rows] for way in ("moves", "edits"))
    for row, by_moves, by_edits in zip(rows, moves, edits, strict=True):
        lines.append(f"| {row['prompt']} | {row['image']} | {row['before']:.3f} | {by_moves:.3f} | {by_edits:.3f} |")
    closer = sum(by_moves > by_edits for by_moves, by_edits in zip(moves, edits, strict=True))
    difference = interval([by_moves - by_edits for by_moves, by_edits in zip(moves, edits, strict=True)])
    return "\n".join([*lines, "", f"Closer by moves: {closer} of {len(rows)}; moves minus edits: {difference}."])


def rows_of(targets: str) -> list[dict[str, Any]]:
    """Return the figures, one row per target."""
    return tables.read(FIGURES / f"{targets}.csv")


def main() -> None:
    """Measure what is missing and print the tables."""
    for targets in ("outside", "evaluation"):
        known = {row["image"] for row in rows_of(targets)}
        for i, (prompt, file) in enumerate(tasks(targets)):
            if file.name not in known:
                tables.add(FIGURES / f"{targets}.csv", [measure(prompt, file, i)])
        print(f"{targets}\n\n{table(rows_of(targets))}\n")


if __name__ == "__main__":
    main()
