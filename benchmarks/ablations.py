"""What each choice is worth: `python benchmarks/ablations.py timesteps` and likewise for the other groups.

Each variant changes one setting of configs/ph2p.yaml, or of configs/invert.yaml in the group `default`, and spends the same number
of denoiser samples on the development targets. Prints, per variant, the held-out similarity of four regenerations and the share of targets whose object and background word was
found, with 95% intervals, and draws how these shares grow with the samples spent (the mean of both words). Finished runs are kept
in --runs and not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from inversion import fit, has, interval, words_of

from lightning_prompts.backbones import load_backbone
from lightning_prompts.vocabulary import allowed_tokens

SAMPLES = 1200  # of the search's gradients, a target; scoring comes on top
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def steps(samples: int, passes: int = 1) -> list[str]:
    """The schedule that spends `SAMPLES` on steps of so many samples and evaluations, with as many scorings and restarts."""
    count = SAMPLES // (2 * samples * passes)
    return [f"--data.steps={count}", f"--data.samples={samples}", f"--model.score_every={max(1, count // 20)}",
            f"--model.restart_every={count // 5}"]  # fmt: skip


def vocabulary(share: float) -> list[str]:
    """A random part of the allowed tokens, the same at every call, as the list of words that may be used."""
    import torch

    tokenizer = load_backbone("emoji").towers[0].tokenizer
    allowed = allowed_tokens(tokenizer).nonzero().flatten()
    kept = allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(0))][
        : int(share * len(allowed))
    ]
    return ["--model.words", json.dumps([tokenizer.decode([i]) for i in kept.tolist()])]


def names() -> list[str]:
    """The world's words, as a person would list them for its pictures."""
    from lightning_prompts.emoji import world

    listed = [
        *world.OBJECTS,
        *world.COLORS,
        *world.SIZES,
        *world.LOOKS,
        *world.PATTERNS,
        "background",
        "top",
        "bottom",
        "left",
        "right",
    ]
    return ["--model.words", json.dumps(listed)]


def groups() -> dict[str, dict[str, list[str]]]:
    """Variants of each group: their names and settings."""
    lbfgs = ["--model.optimizer=lbfgs", "--model.lr=1", "--model.max_iter=5", "--model.metric=euclidean"]
    return {
        "timesteps": {
            f"[{low}, {high})": [f"--data.timesteps=[{low},{high}]"]
            for low, high in ((0, 1000), (100, 1000), (450, 1000), (500, 1000), (700, 1000), (500, 900))
        },
        "projection": {
            "immediate, Adam": ["--model.projection=immediate"],
            "delayed, Adam": ["--model.continue_from=projected", "--model.project_every=15"],
            "final, Adam": ["--model.projection=final"],
            "immediate, L-BFGS": ["--model.projection=immediate", *lbfgs, *steps(4, 5)],
            "delayed, L-BFGS": ["--model.continue_from=projected", *lbfgs, *steps(4, 5)],
            "final, L-BFGS": ["--model.projection=final", *lbfgs, *steps(4, 5)],
        },
        "optimizer": {
            "Adam, 0.02": [],
            "Adam, 0.05": ["--model.lr=0.05"],
            "SGD, 1": ["--model.optimizer=sgd", "--model.lr=1"],
            "SGD, 10": ["--model.optimizer=sgd", "--model.lr=10"],
            "SGD, 100": ["--model.optimizer=sgd", "--model.lr=100"],
            "L-BFGS": [*lbfgs, *steps(4, 5)],
        },
        "vocabulary": {
            "10%, random": vocabulary(0.1),
            "50%, random": vocabulary(0.5),
            "100%": [],
            "the world's words": names(),
        },
        "length": {f"{count} tokens": [f"--model.tokens={count}"] for count in (4, 8, 12, 16)},
        "default": {
            "configs/invert.yaml": [],
            "from random tokens": ["--model.start=random"],
            "without the CLIP in the loss": ["--model.clip_weight=0"],
            "without screening": ["--model.screen=1", "--model.topk=32"],
            "without both": ["--model.clip_weight=0", "--model.screen=1", "--model.topk=32"],
            "two exchanges at once": ["--model.swaps=2"],
            "timesteps [450, 1000)": ["--data.timesteps=[450,1000]"],
            "timesteps [0, 1000)": ["--data.timesteps=[0,1000]"],
            "4 tokens": ["--model.tokens=4"],
            "12 tokens": ["--model.tokens=12"],
        },
        "samples": {  # with fewer steps each has to go farther
            f"{count} a step": [*steps(count), f"--model.lr={0.02 * (count / 2) ** 0.5:.4f}"]
            for count in (1, 2, 4, 8, 16)
        },
    }


def curve(problems: list[dict[str, Any]], words: dict[str, dict[str, str]], at: list[int]) -> list[float]:
    """Share of the words that the best prompt has after so many samples."""
    shares = []
    for spent in at:
        found = []
        for problem in problems:
            best = [entry["prompt"] for entry in problem["history"] if entry["unet_samples"] <= spent]
            found += [float(bool(best) and has(best[-1], word)) for word in words[problem["target"]].values()]
        shares.append(sum(found) / len(found))
    return shares


def main() -> None:
    """Prints one table and draws one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=list(groups()))
    parser.add_argument("--targets", default="development", choices=["development", "evaluation"])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    import matplotlib.pyplot as plt

    words, at = words_of(args.targets), list(range(0, SAMPLES + 300, 20))
    figure, axes = plt.subplots(figsize=(6, 4))
    print("| | held-out similarity | object word | background word | samples an image |\n|---|---|---|---|---|")
    for name, settings in groups()[args.group].items():
        run = args.runs / f"{args.group} {name}".replace("%", "").replace(",", "").replace(" ", "_")
        config = "configs/invert.yaml" if args.group == "default" else "configs/ph2p.yaml"
        common = [] if args.group == "default" else steps(2)
        problems = fit(config, args.targets, args.count, run, [*common, *settings])
        cells = [interval([p["heldout_clip_similarity"] for p in problems])]
        cells += [
            interval([float(has(p["prompt"], words[p["target"]][kind])) for p in problems])
            for kind in ("object", "background")
        ]
        print(
            f"| {name} | {' | '.join(cells)} | {sum(p['unet_samples'] for p in problems) / len(problems):.0f} |",
            flush=True,
        )
        most = max(p["unet_samples"] for p in problems)
        shown = [spent for spent in at if spent <= most]
        axes.plot(shown, curve(problems, words, shown), label=name)
    axes.set(xlabel="denoiser samples an image", ylabel="object and background words found", ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / f"ablation_{args.group}.png", dpi=100)


if __name__ == "__main__":
    main()
