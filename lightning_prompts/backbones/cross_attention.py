"""Cross-attention maps of denoisers that attend to text tokens in separate attention layers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.latent_diffusion import LatentDiffusion


@torch.no_grad()
def cross_attention_maps(model: LatentDiffusion, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Average the denoiser's cross-attentions, interpolating coarse ones; see `LatentDiffusion.attention_maps`."""
    layers = [module for name, module in model.denoiser.named_modules() if name.endswith(".attn2")]
    height, width = noisy.shape[-2:]
    maps: list[Tensor] = []

    def record(attention: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        # Fused attention does not return its probabilities, so they are computed a second time.
        hidden, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
        query, key = attention.to_q(args[0]), attention.to_k(hidden)
        query, key = (
            attention.head_to_batch_dim(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (query, key)
        )
        if mask is not None:  # added to the scores of each of a prompt's heads and locations
            mask = mask.to(query).repeat_interleave(attention.heads, 0).expand(-1, query.shape[1], -1)
        weights = attention.get_attention_scores(query, key, mask).unflatten(0, (len(hidden), -1)).mean(1)
        rows = round((weights.shape[1] * height / width) ** 0.5)  # weights are (B, locations, L)
        coarse = weights.transpose(1, 2).unflatten(2, (rows, -1))
        maps.append(F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        model.denoise(noisy, timesteps, prompt_embeds)
    return torch.stack(maps).mean(0)
