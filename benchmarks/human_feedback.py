"""Choosing among moves of an encoded prompt, against choosing among edits of its words: `python benchmarks/human_feedback.py`.

A scripted chooser wants a picture that it alone knows, and says what words can say of it. Eight pictures are `outside`: the
object stands on a colour that no caption of the embedded model names, and the prompt says the object. Eight are scenes of the
`evaluation`, and the prompt says the object and the colour of the background, not the rest, which words could say. The chooser
sees five pictures a round, twenty times; it goes to the one that it likes best, or stays where it is if it likes that more. In
one interface the pictures are the candidates of `HumanFeedback`, of the liked one at full and at half strength; in the other they
are drawn from random edits of the prompt, one word added, exchanged or left out, and a choice takes the edit. Prints how like the
wanted picture the last one is by the held-out CLIP. Settings were tried on other pictures.
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
from metric_guidance import judge
from torch import Tensor

from lightning_prompts.data.prompts import Prompts
from lightning_prompts.methods import TRAINER, HumanFeedback
from lightning_prompts.methods.steering.human_feedback import Scripted
from lightning_prompts.runs.record import HumanFeedbackResult

COUNT, CHOICES, STRENGTHS = 8, 20, (0.5, 1.0)
CONFIG = yaml.safe_load(Path("configs/human_feedback.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures" / "human_feedback"


def wanted(targets: str) -> list[tuple[str, Path]]:
    """What the person says, and the picture that they want."""
    words = words_of(targets)
    if targets == "outside":  # every second one is on such a colour
        return [(f"a {of['object']}", TARGETS / targets / name) for name, of in list(words.items())[: 2 * COUNT : 2]]
    said = [(f"a {of['object']} on a {of['background']} background", name) for name, of in words.items()]
    return [(text, TARGETS / targets / name) for text, name in said[:COUNT]]


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


def measure(said: str, file: Path, seed: int) -> dict[str, Any]:
    """Both ways to a picture."""
    chooser = Scripted(str(file), strengths=STRENGTHS)
    method = HumanFeedback(**CONFIG | {"chooser": chooser, "steps": CHOICES})
    data = Prompts(said, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        how: dict[str, Any] = {**TRAINER, "accelerator": "cpu", "logger": False, "default_root_dir": scratch}
        pl.Trainer(**how).fit(method, datamodule=data)
        prompt, by_words = edited(method, chooser, said, seed)
    clip, _ = judge()
    seen = clip.features(torch.stack([chooser.wanted, method.drawn[0], method.drawn[-1], by_words]))
    similar = dict(zip(("before", "by_moves", "by_edits"), (seen[1:] @ seen[0]).tolist(), strict=True))
    (problem,) = data.folder.load().values()
    return {
        "said": said,
        "picture": file.name,
        **similar,
        "moves": len(HumanFeedbackResult.of(problem).moves),
        "edited": prompt,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a picture, and what they say together."""
    head = ("prompt", "image", "before", "by moves", "by word edits")
    found = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    moves, edits = ([row[f"by_{way}"] for row in rows] for way in ("moves", "edits"))
    for row, by_moves, by_edits in zip(rows, moves, edits, strict=True):
        found.append(f"| {row['said']} | {row['picture']} | {row['before']:.3f} | {by_moves:.3f} | {by_edits:.3f} |")
    closer = sum(by_moves > by_edits for by_moves, by_edits in zip(moves, edits, strict=True))
    difference = interval([by_moves - by_edits for by_moves, by_edits in zip(moves, edits, strict=True)])
    return "\n".join([*found, "", f"Closer by moves: {closer} of {len(rows)}; moves minus edits: {difference}."])


def rows_of(targets: str) -> list[dict[str, Any]]:
    """The figures, a row a picture."""
    return tables.read(FIGURES / f"{targets}.csv")


def main() -> None:
    """Measures what is missing and prints the tables."""
    for targets in ("outside", "evaluation"):
        known = {row["picture"] for row in rows_of(targets)}
        for i, (said, file) in enumerate(wanted(targets)):
            if file.name not in known:
                tables.add(FIGURES / f"{targets}.csv", [measure(said, file, i)])
        print(f"{targets}\n\n{table(rows_of(targets))}\n")


if __name__ == "__main__":
    main()
