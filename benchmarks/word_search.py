"""Measure how quickly each solver of DPO-Diff finds the best words: `python benchmarks/word_search.py`.

Evaluates every candidate of 20 small spaces, about 600 each, so the true optimum is known. Then each solver searches
them with budgets of 8 to 40 generations; its evaluations are looked up, its gradients are computed. Prints the mean
regret, which is the best loss found minus the lowest loss, how often the optimum is found, and the difference from the
regret of random search, prompt by prompt. The 95% intervals are over prompts, each the mean of some repetitions. The
regrets go to benchmarks/figures/word_search.csv; existing ones are not measured again. Finished parts are kept in
--runs.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from inversion import interval, spread
from prompt_pool import sample_prompts
from torch import Tensor

from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, DPODiff
from lightning_prompts.methods.dpo_diff.semantic_similarity import Similarity
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import SEARCH, draw_noise

SEED, PROMPTS, WORDS = 20_261_122, 20, 5
BUDGETS = (8, 16, 24, 32, 40)
SOLVERS: dict[str, dict[str, Any]] = {
    **{solver: {"solver": solver} for solver in ("random", "gradient", "evolution", "hybrid")},
    "hybrid, 20 at a time": {"solver": "hybrid", "population": 20, "elites": 10},  # as in the paper
}
SETTINGS: dict[str, Any] = {"sampler": SamplerSettings(8), "seeds": 2, "microbatch": 64, "log_images_every_n_steps": 0,
            "positive": ["neighbors"], "negative": ["library"], "similarity": Similarity(-1)}  # fmt: skip

SCHEDULE = "step-2-4"
FIGURES = Path(__file__).parent / "figures" / "word_search.csv"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "word_search.png"
Regrets = dict[tuple[str, int], dict[str, list[float]]]
"""By solver and budget, of each prompt by repetition."""
Table = dict[tuple[str, str], list[float]]


class Small(DPODiff):
    """DPO-Diff on the enumerated spaces, whose losses are looked up."""

    tables: dict[str, Table]
    """By prompt."""

    def space(self, prompt: str) -> Space:
        """Return the first two slots with five words each of the prompt, and of the negative prompt."""
        space = super().space(prompt)
        cut, left = list[Slot](), {True: 2, False: 2}
        for number, slot in enumerate(space.slots):
            positive = number < len(space.positive)
            kept = WORDS if left[positive] and len(slot.words) >= WORDS else 1
            left[positive] -= kept > 1
            cut.append(Slot(slot.name, slot.words[:kept]))
        return space.with_slots(cut)

    def try_candidates(self, wanted: Any, cost: float = 1) -> None:
        """Record the prompts whose losses are looked up."""
        self._asked = [self.batch[row].record.target for row, _ in wanted]
        super().try_candidates(wanted, cost)

    def evaluate(self, texts: Any, noise: Tensor, wanted: Tensor) -> Tensor:
        """Look up the losses in the tables."""
        return torch.tensor([self.tables[asked][pair] for asked, pair in zip(self._asked, texts, strict=True)])


def lines() -> list[tuple[str, int]]:
    """Return the solvers with their budgets, which are multiples of the population."""
    pairs = itertools.product(SOLVERS, BUDGETS)
    return [(solver, budget) for solver, budget in pairs if budget >= SOLVERS[solver].get("population", 0)]


def enumerated(prompt: str, folder: Path) -> Table:
    """Compute the losses by seed of all candidates of a prompt."""
    file = folder / f"{prompt.replace(' ', '_')}.json"
    if not file.exists():
        method = Small(solver="random", **SETTINGS)
        space = method.space(prompt)
        pairs = list(
            dict.fromkeys(
                space.texts(choice) for choice in itertools.product(*(range(len(s.words)) for s in space.slots))
            )
        )
        shape = method.backbone.latent_shape
        noise = draw_noise(0, [prompt], SEARCH, method.seeds, shape, torch.device("cpu"))
        wanted = method.clip.features_of([prompt])
        with torch.no_grad():
            losses = [DPODiff.evaluate(method, pairs[i : i + 32], noise.expand(len(pairs[i : i + 32]),
                                     *noise.shape[1:]),
                                     wanted.expand(len(pairs[i : i + 32]), -1)) for i in range(0, len(pairs),
                                     32)]  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps([[*pair, *loss] for pair, loss in zip(pairs, torch.cat(losses).tolist(), strict=True)])
        )
    return {(prompt, negative): losses for prompt, negative, *losses in json.loads(file.read_text())}


def searched(solver: str, budget: int, seed: int, tables: dict[str, Table], file: Path) -> dict[str, float]:
    """Return the lowest loss that a solver found for each prompt."""
    if not file.exists():
        settings = SOLVERS[solver] | SETTINGS
        if settings["solver"] in ("gradient", "hybrid"):
            settings |= {"schedule": SCHEDULE}
        method = Small(budget=budget, **settings)
        method.tables = tables
        data = Prompts(list(tables), seed)
        with tempfile.TemporaryDirectory() as scratch:
            trainer_settings: dict[str, Any] = {
                **TRAINER,
                "accelerator": "cpu",
                "logger": False,
                "default_root_dir": scratch,
            }
            pl.Trainer(**trainer_settings).fit(method, datamodule=data)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({problem.target: problem.validation_loss for problem in data.folder.load().values()})
        )
    found: dict[str, float] = json.loads(file.read_text())
    return found


def measured(repetitions: int, runs: Path) -> None:
    """Search, and write the regrets."""
    tables = {
        prompt: enumerated(prompt, runs / "tables") for prompt in (one.prompt for one in sample_prompts(SEED, PROMPTS))
    }
    least = {prompt: min(sum(losses) / len(losses) for losses in table.values()) for prompt, table in tables.items()}
    rows: list[list[Any]] = [["solver", "budget", "repetition", "prompt", "candidates", "regret"]]
    for (solver, budget), seed in itertools.product(lines(), range(repetitions)):
        found = searched(solver, budget, seed, tables, runs / "searches" / f"{solver} {budget} {seed}.json")
        for prompt, table in tables.items():
            rows.append([solver, budget, seed, prompt, len(table), f"{max(0, found[prompt] - least[prompt]):.5f}"])
    with FIGURES.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def regrets() -> tuple[Regrets, list[int]]:
    """Read the regrets of the file, and the number of candidates of each prompt."""
    found, sizes = Regrets(), dict[str, int]()
    with FIGURES.open(newline="") as stream:
        for row in csv.DictReader(stream):
            of = found.setdefault((row["solver"], int(row["budget"])), {})
            of.setdefault(row["prompt"], []).append(float(row["regret"]))
            sizes[row["prompt"]] = int(row["candidates"])
    return found, list(sizes.values())


def means(found: dict[str, list[float]]) -> list[float]:
    """Return the mean of each prompt over its repetitions."""
    return [sum(values) / len(values) for values in found.values()]


def tables_of(found: Regrets) -> str:
    """Return tables of mean regrets, of how often the optimum is found, and of differences from random search."""
    heads = f" | {' | '.join(map(str, BUDGETS))} |\n|{'---|' * (1 + len(BUDGETS))}\n"
    regret, optimum, better = (
        [f"| {name}{heads}"] for name in ("mean regret", "optimum found", "regret minus random's")
    )
    for solver in dict.fromkeys(solver for solver, _ in found):
        cells: tuple[list[str], ...] = ([], [], [])
        for budget in BUDGETS:
            of = found.get((solver, budget), {})
            hits = [value == 0 for values in of.values() for value in values]
            pairs = zip(means(of), means(found["random", budget]), strict=bool(of))
            cells[0].append(interval(means(of)) if of else "")
            cells[1].append(f"{sum(hits) / len(hits):.2f}" if of else "")
            cells[2].append(interval([a - b for a, b in pairs]) if of else "")
        for lines, row in zip((regret, optimum, better), cells, strict=True):
            if lines is not better or solver != "random":
                lines.append(f"| {solver} | {' | '.join(row)} |\n")
    return "\n".join("".join(lines) for lines in (regret, optimum, better))


def plot(found: Regrets) -> None:
    """Plot the mean regret over budgets, one line per solver, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for number, solver in enumerate(dict.fromkeys(solver for solver, _ in found)):
        values = [means(found[solver, budget]) for budget in BUDGETS if (solver, budget) in found]
        places = [budget + 0.4 * (number - 2) for budget in BUDGETS if (solver, budget) in found]
        axes.errorbar(
            places, [sum(of) / len(of) for of in values], list(map(spread, values)), capsize=3, marker="o", label=solver
        )
    axes.set(xlabel="budget, generations", ylabel="mean regret", xticks=BUDGETS, ylim=(0, None))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


def main() -> None:
    """Measure what is missing, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/word_search"))
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("I", "N"), help="only enumerate every N-th prompt, starting at I"
    )
    args = parser.parse_args()
    if args.part:
        first, step = args.part
        for one in sample_prompts(SEED, PROMPTS)[first::step]:
            enumerated(one.prompt, args.runs / "tables")
        return
    if not FIGURES.exists():
        measured(args.repetitions, args.runs)
    found, sizes = regrets()
    print(f"Candidates per prompt: {min(sizes)} to {max(sizes)}\n\n{tables_of(found)}")
    plot(found)


if __name__ == "__main__":
    main()
