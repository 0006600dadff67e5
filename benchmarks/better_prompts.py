"""Measure DPO-Diff on prompts as users write them: `python benchmarks/better_prompts.py improve`, then `... attack`.

Of 400 prompts, improves the 100 with the highest loss, or attacks the 100 with the lowest loss, as in the paper. Each
prompt is searched on three seeds and scored on ten others by the held-out CLIP, which the search does not use: how
similar the images are to the user's prompt and to the plain caption that the embedded model was trained on, and whether
this CLIP recognizes the object and the background among all of the embedded model's. An object counts as recognized in
a prompt if it is recognized in at least half of the prompt's images. Prints one line per space and solver, with 95%
intervals. The figures of each prompt go to benchmarks/figures/, one file per line of the table; existing ones are not
measured again. The searches sample in bfloat16, as with `--trainer.precision bf16-mixed`, which is 1.5 times as fast on
a CPU; the scored images are generated in float32.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from inversion import interval, share
from prompt_pool import PoolPrompt, sample_prompts
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.emoji import world
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, DPODiff
from lightning_prompts.methods.dpo_diff.semantic_similarity import Similarity
from lightning_prompts.objectives.clip import ClipSimilarity
from lightning_prompts.runs.record import DPODiffResult
from lightning_prompts.sampling.seeding import FINAL, SEARCH, draw_noise

SEED, POOL, BATCH, FRESH_SEEDS = 20_261_123, 400, 20, 10
SETTINGS: dict[str, Any] = yaml.safe_load(Path("configs/dpo_diff.yaml").read_text())["model"]["init_args"]
FIGURES = Path(__file__).parent / "figures"
SPACES: dict[str, dict[str, dict[str, Any]]] = {  # sources of words for the prompt and for the negative prompt
    "improve": {
        "library": {"positive": [], "negative": ["library"]},
        "neighbors": {"positive": ["neighbors"], "negative": []},
        "WordNet": {"positive": ["synonyms"], "negative": ["antonyms"]},
        "neighbors and library": {"positive": ["neighbors"], "negative": ["library"]},
        "neighbors, any meaning": {"positive": ["neighbors"], "negative": [], "similarity": Similarity(-1)},
    },
    "attack": {
        "neighbors": {"positive": ["neighbors"], "negative": []},
        "WordNet": {"positive": ["synonyms"], "negative": []},
        "both": {"positive": ["neighbors", "synonyms"], "negative": []},
        "all words": {"positive": ["neighbors"], "negative": [], "neighbors": 1000},
    },
}
HEADS = {
    "improve": ("wins", "wins, plain caption", "similarity", "to the plain caption", "object", "background"),
    "attack": ("recognized", "object broken", "background broken", "one of them", "similarity",
               "to the plain caption", "least likeness", "without words"),
}  # fmt: skip
SOLVERS = ("random", "gradient", "evolution", "hybrid")


@cache
def method() -> Any:
    """Return a method that generates images without a search."""
    return DPODiff(**SETTINGS)


@cache
def heldout_clip() -> tuple[ClipSimilarity, Tensor, Tensor]:
    """Return the held-out CLIP, and its features (O, E) of all objects and (C, E) of all backgrounds."""
    clip = ClipSimilarity(str(EMOJI.parent / "scorer"))
    names = ([f"a {name}" for name in world.OBJECTS], [f"a {name} background" for name in world.COLORS])
    things, colors = (clip.features_of(texts) for texts in names)
    return clip, things, colors


@torch.no_grad()
def losses_of(prompts: list[PoolPrompt]) -> list[float]:
    """Compute the losses of unchanged prompts on two seeds."""
    texts = [one.prompt for one in prompts]
    noise = draw_noise(0, texts, SEARCH, 2, method().backbone.latent_shape, torch.device("cpu"))
    losses: Tensor = method().evaluate([(text, "") for text in texts], noise, method().clip.features_of(texts)).mean(1)
    return losses.tolist()


def chosen(task: str, count: int, folder: Path) -> list[PoolPrompt]:
    """Return the prompts of a task, selected by their loss."""
    prompts, file = sample_prompts(SEED, POOL), folder / "losses.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(losses_of(prompts)))
    order = sorted(zip(json.loads(file.read_text()), range(POOL), strict=True), reverse=task == "improve")
    return [prompts[i] for _, i in order[:count]]


@cache  # all lines share the users' prompts
@torch.no_grad()
def scored(one: PoolPrompt, key: str, text: str, negative: str) -> dict[str, float]:
    """Score images of a prompt on fresh seeds; return the mean scores."""
    clip, things, colors = heldout_clip()
    noise = draw_noise(0, [key], FINAL, FRESH_SEEDS, method().backbone.latent_shape, torch.device("cpu"))[0]
    prompt, caption = clip.features_of([one.prompt, f"a {one.thing} on a {one.color} background"])
    images = method().generate([text] * FRESH_SEEDS, noise, negative)
    features, wanted = clip.features(images), method().clip.features_of([one.prompt])
    return {
        "heldout": float((features @ prompt).mean()),
        "plain": float((features @ caption).mean()),
        "object": share_of(features, things, list(world.OBJECTS).index(one.thing)),
        "background": share_of(features, colors, list(world.COLORS).index(one.color)),
        "fresh_loss": float(method().distance(method().clip.features(images), wanted).mean()),
    }


def share_of(features: Tensor, names: Tensor, right: int) -> float:
    """Return the share of images (N, E) whose nearest of some names (M, E) is the right one."""
    return float(((features @ names.T).argmax(1) == right).float().mean())


def measure(task: str, space: str, solver: str, prompts: list[PoolPrompt], file: Path) -> list[dict[str, Any]]:
    """Search and score; return one row per prompt."""
    if not file.exists():
        search = DPODiff(**SETTINGS | SPACES[task][space] | {"task": task, "solver": solver})
        data = Prompts([one.prompt for one in prompts])
        with tempfile.TemporaryDirectory() as scratch:
            trainer_settings: dict[str, Any] = {
                **TRAINER,
                "accelerator": "cpu",
                "precision": "bf16-mixed",
                "logger": False,
                "default_root_dir": scratch,
            }
            pl.Trainer(**trainer_settings).fit(search, datamodule=data)
        rows = []
        for one in prompts:
            (problem,) = (problem for problem in data.folder.load().values() if problem.target == one.prompt)
            row: dict[str, Any] = {"prompt": one.prompt, "found": problem.prompt, "negative": problem.negative_prompt}
            if problem.prompt:
                result = DPODiffResult.of(problem)
                for when, text, negative, losses in (
                    ("before", one.prompt, "", result.loss_before or []),
                    ("after", problem.prompt, problem.negative_prompt or "", result.loss_after or []),
                ):
                    seen = {"loss": sum(losses) / len(losses), **scored(one, problem.key, text, negative)}
                    row |= {f"{name}_{when}": value for name, value in seen.items()}
                row["similarity"] = float(search.similarity(one.prompt, [problem.prompt]))
            rows.append(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


COLUMNS = [
    *("prompt", "found", "negative"),
    *(f"{name}_{when}" for name in ("heldout", "plain", "object", "background", "loss", "fresh_loss")
      for when in ("before", "after")),
    "similarity",
]  # fmt: skip


def line(task: str, rows: list[dict[str, str]]) -> str:
    """Return the cells of a line; prompts without feasible words count as not won and not broken."""
    found = [row for row in rows if row["found"]]
    gains = {name: [float(row[f"{name}_after"]) - float(row[f"{name}_before"]) for row in found]
             for name in ("heldout", "plain", "object", "background")}  # fmt: skip
    if task == "improve":
        wins = [
            share([gain > 0 for gain in gains[name]] + [False] * (len(rows) - len(found)))
            for name in ("heldout", "plain")
        ]
        return " | ".join([*wins, *map(interval, gains.values())])
    known = {name: [row for row in found if float(row[f"{name}_before"]) >= 0.5] for name in ("object", "background")}
    broken = [share([float(row[f"{name}_after"]) < 0.5 for row in some]) for name, some in known.items()]
    both = [row for row in known["object"] if row in known["background"]]
    broken.append(share([min(float(row["object_after"]), float(row["background_after"])) < 0.5 for row in both]))
    likeness = min(float(row["similarity"]) for row in found)
    drops = [interval(gains[name]) for name in ("heldout", "plain")]
    return " | ".join(
        [
            f"{len(known['object'])}, {len(known['background'])}",
            *broken,
            *drops,
            f"{likeness:.3f}",
            str(len(rows) - len(found)),
        ]
    )


def lines(task: str) -> list[tuple[str, str]]:
    """Return the spaces and solvers of the table; only the first space has all solvers."""
    spaces = list(SPACES[task])
    return [*((spaces[0], solver) for solver in SOLVERS), *((space, "hybrid") for space in spaces[1:])]


def file_of(task: str, count: int, space: str, solver: str) -> Path:
    """Return the file with the figures of a line."""
    return FIGURES / f"{task}_{count}" / (re.sub(r"\W+", "_", f"{space} {solver}").lower() + ".csv")


def table(task: str, count: int) -> str:
    """Return the table of the measured lines."""
    rows = [f"| space | solver | {' | '.join(HEADS[task])} |", "|---" * (2 + len(HEADS[task])) + "|"]
    for space, solver in lines(task):
        if (file := file_of(task, count, space, solver)).exists():
            with file.open(newline="") as stream:
                rows.append(f"| {space} | {solver} | {line(task, list(csv.DictReader(stream)))} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["improve", "attack"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", nargs=2, metavar=("SPACE", "SOLVER"), help="measure one line")
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("I", "N"), help="only search every N-th part, starting at I"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/better_prompts"))
    args = parser.parse_args()
    prompts = chosen(args.task, args.count, args.runs)
    parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    for space, solver in [tuple(args.only)] if args.only else lines(args.task):
        file, rows = file_of(args.task, args.count, space, solver), []
        if file.exists():
            continue
        first, step = args.part or (0, 1)
        for i in range(first, len(parts), step):
            name = f"{args.task} {space} {solver} {args.count}"
            rows += measure(args.task, space, solver, parts[i], args.runs / name / f"{BATCH * i}.json")
        if not args.part:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                writer.writeheader()
                for row in rows:
                    writer.writerow({name: f"{v:.4f}" if isinstance(v, float) else v for name, v in row.items()})
    print(table(args.task, args.count))


if __name__ == "__main__":
    main()
