"""Measure whether word maps are right: `python benchmarks/word_maps.py`.

Computes maps on the targets for prompts that name their content, which are the captions and two words alone. Prints,
for a word of each kind, the share of its map on the right region, the share of an even map, and in how many images the
maximum is in the right region, with 95% intervals. The object's region is where the image differs from the color of its
border, so targets whose look changes the background (dark, grainy, blurry) are left out.
"""

from __future__ import annotations

import argparse
import json

import torch
from inversion import TARGETS, interval, share
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.data.images import to_tensor
from lightning_prompts.emoji.world import LOOKS
from lightning_prompts.methods.inversion.word_maps import SAMPLES
from lightning_prompts.metrics.words import content_words
from lightning_prompts.sampling.attention_maps import word_maps
from lightning_prompts.sampling.seeding import WORD_MAPS, draw_noise


def object_region(image: Tensor, places: int) -> Tensor:
    """Return how much each cell (places, places) of an image (3, H, H) differs from its border's color, in [0, 1]."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1).median(1).values
    differs = ((image - border.view(3, 1, 1)).abs().amax(0) > 0.2).float()
    return F.adaptive_avg_pool2d(differs[None], places)[0]


def position(tokens: list[int], word: list[int]) -> int:
    """Return the position of a word's first token in a prompt, at its last occurrence."""
    return max(i for i in range(len(tokens)) if tokens[i : i + len(word)] == word)


@torch.no_grad()
def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="evaluation", choices=["evaluation", "development"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone, folder = load_backbone("emoji"), TARGETS / args.targets
    tokenizer, length = backbone.text_encoders[0].tokenizer, backbone.text_encoders[0].length
    words = json.loads((folder / "words.json").read_text())
    rows = [json.loads(line) for line in (folder / "targets.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not set(content_words(row["caption"])) & set(LOOKS)]
    measured: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        image = to_tensor(Image.open(folder / row["file"]).convert("RGB"))
        latents = backbone.encode_image(image[None])[0]
        noise = draw_noise(0, [row["file"]], WORD_MAPS, SAMPLES, latents.shape, "cpu")[0]
        seen, color = words[row["file"]]["object"], words[row["file"]]["background"]
        on_object = object_region(image, latents.shape[-1])
        for kind, prompt in (("caption", row["caption"]), ("two words", f"{seen} {color}")):
            prompt_embeds = backbone.encode(encode_text(tokenizer, [prompt], length))
            tokens = tokenizer(prompt, add_special_tokens=False).input_ids
            maps = word_maps(backbone, prompt_embeds, latents, noise, 1, len(tokens))
            for name, word, region in (
                ("the object's word", seen, on_object),
                ("the background's color", color, 1 - on_object),
                ('the word "background"', "background", 1 - on_object),
            ):
                if word not in prompt.replace(",", "").split():
                    continue
                heat = maps[position(tokens, tokenizer(word, add_special_tokens=False).input_ids)]
                part = float((heat * region).sum() / heat.sum().clamp(min=1e-9))
                hit = bool(region.flatten()[heat.argmax()] > 0.5)
                measured.setdefault(f"{kind}: {name}", []).append((part, float(region.mean()), hit))
    for name, values in measured.items():
        parts, even, hits = (list(column) for column in zip(*values, strict=True))
        print(f"| {name} | {len(values)} | {interval(parts)} | {sum(even) / len(even):.3f} | {share(hits)} |")


if __name__ == "__main__":
    main()
