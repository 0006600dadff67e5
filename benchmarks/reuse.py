"""Test whether changes learned on one prompt improve others: `python benchmarks/reuse.py`.

Searches embeddings for 21 plain captions of the embedded model's world. For five of them, the learned change, which is
the found embeddings minus the encoded caption, is added to each of the 20 others. On ten fresh seeds, prints the gain
by a prompt's own search, the gain by the added change, and the ratio of the two; how often the added change is a gain;
and its effect on the held-out similarity of images and captions. The 95% intervals are over the prompts, with one value
per prompt for the five changes, so they hold for these five.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import tables
import torch
from inversion import interval, spread
from metric_guidance import CONFIG, captions, heldout_clip, objective
from torch import Tensor

from lightning_prompts.embeddings import transfer
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER, MetricGuidance
from lightning_prompts.sampling.seeding import FINAL

SEED, PROMPTS, SOURCES, FRESH_SEEDS = 20_261_160, 21, 5, 10
VALUES: dict[str, Callable[[dict[str, Any]], float]] = {
    **{name: itemgetter(name) for name in ("own", "added", "heldout_own", "heldout_added")},
    "improved": lambda row: row["added"] > 0,
}
FIGURES = Path(__file__).parent / "figures" / "reuse.csv"


def measure(kind: str) -> list[dict[str, Any]]:
    """Return a row for each pair of a caption whose change is learned and another caption."""
    prompts = [prompt for prompt, _ in captions(SEED, PROMPTS)]
    method, data = MetricGuidance(**CONFIG | {"objective": objective(kind)}), Prompts(prompts)
    with tempfile.TemporaryDirectory() as scratch:
        trainer_settings: dict[str, Any] = {
            **TRAINER,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": scratch,
        }
        pl.Trainer(**trainer_settings).fit(method, datamodule=data)
        problems = list(data.folder.load().values())
        with torch.no_grad():
            noise, before, found = (
                method.draw_noise(problems, FINAL, FRESH_SEEDS),
                method.initial(problems),
                method.best_embeds_of(problems),
            )
    clip, _ = heldout_clip()
    texts = clip.features_of(prompts)
    sign = 1 if method.higher_is_better else -1

    @torch.no_grad()
    def scored(embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean metric, where higher is better, and the held-out similarity of each prompt's images."""
        drawn = method.sampler.generate_from_embeds(embeds, noise)
        similar = (clip.features_of_many(drawn, 50) * texts.unsqueeze(1)).sum(2).mean(1)
        return sign * method.metric(method.values_of(drawn, problems)).mean(1), similar

    plain, own = scored(before), scored(found)
    rows = []
    for source in range(SOURCES):
        added = scored(transfer(before, before[source], found[source]))
        for i, prompt in enumerate(prompts):
            if i != source:
                rows.append({
                    "objective": kind, "learned_on": prompts[source], "prompt": prompt,
                    "own": float(own[0][i] - plain[0][i]), "added": float(added[0][i] - plain[0][i]),
                    "heldout_own": float(own[1][i] - plain[1][i]), "heldout_added": float(added[1][i] - plain[1][i]),
                })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per objective."""
    head = (
        "objective",
        "gain by own search",
        "gain by the added change",
        "ratio",
        "improved",
        "held-out similarity, own search",
        "held-out similarity, added change",
    )
    found = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in dict.fromkeys(row["objective"] for row in rows):
        some = [row for row in rows if row["objective"] == kind]
        by_prompt = [
            {name: fmean(value(row) for row in some if row["prompt"] == prompt) for name, value in VALUES.items()}
            for prompt in dict.fromkeys(row["prompt"] for row in some)
        ]
        own, added = ([row[name] for row in by_prompt] for name in ("own", "added"))
        cells = [
            kind,
            f"{fmean(own):.4f} ± {spread(own):.4f}",
            f"{fmean(added):.4f} ± {spread(added):.4f}",
            f"{fmean(added) / fmean(own):.2f}",
            interval([row["improved"] for row in by_prompt]),
            interval([row["heldout_own"] for row in by_prompt]),
            interval([row["heldout_added"] for row in by_prompt]),
        ]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


def main() -> None:
    """Measure, unless the figures exist, and print the table."""
    known = {row["objective"] for row in tables.read(FIGURES)}
    for kind in ("sharpness", "blurriness", "quality"):
        if kind not in known:
            tables.add(FIGURES, measure(kind))
    print(table(tables.read(FIGURES)))


if __name__ == "__main__":
    main()
