"""Measure the quality of the embedded model: `python benchmarks/embedded_model.py` (needs the font and the `emoji` package).

Prints in how many images, generated in 25 steps for held-out captions, the held-out CLIP recognizes the object among
all names and the background among all colors; the autoencoder's PSNR on the evaluation targets; and the ratio of the
denoising losses with a wrong and with the true caption, by range of timesteps.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import EMOJI, Backbone, load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.data.images import to_tensor
from lightning_prompts.emoji import world
from lightning_prompts.objectives.clip import ClipSimilarity

EVALUATION = Path(__file__).parent / "targets" / "evaluation"
SEED = 20_261_123  # used for no other captions


def recognized(scenes: list[world.Scene], pictures: Tensor) -> dict[str, float]:
    """Return the shares of images whose object and whose background the held-out CLIP recognizes."""
    scorer = ClipSimilarity(str(EMOJI.parent / "scorer"))
    objects, colors = list(world.OBJECTS), list(world.COLORS)
    texts = [f"{word}, {color} background" for word in objects for color in colors]
    best = (scorer.features(pictures) @ scorer.features_of(texts).T).argmax(1)
    object_right = [objects[i // len(colors)] == scene.object for i, scene in zip(best.tolist(), scenes, strict=True)]
    color_right = [colors[i % len(colors)] == scene.background for i, scene in zip(best.tolist(), scenes, strict=True)]
    return {"object": float(np.mean(object_right)), "background": float(np.mean(color_right))}


def draw(backbone: Backbone, captions: list[str], guidance_scale: float) -> Tensor:
    """Pictures (B, 3, 64, 64) of captions, 25 steps."""
    length = backbone.text_encoders[0].length
    told = backbone.encode(encode_text(backbone.text_encoders[0].tokenizer, captions, length))
    nothing = backbone.encode(encode_text(backbone.text_encoders[0].tokenizer, [""], length))
    noise = torch.randn(len(captions), *backbone.latent_shape, generator=torch.Generator().manual_seed(SEED))
    rows = torch.arange(len(captions)).split(20)
    return torch.cat([backbone.decode(backbone.sample(told[r], nothing, noise[r], 25, guidance_scale)) for r in rows])


def loss_ratios(backbone: Backbone, latents: Tensor, captions: list[str]) -> dict[str, float]:
    """Denoising loss with each target's caption replaced by the next one's, over that with its own."""
    told = backbone.encode(encode_text(backbone.text_encoders[0].tokenizer, captions, backbone.text_encoders[0].length))
    wrong, generator, ratios = told[torch.arange(len(latents)).roll(1)], torch.Generator().manual_seed(SEED), {}
    for low, high in ((0, 250), (250, 500), (500, 750), (750, 1000), (500, 1000)):
        t = torch.randint(low, high, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy, target = backbone.add_noise(latents, noise, t), backbone.target(latents, noise, t)
        losses = [F.mse_loss(backbone.denoise(noisy, t, c), target).item() for c in (wrong, told)]
        ratios[f"[{low}, {high})"] = losses[0] / losses[1]
    return ratios


@torch.no_grad()
def main() -> None:
    """Measure and print one table."""
    import json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    args = parser.parse_args()
    backbone = load_backbone("emoji")
    rng = random.Random(SEED)
    scenes = [world.random_scene(rng) for _ in range(args.captions)]
    captions = [world.caption(scene, rng, keep=1) for scene in scenes]
    for source, pictures in (
        ("drawn by the model", draw(backbone, captions, args.guidance_scale)),
        ("rendered, the scorer's ceiling", torch.stack([to_tensor(world.render(scene)) for scene in scenes])),
    ):
        for kind, share in recognized(scenes, pictures).items():
            print(f"| {kind} recognized in {args.captions} images {source} | {share:.1%} |")
    rows = [json.loads(line) for line in (EVALUATION / "targets.jsonl").read_text().splitlines()]
    targets = torch.stack([to_tensor(Image.open(EVALUATION / row["file"]).convert("RGB")) for row in rows])
    latents = torch.cat([backbone.encode_image(part) for part in targets.split(20)])
    decoded = torch.cat([backbone.decode(part) for part in latents.split(20)])
    psnr = 10 * torch.log10(4 / (decoded - targets).square().flatten(1).mean(1))
    print(f"| autoencoder PSNR on {len(rows)} evaluation targets | {psnr.mean():.1f} dB |")
    for span, ratio in loss_ratios(backbone, latents, [row["caption"] for row in rows]).items():
        print(f"| loss with a wrong caption / with the true one, t in {span} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
