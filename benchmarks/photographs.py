"""Real photographs: `python benchmarks/photographs.py` (needs scikit-learn and scikit-image, for their sample pictures).

Inverts two sample photographs of scikit-learn and two of scikit-image and says how many random captions of the embedded model's
world draw something less similar to the photograph, by the held-out CLIP, than the found prompt does: four pictures of each.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image

from lightning_prompts.backbones import EMOJI
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.emoji import world
from lightning_prompts.main import main as lightning_prompts
from lightning_prompts.methods import PEZ
from lightning_prompts.metrics import ClipImageSimilarity

SEED = 20_261_124


def photographs() -> dict[str, Image.Image]:
    """The pictures by name, all free to use: CC BY by their authors, public domain (NASA) and CC0."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = {"china": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg"), "astronaut": data.astronaut(),
              "cat": data.chelsea()}  # fmt: skip
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/invert.yaml")
    parser.add_argument("--captions", type=int, default=200)
    args, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name, photograph in photographs().items():
            photograph.save(Path(scratch) / f"{name}.png")
        run = Path(scratch) / "run"
        lightning_prompts(["fit", "--config", args.config, "--data.images", scratch, "--run", str(run), *extra])
        problems = json.loads((run / "result.json").read_text())["problems"]
        method = PEZ(microbatch=32)
        size = method.backbone.image_size
        targets = {
            problem["target"]: to_tensor(load_image(Path(scratch) / problem["target"], size)) for problem in problems
        }
    rng = random.Random(SEED)
    captions = [world.caption(world.random_scene(rng), rng, keep=1) for _ in range(args.captions)]
    noise = torch.randn(4 * args.captions, *method.backbone.latent_shape, generator=torch.Generator().manual_seed(SEED))
    drawn = method.draw([caption for caption in captions for _ in range(4)], noise).unflatten(0, (args.captions, 4))
    similarity = ClipImageSimilarity(str(EMOJI.parent / "scorer"))
    print("| photograph | prompt | held-out similarity | random captions less similar |\n|---|---|---|---|")
    for problem in problems:
        target, found = targets[problem["target"]][None], problem["heldout_clip_similarity"]
        others = [float(similarity(pictures, target)) for pictures in drawn]
        below = sum(other < found for other in others) / len(others)
        print(f"| {Path(problem['target']).stem} | {problem['prompt']} | {found:.3f} | {below:.1%} |")


if __name__ == "__main__":
    main()
