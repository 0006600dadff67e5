"""How soon each solver of DPO-Diff finds the best words: `python benchmarks/word_search.py`.

Every candidate of 20 small spaces, of some 600 each, is drawn and judged once, so that the true optimum is known. Then each solver
searches them under budgets of 8 to 40 generations, its evaluations looked up, its gradients real. Prints the mean regret, which is
by how much the best loss that was found is above the least there is, how often it is the least, and how much lower the hybrid's is
than that of random search, prompt by prompt, with 95% intervals over prompts, each the mean of some repetitions. Finished parts
are kept in --runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from inversion import interval
from prompt_pool import written
from torch import Tensor

from lightning_prompts.cli import TRAINER
from lightning_prompts.data.addresses import SEARCH, draw_noise
from lightning_prompts.data.prompts import Prompts
from lightning_prompts.methods import DPODiff
from lightning_prompts.methods.dpo_diff import Solver
from lightning_prompts.substitutes import Slot, Space

SEED, PROMPTS, WORDS = 20_261_122, 20, 5
BUDGETS = (8, 16, 24, 32, 40)
SOLVERS: tuple[Solver, ...] = ("random", "gradient", "evolution", "hybrid")
SETTINGS: dict[str, Any] = {"sampling_steps": 8, "schedule": "step-2-4", "seeds": 2, "microbatch": 64, "sample_every": 0,
            "positive": ["neighbours"], "negative": ["library"]}  # fmt: skip

Table = dict[tuple[str, str], list[float]]


class Small(DPODiff):
    """DPO-Diff on the enumerated spaces, whose losses are looked up."""

    tables: dict[str, Table]
    """By prompt."""

    def space(self, prompt: str) -> Space:
        """Two slots of the prompt and two of the negative prompt, of five words each; the first ones that have as many."""
        space = super().space(prompt)
        cut, left = list[Slot](), {True: 2, False: 2}
        for number, slot in enumerate(space.slots):
            positive = number < len(space.positive)
            kept = WORDS if left[positive] and len(slot.words) >= WORDS else 1
            left[positive] -= kept > 1
            cut.append(Slot(slot.name, slot.words[:kept]))
        return space.with_slots(cut)

    def evaluate(self, wanted: Any, cost: float = 1) -> None:
        """Notes which prompts the losses are looked up for."""
        self._asked = [self.problems[row].target for row, _ in wanted]
        super().evaluate(wanted, cost)

    def losses(self, texts: Any, noise: Tensor, wanted: Tensor) -> Tensor:
        """From the tables."""
        return torch.tensor([self.tables[asked][pair] for asked, pair in zip(self._asked, texts, strict=True)])


def enumerated(prompt: str, folder: Path) -> Table:
    """The losses by seed of all candidates of a prompt."""
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
            losses = [DPODiff.losses(method, pairs[i : i + 32], noise.expand(len(pairs[i : i + 32]), *noise.shape[1:]),
                                     wanted.expand(len(pairs[i : i + 32]), -1)) for i in range(0, len(pairs), 32)]  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps([[*pair, *loss] for pair, loss in zip(pairs, torch.cat(losses).tolist(), strict=True)])
        )
    return {(prompt, negative): losses for prompt, negative, *losses in json.loads(file.read_text())}


def searched(solver: Solver, budget: int, seed: int, tables: dict[str, Table], file: Path) -> dict[str, float]:
    """The least loss that a solver has found, a prompt."""
    if not file.exists():
        method = Small(solver=solver, budget=budget, **SETTINGS)
        method.tables = tables
        data = Prompts(list(tables), seed)
        with tempfile.TemporaryDirectory() as scratch:
            how: dict[str, Any] = {**TRAINER, "accelerator": "cpu", "logger": False, "default_root_dir": scratch}
            pl.Trainer(**how).fit(method, datamodule=data)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({problem.target: problem.validation_loss for problem in data.records.values()}))
    found: dict[str, float] = json.loads(file.read_text())
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/word_search"))
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("I", "N"), help="only enumerate every N-th prompt from I on"
    )
    args = parser.parse_args()
    prompts = [one.prompt for one in written(SEED, PROMPTS)]
    first, step = args.part or (0, 1)
    tables = {prompt: enumerated(prompt, args.runs / "tables") for prompt in prompts[first::step]}
    if args.part:
        return
    least = {prompt: min(sum(losses) / len(losses) for losses in table.values()) for prompt, table in tables.items()}
    print(f"Candidates a prompt: {min(map(len, tables.values()))} to {max(map(len, tables.values()))}\n")
    regrets: dict[tuple[str, int], list[float]] = {}
    print(
        f"| solver | {' | '.join(f'regret at {budget} | found at {budget}' for budget in BUDGETS)} |\n|{'---|' * (1 + 2 * len(BUDGETS))}"
    )
    for solver in SOLVERS:
        cells = []
        for budget in BUDGETS:
            repeated = [searched(solver, budget, seed, tables, args.runs / "searches" / f"{solver} {budget} {seed}.json")
                        for seed in range(args.repetitions)]  # fmt: skip
            regret = [[found[prompt] - least[prompt] for found in repeated] for prompt in prompts]
            regrets[solver, budget] = [sum(values) / len(values) for values in regret]
            hits = [sum(value < 1e-6 for value in values) / len(values) for values in regret]
            cells += [interval(regrets[solver, budget]), f"{sum(hits) / len(hits):.2f}"]
        print(f"| {solver} | {' | '.join(cells)} |", flush=True)
    print("\n| regret, prompt by prompt | " + " | ".join(map(str, BUDGETS)) + f" |\n|{'---|' * (1 + len(BUDGETS))}")
    for solver in SOLVERS[1:]:
        pairs = [zip(regrets[solver, budget], regrets["random", budget], strict=True) for budget in BUDGETS]
        print(f"| {solver} - random | {' | '.join(interval([a - b for a, b in pair]) for pair in pairs)} |")


if __name__ == "__main__":
    main()
