"""Show where in its target each token of a found prompt acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.attention_maps import word_map_grid, word_maps
from lightning_prompts.sampling.seeding import WORD_MAPS, draw_noise

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter

SAMPLES = 8  # noisy versions of a target, over which its maps are averaged


def prompt_word_maps(method: Inverter, problems: Sequence[Problem]) -> list[Tensor]:
    """Compute the maps (M, h, w) of each problem's best prompt, in the first image of its target."""
    shape, keys = method.backbone.latent_shape, [problem.key for problem in problems]
    noise = draw_noise(method.data.seed, keys, WORD_MAPS, SAMPLES, shape, method.device)
    latents = [several[0].to(method.device) for several in method.data.latents(method.backbone, problems)]
    first, batch = int(method.prompt.positions[0]), method.microbatch.size
    maps = []
    for problem, x, eps in zip(problems, latents, noise, strict=True):
        prompt, tokens = method.encode([str(problem.prompt)]), len(problem.token_ids or problem.embedding or ())
        maps.append(word_maps(method.backbone, prompt, x, eps, first, tokens, batch))
    return maps


def token_texts(tokenizer: Any, problem: Problem) -> list[str]:
    """Return labels for the M tokens of a problem's prompt: their texts, or 1 to M for free embeddings."""
    if problem.token_ids is None:
        return [str(number) for number in range(1, 1 + len(problem.embedding or ()))]
    return [tokenizer.decode([token]).strip() for token in problem.token_ids]


def word_map_figure(method: Inverter, problems: Sequence[Problem]) -> Image.Image:
    """Draw the maps of the best prompts over the first image of each target."""
    targets = [images[0] for images in method.data.target_images(problems)]
    tokens = [token_texts(method.vocabulary.tokenizer, problem) for problem in problems]
    return word_map_grid(targets, prompt_word_maps(method, problems), [problem.target for problem in problems], tokens)
