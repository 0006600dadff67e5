"""Measure whether images change evenly with `prompt_embeds`: `python benchmarks/continuity.py`.

Generates images on 50 arcs between encoded captions of the embedded model's world, one seed each. Prints the rank
correlation between the images' distances from the first one and those of the embeddings, and the largest step between
neighbors, as a share of the distance between the ends, for increasing numbers of images on the arc: without jumps, this
share shrinks. Distances are the root mean square of pixels, and one minus the cosine by the held-out CLIP. Writes
docs/images/continuity.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from inversion import interval
from metric_guidance import captions, heldout_clip
from scipy.stats import spearmanr
from torch import Tensor

from lightning_prompts.embeddings import slerp
from lightning_prompts.methods import MetricGuidance
from lightning_prompts.objectives import Sharpness
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import noise_of

SEED, FRAMES = 20_261_131, 81
PLOT = Path(__file__).parents[1] / "docs" / "images" / "continuity.png"


def distances(images: Tensor) -> dict[str, Tensor]:
    """Compute distances (F, F) between F images (F, 3, H, W) by pixels and by the held-out CLIP."""
    flat, features = images.flatten(1), heldout_clip()[0].features_of_many(images[None], 50)[0]
    return {"pixels": torch.cdist(flat, flat) / flat.shape[1] ** 0.5, "held-out CLIP": 1 - features @ features.T}


@torch.no_grad()
def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=50)
    args = parser.parse_args()
    method = MetricGuidance(objective=Sharpness(), sampler=SamplerSettings(10), microbatch=32)
    ends = [prompt for prompt, _ in captions(SEED, 2 * args.paths)]
    embedded: list[Tensor] = []
    seen: dict[str, list[Tensor]] = {"pixels": [], "held-out CLIP": []}
    for number, (one, other) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        a, b = method.encode([one, other])
        arc = torch.stack([slerp(a, b, float(value)) for value in torch.linspace(0, 1, FRAMES)])
        images = method.sampler.generate_from_embeds(
            arc[:, None], noise_of([number], method.backbone.latent_shape).expand(FRAMES, 1, -1, -1, -1)
        )
        embedded.append((arc - a).flatten(1).norm(dim=1))
        for name, between in distances(images[:, 0]).items():
            seen[name].append(between)
    steps = [8, 4, 2, 1]
    print(
        f"| distance | rank correlation | {' | '.join(f'largest of {(FRAMES - 1) // step} steps' for step in steps)} |"
    )
    print("|---" * (2 + len(steps)) + "|")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (name, distance) in zip(axes, seen.items(), strict=True):
        ranks = [float(spearmanr(x, y[0]).statistic) for x, y in zip(embedded, distance, strict=True)]
        largest = [[float(y[::step, ::step].diagonal(1).max() / y[0, -1]) for y in distance] for step in steps]
        cells = [interval(values) for values in (ranks, *largest)]
        print(f"| {name} | {' | '.join(cells)} |")
        for x, y in zip(embedded, distance, strict=True):
            axis.plot(x / x[-1], y[0], color="tab:blue", alpha=0.2, linewidth=1)
        axis.plot(
            torch.linspace(0, 1, FRAMES), torch.stack([y[0] for y in distance]).mean(0), color="black", label="mean"
        )
        axis.set(xlabel="distance of the embeddings, share of the arc", ylabel=f"distance of the images, {name}")
        axis.legend(frameon=False)
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    main()
