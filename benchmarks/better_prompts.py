"""What DPO-Diff does for prompts as persons write them: `python benchmarks/better_prompts.py improve`, then `... attack`.

Of 400 prompts the 100 with the highest loss are improved, or the 100 with the lowest attacked, as in the paper. Each is searched on
three seeds and judged on ten others, by what takes no part in the search: the held-out CLIP's similarity of the pictures to the
person's prompt, and whether it recognises the object and the background, among all of the embedded model's, in a picture. An
object is recognised in a prompt if it is in at least half of its pictures. Prints a line a space and solver, with 95% intervals.
The figures of each prompt go to benchmarks/figures/, a file a line; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from inversion import interval, share
from prompt_pool import Written, written
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.data.addresses import FRESH, SEARCH, draw_noise
from lightning_prompts.emoji import world
from lightning_prompts.main import main as lightning_prompts
from lightning_prompts.methods import DPODiff
from lightning_prompts.objectives.clip import ClipSimilarity

SEED, POOL, CONFIG = 20_261_123, 400, "configs/dpo_diff.yaml"
FIGURES = Path(__file__).parent / "figures"
SPACES: dict[str, dict[str, tuple[list[str], list[str]]]] = {  # the sources of the prompt's words, and of the negative prompt's
    "improve": {
        "library": ([], ["library"]), "neighbours": (["neighbours"], []), "WordNet": (["synonyms"], ["antonyms"]),
        "neighbours and library": (["neighbours"], ["library"]),
    },
    "attack": {"neighbours": (["neighbours"], []), "WordNet": (["synonyms"], [])},
}  # fmt: skip
FIRST = {"improve": "library", "attack": "neighbours"}  # the space that all solvers search
SOLVERS = ("random", "gradient", "evolution", "hybrid")


@cache
def method() -> Any:
    """What draws, without a search."""
    return DPODiff(sampling_steps=10, schedule="fix-0", microbatch=64)


@cache
def judge() -> tuple[ClipSimilarity, Tensor, Tensor]:
    """The held-out CLIP, and its features (O, E) of all objects and (C, E) of all backgrounds."""
    clip = ClipSimilarity(str(EMOJI.parent / "scorer"))
    names = ([f"a {name}" for name in world.OBJECTS], [f"a {name} background" for name in world.COLORS])
    things, colors = (clip.features_of(texts) for texts in names)
    return clip, things, colors


@torch.no_grad()
def chosen(task: str, count: int, folder: Path) -> list[Written]:
    """The prompts of a task, by their loss on two seeds."""
    prompts, file = written(SEED, POOL), folder / "losses.json"
    if not file.exists():
        texts = [one.prompt for one in prompts]
        noise = draw_noise(0, texts, SEARCH, 2, method().backbone.latent_shape, torch.device("cpu"))
        wanted = method().clip.features_of(texts)
        losses = method().losses([(text, "") for text in texts], noise, wanted).mean(1)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(losses.tolist()))
    order = sorted(zip(json.loads(file.read_text()), range(POOL), strict=True), reverse=task == "improve")
    return [prompts[i] for _, i in order[:count]]


@torch.no_grad()
def recognised(one: Written, problem: dict[str, Any]) -> list[float]:
    """Shares of ten fresh pictures with the object before and after, and with the background before and after."""
    clip, things, colors = judge()
    noise = draw_noise(0, [problem["key"]], FRESH, 10, method().backbone.latent_shape, torch.device("cpu"))[0]
    found = []
    for prompt, negative in ((one.prompt, ""), (problem["prompt"], problem["negative_prompt"])):
        features = clip.features(method().draw([prompt] * 10, noise, negative))
        thing, color = (features @ things.T).argmax(1), (features @ colors.T).argmax(1)
        found.append([float((thing == list(world.OBJECTS).index(one.thing)).float().mean()),
                      float((color == list(world.COLORS).index(one.color)).float().mean())])  # fmt: skip
    (thing_before, color_before), (thing_after, color_after) = found
    return [thing_before, thing_after, color_before, color_after]


def measure(task: str, space: str, solver: str, count: int, folder: Path) -> list[dict[str, str]]:
    """Searches and judges: a row a prompt."""
    prompts, run = chosen(task, count, folder), folder / f"{task} {space} {solver} {count}"
    if not (run / "result.json").exists():
        positive, negative = SPACES[task][space]
        given = [
            "--data.prompts",
            json.dumps([one.prompt for one in prompts]),
            "--run",
            str(run),
            "--ckpt_path",
            "last",
        ]
        how = [f"--model.positive={json.dumps(positive)}", f"--model.negative={json.dumps(negative)}"]
        lightning_prompts(["fit", "--config", CONFIG, *given, *how, "--model.task", task, "--model.solver", solver])
    by_prompt = {problem["target"]: problem for problem in json.loads((run / "result.json").read_text())["problems"]}
    rows = []
    for one in prompts:
        problem = by_prompt[one.prompt]
        row = {"prompt": one.prompt, "found": problem["prompt"] or "", "negative": problem.get("negative_prompt", "")}
        if problem["prompt"]:
            before, after = (sum(problem[f"heldout_{when}"]) / 10 for when in ("before", "after"))
            own = [sum(problem[name]) / len(problem[name]) for name in
                   ("loss_before", "loss_after", "fresh_loss_before", "fresh_loss_after")]  # fmt: skip
            numbers = [before, after, *recognised(one, problem), *own, problem["similarity"]]
            row |= dict(zip(NUMBERS, (f"{number:.4f}" for number in numbers), strict=True))
        rows.append(row)
    return rows


NUMBERS = [
    *("heldout_before", "heldout_after", "object_before", "object_after", "background_before", "background_after"),
    *("loss_before", "loss_after", "fresh_loss_before", "fresh_loss_after", "similarity"),
]


def line(task: str, rows: list[dict[str, str]]) -> str:
    """Cells of a line; what has no feasible words counts as not won and not broken."""
    found = [row for row in rows if row.get("heldout_before")]
    if task == "improve":
        wins = [
            bool(row.get("heldout_before")) and float(row["heldout_after"]) > float(row["heldout_before"])
            for row in rows
        ]
        gains = [[float(row[f"{name}_after"]) - float(row[f"{name}_before"]) for row in found]
                 for name in ("heldout", "object", "background")]  # fmt: skip
        return " | ".join([share(wins), *map(interval, gains)])
    known = [row for row in found if float(row["object_before"]) >= 0.5]
    broken = [float(row["object_after"]) < 0.5 for row in known]
    drops = interval([float(row["heldout_after"]) - float(row["heldout_before"]) for row in found])
    likeness = min(float(row["similarity"]) for row in found)
    return " | ".join([str(len(known)), share(broken), drops, f"{likeness:.3f}", str(len(rows) - len(found))])


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["improve", "attack"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", nargs=2, metavar=("SPACE", "SOLVER"), help="measure one line")
    parser.add_argument("--runs", type=Path, default=Path("runs/better_prompts"))
    args = parser.parse_args()
    lines = [(space, "hybrid") for space in SPACES[args.task]]
    lines[1:1] = [(FIRST[args.task], solver) for solver in SOLVERS if solver != "hybrid"]
    heads = {
        "improve": ["wins", "held-out similarity", "object", "background"],
        "attack": ["recognised before", "broken", "held-out similarity", "least likeness", "without words"],
    }[args.task]
    print(f"| space | solver | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for space, solver in lines:
        if args.only and list(args.only) != [space, solver]:
            continue
        file = FIGURES / f"{args.task}_{args.count}" / f"{space}_{solver}.csv".replace(" ", "_").lower()
        if not file.exists():
            rows = measure(args.task, space, solver, args.count, args.runs)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["prompt", "found", "negative", *NUMBERS], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        with file.open(newline="") as stream:
            print(f"| {space} | {solver} | {line(args.task, list(csv.DictReader(stream)))} |", flush=True)


if __name__ == "__main__":
    main()
