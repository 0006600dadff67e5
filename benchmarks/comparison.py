"""Compare all inversion methods at three budgets: `python benchmarks/comparison.py evaluation`, then `... outside`.

Each method searches once, with the largest budget; the results for smaller budgets are read from its history. Textual
inversion, whose history has no embeddings, searches once per budget. A budget is a number of denoiser samples per
image, including scoring; a backward pass counts as one sample. Then `test` generates four images from each prompt and
compares them with the target by the held-out CLIP. The figures of each target go to benchmarks/figures/, one file per
method, from which the table, the plot and the differences between methods, target by target, are computed. Methods with
a file and searches in --runs are not measured again; delete both to repeat them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml
from inversion import fit, has, interval, rows_of, share, spread, words_of

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import round_trip
from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem

BUDGETS = (342, 684, 1368)
CONFIGS = {
    "random tokens": "random_tokens", "CLIP words": "clip_words", "PEZ, denoising loss": "pez",
    "PEZ, CLIP loss": "pez_clip",
    "PH2P, Adam with restarts": "ph2p", "PH2P, L-BFGS": "ph2p_lbfgs", "GCG": "gcg", "the default": "invert",
    "textual inversion": "textual_inversion",
}  # fmt: skip
FEW = ("CLIP words", "PEZ, CLIP loss")  # which need samples only for scoring
CAPTION, SOFT = "true caption", "textual inversion"
PAIRS = [
    ("PH2P, Adam with restarts", "PH2P, L-BFGS"),
    ("PH2P, Adam with restarts", "PEZ, denoising loss"),
    ("PH2P, Adam with restarts", "PEZ, CLIP loss"),
    *(("the default", other) for other in (*CONFIGS, CAPTION) if other != "the default"),
]
FIGURES, IMAGES = Path(__file__).parent / "figures", Path(__file__).parents[1] / "docs" / "images"
COLUMNS = [
    "budget",
    "target",
    "prompt",
    "samples",
    "similarity",
    "diversity",
    "dictionary_words",
    "special_characters",
    "survives",
]

Row = dict[str, str]


@cache
def tokenizer() -> Any:
    """Return the tokenizer of the embedded model."""
    return load_backbone("emoji").text_encoders[0].tokenizer


def ids_of(text: str) -> list[int]:
    """Tokenize a prompt with the embedded model's tokenizer."""
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def with_prompts(source: Path, run: Path, prompts: dict[str, tuple[str, int]]) -> None:
    """Create a run with other prompts and costs for the same targets, by name, and score it."""
    if (run / "result.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    for problem in RunFolder(source).load().values():
        text, spent = prompts[problem.target]
        made = Problem(problem.key, problem.target, problem.paths, problem.caption, problem.index, "done", None, text,
                       ids_of(text),
                       unet_samples=spent)  # fmt: skip
        RunFolder(run).save(made)
    shutil.copy(source / "config.yaml", run)
    lightning_prompts(["test", "--run", str(run)])


def best_by(problem: Problem, budget: int) -> tuple[str, int]:
    """Return the best prompt that a search found within a budget, and the samples it had spent by then."""
    found = [entry for entry in problem.history if entry["unet_samples"] <= budget] or problem.history[:1]
    return found[-1]["prompt"], min(problem.unet_samples, budget)


def measure(method: str, targets: str, runs: Path) -> list[Row]:
    """Search with a method and score its result at each budget; return one row per budget and target."""
    whole = runs / f"{method} {BUDGETS[-1]}"
    made, rows = {BUDGETS[-1]: whole}, rows_of(targets)
    if method == CAPTION:
        source = runs / f"CLIP words {BUDGETS[-1]}"
        fit("configs/clip_words.yaml", rows, source)
        captions = {Path(row["file"]).name: (row["caption"], 0) for row in rows}
        with_prompts(source, whole, captions)
    else:
        fit(f"configs/{CONFIGS[method]}.yaml", rows, whole)
        for budget in BUDGETS[:-1] if method not in FEW else ():
            made[budget] = runs / f"{method} {budget}"
            if method == SOFT:
                # Two fewer, so that there are samples left to score the first and the last prompt.
                steps = 300 * budget // BUDGETS[-1] - 2
                fit(f"configs/{CONFIGS[method]}.yaml", rows, made[budget], [f"--model.steps={steps}"])
            else:
                found = RunFolder(whole).load().values()
                with_prompts(whole, made[budget], {problem.target: best_by(problem, budget) for problem in found})
    return [figures(budget, problem, method == SOFT) for budget in sorted(made)
            for problem in json.loads((made[budget] / "result.json").read_text())["problems"]]  # fmt: skip


def figures(budget: int, problem: dict[str, Any], soft: bool) -> Row:
    """Return a row of a file in benchmarks/figures/."""
    scores = [f"{problem[name]:.4f}" for name in ("heldout_clip_similarity", "diversity")]
    if soft:
        text = ["", "", ""]
    else:
        text = [f"{problem[name]:.4f}" for name in ("dictionary_words", "special_characters")]
        text.append(str(int(round_trip(tokenizer(), torch.tensor([problem["token_ids"]]))[1])))
    cells = [str(budget), problem["target"], problem["prompt"], str(problem["unet_samples"]), *scores, *text]
    return dict(zip(COLUMNS, cells, strict=True))


def means(rows: list[Row], words: dict[str, dict[str, str]], kinds: list[str]) -> list[str]:
    """Return the cells of a line of the table."""
    cells = [
        f"{sum(float(row['samples']) for row in rows) / len(rows):.0f}",
        interval([float(row["similarity"]) for row in rows]),
    ]
    soft = not rows[0]["survives"]
    for kind in kinds:
        named = [has(row["prompt"], words[row["target"]][kind]) for row in rows if kind in words[row["target"]]]
        cells.append("-" if soft else share(named))
    cells.append(interval([float(row["diversity"]) for row in rows]))
    if soft:
        return [*cells, *"---"]
    cells += [interval([float(row[name]) for row in rows]) for name in ("dictionary_words", "special_characters")]
    return [*cells, str(sum(row["survives"] == "0" for row in rows))]


def plot(results: dict[tuple[str, int], list[Row]], path: Path) -> None:
    """Plot the held-out similarity over samples, one line per method, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for method in dict.fromkeys(method for method, _ in results):
        budgets = [budget for name, budget in results if name == method]
        values = [[float(row["similarity"]) for row in results[method, budget]] for budget in budgets]
        points = [sum(of) / len(of) for of in values]
        if len(budgets) == 1:
            style = {CAPTION: ("--", "black"), FEW[1]: (":", "gray")}.get(method, ("--", "gray"))
            axes.axhline(points[0], linestyle=style[0], color=style[1], label=method)
        else:
            axes.errorbar(budgets, points, [spread(of) for of in values], capsize=3, marker="o", label=method)
    axes.set(xlabel="denoiser samples per image", ylabel="held-out similarity of regenerations", xticks=BUDGETS)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def measured(targets: str) -> dict[tuple[str, int], list[Row]]:
    """Read the files in benchmarks/figures/: the rows of each method and budget."""
    results: dict[tuple[str, int], list[Row]] = {}
    for method in [*CONFIGS, CAPTION]:
        if (file := file_of(method, targets)).exists():
            with file.open(newline="") as stream:
                for row in csv.DictReader(stream):
                    results.setdefault((method, int(row["budget"])), []).append(row)
    return results


def file_of(method: str, targets: str) -> Path:
    """Return the file with the figures of a method."""
    return FIGURES / targets / f"{re.sub(r'[^a-z0-9]+', '_', method.lower())}.csv"


def table(results: dict[tuple[str, int], list[Row]], words: dict[str, dict[str, str]]) -> str:
    """Return a table with one line per method and budget."""
    kinds = [kind for kind in ("object", "background", "second") if any(kind in wanted for wanted in words.values())]
    head = ["method", "timesteps", "samples", "held-out similarity", *kinds, "diversity", "dictionary words",
            "special characters",
            "round-trip failures"]  # fmt: skip
    lines = [
        f"| {method} | {timesteps_of(method)} | {' | '.join(means(rows, words, kinds))} |"
        for (method, _), rows in results.items()
    ]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def timesteps_of(method: str) -> str:
    """Return the range of timesteps in a method's config, for the search and for scoring."""
    if method == CAPTION:
        return "-"
    data = yaml.safe_load((Path("configs") / f"{CONFIGS[method]}.yaml").read_text())["data"]
    low, high = data.get("init_args", {}).get("timestep_range", (500, 1000))
    return f"{low} to {high}"


def differences(results: dict[tuple[str, int], list[Row]]) -> str:
    """Return a table of differences between methods with the largest budget."""
    lines = ["| held-out similarity, target by target | difference |", "|---|---|"]
    for pair in PAIRS:
        if all((name, BUDGETS[-1]) in results for name in pair):
            one, other = (
                {row["target"]: float(row["similarity"]) for row in results[name, BUDGETS[-1]]} for name in pair
            )
            lines.append(f"| {' - '.join(pair)} | {interval([one[target] - other[target] for target in one])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", choices=["evaluation", "outside", "development"])
    parser.add_argument(
        "--method", choices=[*CONFIGS, CAPTION], action="append", help="measure only this method; may be repeated"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder of the searches")
    args = parser.parse_args()
    for method in args.method or [*CONFIGS, CAPTION]:
        if not (file := file_of(method, args.targets)).exists():
            rows = measure(method, args.targets, args.runs / args.targets)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    results = measured(args.targets)
    print(table(results, words_of(args.targets)), differences(results), sep="\n\n")
    if {method for method, _ in results} == {*CONFIGS, CAPTION}:
        plot(results, IMAGES / f"comparison_{args.targets}.png")


if __name__ == "__main__":
    main()
