"""Every inverter at three budgets: `python benchmarks/comparison.py evaluation`, then `... outside`.

Each method searches once, with the largest budget, and what it had found by the smaller ones is read from its history; textual
inversion, whose history has no embeddings, searches once a budget. A budget is a number of denoiser samples an image, scoring
included, a backward counted as one. Then `test` draws four pictures from each prompt and compares them with the target by the
held-out CLIP. What is finished in --runs is not repeated, so `--method` can do one method at a time; the table and the plot show
what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from inversion import fit, has, interval, rows_of, words_of

from lightning_prompts.backbones import load_backbone
from lightning_prompts.main import main as lightning_prompts
from lightning_prompts.problems import Problem, RunFolder
from lightning_prompts.vocabulary import round_trip

BUDGETS = (342, 684, 1368)
CONFIGS = {
    "random tokens": "random_tokens", "CLIP words": "clip_words", "PEZ": "pez", "PH2P": "ph2p", "PH2P, L-BFGS": "ph2p_lbfgs",
    "GCG": "gcg", "the default": "invert", "textual inversion": "textual_inversion",
}  # fmt: skip
CAPTION, SOFT = "true caption", "textual inversion"
IMAGES = Path(__file__).parents[1] / "docs" / "images"


@cache
def tokenizer() -> Any:
    """The embedded model's."""
    return load_backbone("emoji").towers[0].tokenizer


def ids_of(text: str) -> list[int]:
    """Its tokens."""
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def with_prompts(source: Path, run: Path, prompts: dict[str, tuple[str, int]]) -> None:
    """Makes a run of other prompts, and what they cost, for the same targets by name, and scores it."""
    if (run / "result.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    for problem in RunFolder(source).load().values():
        text, spent = prompts[problem.target]
        share = min(spent / max(problem.unet_samples, 1), 1)
        made = Problem(problem.key, problem.target, problem.paths, problem.caption, problem.index, "done", None, text, ids_of(text),
                       unet_samples=spent, seconds=problem.seconds * share)  # fmt: skip
        RunFolder(run).save(made)
    shutil.copy(source / "config.yaml", run)
    lightning_prompts(["test", "--run", str(run)])


def best_by(problem: Problem, budget: int) -> tuple[str, int]:
    """The best prompt that a search had found within a budget, and the samples it had spent by then."""
    found = [entry for entry in problem.history if entry["unet_samples"] <= budget] or problem.history[:1]
    return found[-1]["prompt"], min(problem.unet_samples, budget)


def measure(method: str, targets: str, count: int, runs: Path) -> None:
    """Searches with a method and scores what it found at each budget."""
    whole = runs / f"{method} {BUDGETS[-1]}"
    if method == CAPTION:
        captions = {Path(row["file"]).name: (row["caption"], 0) for row in rows_of(targets, count)}
        with_prompts(runs / f"CLIP words {BUDGETS[-1]}", whole, captions)
        return
    config = f"configs/{CONFIGS[method]}.yaml"
    fit(config, targets, count, whole)
    for budget in BUDGETS[:-1]:
        run = runs / f"{method} {budget}"
        if method == SOFT:
            fit(config, targets, count, run, [f"--data.steps={300 * budget // BUDGETS[-1]}"])
        elif method != "CLIP words":  # which spends next to none
            found = RunFolder(whole).load().values()
            with_prompts(whole, run, {problem.target: best_by(problem, budget) for problem in found})


def row(run: Path, words: dict[str, dict[str, str]], soft: bool) -> list[str]:
    """A line of the table."""
    problems = json.loads((run / "result.json").read_text())["problems"]
    cells = [
        f"{sum(p['unet_samples'] for p in problems) / len(problems):.0f}",
        interval([p["heldout_clip_similarity"] for p in problems]),
    ]
    for kind in ("object", "background", "second"):
        pairs = [(str(p["prompt"]), words[p["target"]].get(kind)) for p in problems]
        named = [float(has(prompt, word)) for prompt, word in pairs if word]
        if any(kind in wanted for wanted in words.values()):
            cells.append("-" if soft else interval(named))
    cells.append(interval([p["diversity"] for p in problems]))
    if soft:
        cells += ["-"] * 3
    else:
        cells += [
            f"{sum(p[name] for p in problems) / len(problems):.3f}"
            for name in ("dictionary_words", "special_characters")
        ]
        import torch

        failures = [not bool(round_trip(tokenizer(), torch.tensor([p["token_ids"]]))[1]) for p in problems]
        cells.append(str(sum(failures)))
    return [*cells, f"{sum(p['seconds'] for p in problems) / len(problems):.1f}"]


def plot(results: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Held-out similarity over samples, a line a method, with 95% intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    for method, points in results.items():
        means = [sum(values) / len(values) for values in points.values()]
        spreads = [float(interval(values).split("±")[1]) for values in points.values()]
        if len(points) == 1:
            axes.axhline(means[0], linestyle="--", color="black" if method == CAPTION else "gray", label=method)
        else:
            axes.errorbar(list(points), means, spreads, capsize=3, marker="o", label=method)
    axes.set(xlabel="denoiser samples an image", ylabel="held-out similarity of regenerations")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Searches what is missing, prints one table and draws one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", choices=["evaluation", "outside", "development"])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--method", choices=[*CONFIGS, CAPTION], action="append")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    args = parser.parse_args()
    runs, words = args.runs / args.targets, words_of(args.targets)
    for method in args.method or [*CONFIGS, CAPTION]:
        measure(method, args.targets, args.count, runs)
    kinds = [kind for kind in ("object", "background", "second") if any(kind in wanted for wanted in words.values())]
    head = ["method", "samples", "held-out similarity", *kinds, "diversity", "dictionary words", "special characters",
            "round-trip failures", "seconds"]  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    results: dict[str, dict[int, list[float]]] = {}
    for method in [*CONFIGS, CAPTION]:
        for budget in BUDGETS:
            run = runs / f"{method} {budget}"
            if (run / "result.json").exists():
                print(f"| {method} | {' | '.join(row(run, words, method == SOFT))} |")
                problems = json.loads((run / "result.json").read_text())["problems"]
                results.setdefault(method, {})[budget] = [p["heldout_clip_similarity"] for p in problems]
    plot(results, IMAGES / f"comparison_{args.targets}.png")


if __name__ == "__main__":
    main()
