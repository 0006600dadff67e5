"""Plain loops for comparison, like the methods' released code: one prompt, and one noise sample or image per call.

Each takes its settings from a method that has searched, and yields the number of denoiser samples after every step; a
backward pass counts as one sample. Unlike in the released code of PH2P and PEZ, weights require no gradients, and
nearest tokens are looked up on the device. Other costs of released code are left out, such as encoding the image again
or decoding candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prompts.backbones import Backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.objectives import Sharpness
from lightning_prompts.objectives.spherical import spherical_distance

PROMPTS = ["the big red dog and the old car", "two cats sit on a wet log", "a tree by the sea", "one fat bee on a bun"]
LOW, HIGH = 450, 1000  # timesteps


def noise_loss(model: Backbone, prompt_embeds: Tensor, latents: Tensor) -> Tensor:
    """Compute the denoising loss of one noise sample of one image (1, C, h, w)."""
    timesteps, noise = torch.randint(LOW, HIGH, (1,), device=model.device), torch.randn_like(latents)
    output = model.denoise(model.add_noise(latents, noise, timesteps), timesteps, prompt_embeds)
    return F.mse_loss(output, model.target(latents, noise, timesteps))


def generate_image(
    method: Any, prompt_embeds: Tensor, negative: Tensor, grad_steps: int = 0, stop: int | None = None
) -> Tensor:
    """Generate one image (1, 3, H, W); guidance takes two samples per call, as in diffusers' pipelines."""
    model = method.backbone
    noise = torch.randn(1, *model.latent_shape, device=model.device)
    steps, scale = method.sampler.num_inference_steps, method.sampler.guidance_scale
    result: Tensor = model.decode(model.sample(prompt_embeds, negative, noise, steps, scale, grad_steps, stop))
    return result


def ph2p(method: Any) -> Iterator[int]:
    """Run Adam on the embeddings, and look up their nearest tokens for each noise sample, as in the released code."""
    model, prompt, count = method.backbone, method.prompt, int(method.data.num_noise_samples)
    table, rows = F.normalize(prompt.table), prompt.allowed.nonzero().squeeze(1)
    embeddings = nn.Parameter(prompt.table[rows[: len(prompt.positions)]].clone())
    optimizer, latents = (
        torch.optim.Adam([embeddings], lr=0.02),
        torch.randn(1, *model.latent_shape, device=model.device),
    )
    while True:
        optimizer.zero_grad()
        for _ in range(count):
            cosines = F.normalize(embeddings.detach()) @ table.T
            ids = prompt.ids(cosines.masked_fill(~prompt.allowed, -torch.inf).argmax(1)[None])
            inserted = prompt.table[ids].index_copy(1, prompt.positions, embeddings[None])
            (noise_loss(model, model.encode(ids, inserted), latents) / count).backward()
        optimizer.step()
        yield 2 * count


def gcg(method: Any) -> Iterator[int]:
    """Replace tokens that the gradient proposes; encode and evaluate each candidate alone."""
    model, prompt, count = method.backbone, method.prompt, int(method.data.num_noise_samples)
    tokens = prompt.allowed.nonzero().squeeze(1)[: len(prompt.positions)]
    latents = torch.randn(1, *model.latent_shape, device=model.device)
    while True:
        ids = prompt.ids(tokens[None])
        embeddings = prompt.table[ids].requires_grad_()
        for _ in range(count):
            noise_loss(model, model.encode(ids, embeddings), latents).backward()
        change = embeddings.grad[0, prompt.positions] @ prompt.table.T
        best = change.masked_fill(~prompt.allowed, torch.inf).topk(method.topk, largest=False).indices
        candidates, losses = tokens.repeat(method.candidates, 1), []
        for candidate in candidates:
            place, number = (int(torch.randint(size, ())) for size in best.shape)
            candidate[place] = best[place, number]
            with torch.no_grad():
                embeds = model.encode(prompt.ids(candidate[None]))
                losses.append(torch.stack([noise_loss(model, embeds, latents) for _ in range(count)]).mean())
        tokens = candidates[torch.stack(losses).argmin()]
        yield (2 + method.candidates) * count


def dpo_diff_gradients(method: Any) -> Iterator[int]:
    """Run DPO-Diff's gradient steps, with RMSprop on the embeddings of the prompt's tokens."""
    model, before = method.backbone, method.plan(0)[0]
    text, negative_prompt_embeds = (
        encode_text(method.vocabulary.tokenizer, PROMPTS[:1], method.vocabulary.length),
        method.encode([""], negative=True),
    )
    ids = text.to(model.device)
    embeddings = nn.Parameter(method.prompt.table[ids].clone())
    optimizer, wanted = torch.optim.RMSprop([embeddings], lr=0.1, momentum=0.5), method.clip.features_of(PROMPTS[:1])
    while True:
        optimizer.zero_grad()
        for _ in range(method.seeds):
            drawn = generate_image(
                method,
                model.encode(ids, embeddings),
                negative_prompt_embeds,
                method.grad_steps,
                before + method.grad_steps,
            )
            spherical_distance(method.clip.features(drawn), wanted).sum().backward()
        optimizer.step()
        yield method.seeds * method.sampler.cost(before + method.grad_steps, method.grad_steps)


@torch.no_grad()
def dpo_diff_candidates(method: Any) -> Iterator[int]:
    """Evaluate DPO-Diff's candidates: encode each, generate images from every seed and score them with the CLIP."""
    wanted = method.clip.features_of(PROMPTS[:1])
    while True:
        for _ in range(method.population):
            encoded = method.encode(PROMPTS[:1]), method.encode(["blurry"], negative=True)
            for _ in range(method.seeds):
                spherical_distance(method.clip.features(generate_image(method, *encoded)), wanted).sum().item()
        yield method.population * method.seeds * method.sampler.cost()


def metric_guidance(method: Any) -> Iterator[int]:
    """Run MetricGuidance's gradient steps, with Adam on the encoded prompt."""
    prompt_embeds, negative_prompt_embeds = (
        nn.Parameter(method.encode(PROMPTS[:1]).float()),
        method.encode([""], negative=True),
    )
    optimizer, objective = torch.optim.Adam([prompt_embeds], lr=0.01), Sharpness()
    while True:
        optimizer.zero_grad()
        for _ in range(method.seeds):
            (
                -objective(
                    generate_image(method, prompt_embeds, negative_prompt_embeds, method.grad_steps), PROMPTS[:1]
                )
            ).sum().backward()
        optimizer.step()
        yield method.seeds * method.sampler.cost(grad_steps=method.grad_steps)
