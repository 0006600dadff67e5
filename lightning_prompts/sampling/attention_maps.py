"""Compute cross-attention maps of a prompt's tokens in an image, and draw them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import Backbone, repeat
from lightning_prompts.sampling.figures import to_image
from lightning_prompts.sampling.seeding import validation_timesteps

HEAT = (255, 70, 0)


def word_maps(
    backbone: Backbone, prompt: Tensor, latents: Tensor, noise: Tensor, first: int, tokens: int, batch: int = 16
) -> Tensor:
    """Compute where in an image each token of a prompt gets more cross-attention than on average over the image.

    The start-of-text token gets most of the attention, and some words get more than others at every position. So a
    token's map is its share of the attention to the prompt's tokens and the token after them (which a prompt of one
    token is compared with), minus the mean of this share over the image.

    Args:
        backbone: The frozen model.
        prompt: One encoded prompt, (1, R, D).
        latents: Latents of the image, (C, h, w).
        noise: Standard normal, (N, C, h, w), added at N timesteps from the middle half of the schedule.
        first: Position of the prompt's first token.
        tokens: Number M of the prompt's tokens.
        batch: Samples per denoiser call.

    Returns:
        Maps (M, h, w) in [0, 1); 0 where the share is not above its mean.
    """
    steps, count = backbone.num_train_timesteps, len(noise)
    timesteps = validation_timesteps(count, steps // 4, steps - steps // 4).to(noise.device)
    noisy = backbone.add_noise(latents.expand_as(noise), noise, timesteps)
    parts = zip(noisy.split(batch), timesteps.split(batch), strict=True)
    maps = torch.cat([backbone.attention_maps(x, t, repeat(prompt, len(x))) for x, t in parts]).mean(0)
    share = maps[first : first + tokens + 1]
    share = (share / share.sum(0))[:tokens]
    return (share - share.mean((1, 2), keepdim=True)).clamp(min=0)


def word_map_grid(
    targets: Sequence[Tensor],
    maps: Sequence[Tensor],
    names: Sequence[str],
    tokens: Sequence[Sequence[str]],
    side: int = 96,
) -> Image.Image:
    """Arrange one row per problem: the target, and the map of each token over the target in gray.

    Args:
        targets: P images (3, H, W) in [-1, 1].
        maps: Maps (M, h, w) of each, 0 or more; full heat is the highest value of a row.
        names: Captions of the P targets.
        tokens: Captions of each target's M maps.
        side: Side length of an image in pixels.
    """
    width, line = side + 8, 12
    texts = [
        [textwrap.wrap(text, width // 6) for text in (name, *words)] for name, words in zip(names, tokens, strict=True)
    ]
    height = side + 8 + line * max(len(lines) for row in texts for lines in row)
    canvas = Image.new("RGB", (width * max(map(len, texts)), height * len(texts)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (target, heats, labels) in enumerate(zip(targets, maps, texts, strict=True)):
        shown = to_image(target).resize((side, side), Image.Resampling.NEAREST)
        heats = F.interpolate(heats[None].float().cpu(), (side, side), mode="bilinear")[0]
        images = [shown, *(_overlay(shown, heat) for heat in heats / heats.max().clamp(min=1e-6))]
        for column, (image, lines) in enumerate(zip(images, labels, strict=True)):
            left, top = column * width + 4, row * height
            canvas.paste(image, (left, top + 2))
            for number, text in enumerate(lines):
                pen.text((left, top + side + 4 + number * line), text, fill="black")
    return canvas


def _overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Overlay heat (H, W) in [0, 1] on an image in light gray, on which it is visible for every original color."""
    gray = ImageOps.grayscale(image).point(lambda value: 80 + value * 175 // 255).convert("RGB")
    mask = Image.fromarray((heat * 230).round().byte().numpy())
    return Image.composite(Image.new("RGB", image.size, HEAT), gray, mask)
