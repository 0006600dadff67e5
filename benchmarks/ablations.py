"""Measure the effect of each setting: `python benchmarks/ablations.py timesteps`, and likewise for the other groups.

Each variant changes one setting of configs/ph2p.yaml, or of configs/invert.yaml in the group `default`, and spends the
same number of denoiser samples for its steps on the first targets of a list; scoring is extra. Prints, per variant, the
held-out similarity of four regenerations, its difference from the first variant, target by target, and the share of
targets whose words of each kind (object, background or second object) were found, with 95% intervals. Plots these
shares, as the mean over all words, against the samples spent. Finished runs are kept in --runs and not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from inversion import fit, has, interval, rows_of, share, words_of

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import allowed_tokens

GROUPS = ("timesteps", "projection", "optimizer", "vocabulary", "length", "samples", "default")
SAMPLES = 600  # denoiser samples of a search's gradients; scoring is extra
RESTART = 240  # samples between restarts
SCORE = 60  # samples between scorings
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def steps(samples: int, passes: int = 1) -> list[str]:
    """Return the schedule that spends `SAMPLES` in steps of this many samples and passes."""
    cost = 2 * samples * passes
    return [f"--model.steps={SAMPLES // cost}", f"--data.num_noise_samples={samples}",
            f"--model.score_every_n_steps={max(1, SCORE // cost)}",
            f"--model.restart_every={RESTART // cost}"]  # fmt: skip


def vocabulary(share: float) -> list[str]:
    """Return a random part of the allowed tokens, the same at every call, as a list of allowed words."""
    import torch

    tokenizer = load_backbone("emoji").text_encoders[0].tokenizer
    allowed = allowed_tokens(tokenizer).nonzero().flatten()
    kept = allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(0))][
        : int(share * len(allowed))
    ]
    return ["--model.allowed_words", json.dumps([tokenizer.decode([i]) for i in kept.tolist()])]


def names() -> list[str]:
    """Return the words of the embedded model's world, as a user would list them."""
    from lightning_prompts.emoji import world

    spoken = [*world.OBJECTS, *world.COLORS, *world.SIZES, *world.LOOKS, *world.PATTERNS]
    listed = [*spoken, *"background top bottom left right".split()]
    return ["--model.allowed_words", json.dumps(listed)]


def variants(group: str) -> dict[str, list[str]]:
    """Return the variants of a group, names and settings; the others are compared with the first one."""
    lbfgs = ["--model.optimizer=BatchedLBFGS", "--model.optimizer.lr=1", "--model.optimizer.max_iter=5"]
    lbfgs += ["--model.metric=euclidean", *steps(4, 5)]
    sgd = "--model.optimizer=SGD"
    if group == "timesteps":
        ranges = ((0, 1000), (100, 1000), (500, 1000), (700, 1000), (500, 900))
        return {
            "[450, 1000)": [],
            **{f"[{low}, {high})": [f"--data.timestep_range=[{low},{high}]"] for low, high in ranges},
        }
    if group == "projection":
        return {
            "final, Adam": [],
            "immediate, Adam": ["--model.projection=immediate"],
            "delayed, Adam": ["--model.projection=delayed", "--model.project_every=15"],
            "final, L-BFGS": lbfgs,
            "immediate, L-BFGS": ["--model.projection=immediate", *lbfgs],
            "delayed, L-BFGS": ["--model.projection=delayed", *lbfgs],
        }
    if group == "optimizer":
        rates = {f"SGD, {rate}": [sgd, f"--model.optimizer.lr={rate}"] for rate in (1, 10, 100)}
        return {"Adam, 0.02": [], "Adam, 0.05": ["--model.optimizer.lr=0.05"], **rates, "L-BFGS": lbfgs}
    if group == "vocabulary":
        parts = {f"{share:.0%}, random": vocabulary(share) for share in (0.5, 0.1)}
        return {"100%": [], **parts, "the world's words": names()}
    if group == "length":
        return {"8 tokens": [], **{f"{count} tokens": [f"--model.num_tokens={count}"] for count in (4, 12, 16)}}
    if group == "samples":  # fewer steps must be larger
        rate = {count: f"--model.optimizer.lr={0.02 * (count / 2) ** 0.5:.4f}" for count in (1, 4, 8, 16)}
        return {"2 per step": [], **{f"{count} per step": [*steps(count), lr] for count, lr in rate.items()}}
    return {
        "configs/invert.yaml": [],
        "from random tokens": ["--model.init=random"],
        "without CLIP loss": ["--model.loss_weights.clip=0"],
        "without prefilter": ["--model.prefilter=1", "--model.topk=32"],
        "scored without images": ["--model.rerank.weight=0"],
        "two replacements at once": ["--model.n_replace=2"],
        "timesteps [0, 1000)": ["--data.timestep_range=[0,1000]"],
        "4 tokens": ["--model.num_tokens=4"],
        "12 tokens": ["--model.num_tokens=12"],
    }


def curve(problems: list[dict[str, Any]], words: dict[str, dict[str, str]], at: list[int]) -> list[float]:
    """Return the share of the words in the best prompt after each number of samples."""
    shares = []
    for spent in at:
        found = []
        for problem in problems:
            best = [entry["prompt"] for entry in problem["history"] if entry["unet_samples"] <= spent]
            found += [float(bool(best) and has(best[-1], word)) for word in words[problem["target"]].values()]
        shares.append(sum(found) / len(found))
    return shares


def main() -> None:
    """Print one table and draw one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--targets", default="development", choices=["development", "outside"])
    parser.add_argument("--count", type=int, default=24, help="number of targets")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the searches")
    parser.add_argument("--plot", type=Path, help="file of the plot, by default in docs/images/")
    args = parser.parse_args()

    config = "invert" if args.group == "default" else "ph2p"
    rows, words, reference = rows_of(args.targets, args.count), words_of(args.targets), dict[str, float]()
    kinds = [kind for kind in ("object", "background", "second") if any(kind in named for named in words.values())]
    figure, axes = plt.subplots(figsize=(7.5, 4))
    head = ["held-out similarity", "difference", *(f"{kind} word" for kind in kinds), "samples per image"]
    print(f"| | {' | '.join(head)} |\n|{'---|' * (1 + len(head))}")
    for name, settings in variants(args.group).items():
        label = re.sub(r"[^\w.]+", "_", f"{args.group} {name}" if settings else config)
        common = [] if config == "invert" else steps(2)
        run = args.runs / f"{args.targets} {args.count}" / label
        problems = fit(f"configs/{config}.yaml", rows, run, [*common, *settings])
        similarity = {p["target"]: p["heldout_clip_similarity"] for p in problems}
        reference = reference or similarity
        difference = interval([value - reference[target] for target, value in similarity.items()])
        cells = [interval(list(similarity.values())), difference if reference is not similarity else ""]
        for kind in kinds:
            named = [(p["prompt"], words[p["target"]].get(kind)) for p in problems]
            cells.append(share([has(prompt, word) for prompt, word in named if word]))
        cells.append(f"{sum(p['unet_samples'] for p in problems) / len(problems):.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shown = list(range(0, max(p["unet_samples"] for p in problems) + 1, 20))
        axes.plot(shown, curve(problems, words, shown), label=name)
    axes.set(xlabel="denoiser samples per image", ylabel=f"{' and '.join(kinds)} words found", ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    place = "" if args.targets == "development" else f"_{args.targets}"
    figure.savefig(args.plot or IMAGES / f"ablation_{args.group}{place}.png", dpi=100)


if __name__ == "__main__":
    main()
