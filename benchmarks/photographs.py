"""Invert real photographs: `python benchmarks/photographs.py`, which needs scikit-learn and scikit-image.

Inverts two sample photographs of scikit-learn and two of scikit-image with configs/invert.yaml and configs/ph2p.yaml,
and mixes the two prompts of each. Prints the share of random captions of the embedded model's world whose images are
less similar to the photograph, by the held-out CLIP, than those of each of the three prompts: as means over four images
per caption and sixteen per prompt, on seeds that were not used for selection.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from inversion import alone, fit
from PIL import Image

from lightning_prompts.backbones import EMOJI
from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.emoji import world
from lightning_prompts.methods import PEZ
from lightning_prompts.metrics import ClipImageSimilarity
from lightning_prompts.sampling.seeding import noise_of

SEED = 20_261_124
SCORED = range(1000, 1016)  # seeds of the scored images; mixing selected on others


def photographs() -> dict[str, Image.Image]:
    """Return the photographs by name, all free to use: CC BY by their authors, public domain (NASA) and CC0."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = {"china": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg"),
              "astronaut": data.astronaut(),
              "cat": data.chelsea()}  # fmt: skip
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def prompts_of(rows: list[dict[str, str]], scratch: Path) -> dict[str, list[str]]:
    """Return the prompt of each search for each photograph, then the mixes."""
    runs = {name: scratch / name for name in ("invert", "ph2p")}
    several = [fit(f"configs/{name}.yaml", rows, run) for name, run in runs.items()]
    found = {
        f"configs/{name}.yaml": [p["prompt"] for p in problems] for name, problems in zip(runs, several, strict=True)
    }
    mixed = []
    for number, problems in enumerate(zip(*several, strict=True)):
        parents = [
            alone(run, p, scratch / f"{number}-{run.name}") for run, p in zip(runs.values(), problems, strict=True)
        ]
        mix = scratch / f"{number}-mix"
        lightning_prompts(["predict", "--mix", *parents, "--run", str(mix)])
        mixed.append(json.loads((mix / "result.json").read_text())["prompts"][0]["prompt"])
    return {**found, "mix": mixed}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="folder of other photographs, such as those on which the settings were tuned"
    )
    parser.add_argument("--captions", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for title, photograph in {} if args.folder else photographs().items():
            photograph.save(scratch / f"{title}.png")
        paths = sorted((args.folder or scratch).resolve().glob("*.png"))
        found = prompts_of([{"file": str(path)} for path in paths], scratch)
        method = PEZ(microbatch=32)
        targets = [to_tensor(load_image(path, method.backbone.image_size))[None] for path in paths]
    rng = random.Random(SEED)
    captions = [world.caption(world.random_scene(rng), rng, keep=1) for _ in range(args.captions)]
    noise = torch.randn(4 * args.captions, *method.backbone.latent_shape, generator=torch.Generator().manual_seed(SEED))
    drawn = method.generate([caption for caption in captions for _ in range(4)], noise).unflatten(0, (args.captions, 4))
    similarity = ClipImageSimilarity(str(EMOJI.parent / "scorer"))
    print("| photograph | search | prompt | held-out similarity | random captions that are less similar |")
    print("|---|---|---|---|---|")
    for number, (path, target) in enumerate(zip(paths, targets, strict=True)):
        others = [float(similarity(images, target)) for images in drawn]
        for search, prompts in found.items():
            images = method.generate([prompts[number]] * len(SCORED), noise_of(SCORED, method.backbone.latent_shape))
            own = float(similarity(images, target))
            below = sum(other < own for other in others) / len(others)
            print(f"| {path.stem} | {search} | {prompts[number]} | {own:.3f} | {below:.1%} |")


if __name__ == "__main__":
    main()
