"""Where a picture looks at which token, in denoisers whose places attend to the tokens in an attention of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone


@torch.no_grad()
def cross_attention_maps(backbone: Backbone, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
    """Averages the denoiser's cross-attentions, coarse ones interpolated; see `Backbone.attention_maps`."""
    layers = [module for name, module in backbone.denoiser.named_modules() if name.endswith(".attn2")]
    height, width = noisy.shape[-2:]
    maps: list[Tensor] = []

    def look(attention: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        # The denoiser's own attention never shows its probabilities, so they are computed a second time beside it.
        told, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
        query, key = attention.to_q(args[0]), attention.to_k(told)
        query, key = (
            attention.head_to_batch_dim(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (query, key)
        )
        if mask is not None:  # added to what each of a prompt's heads and places gives a token
            mask = mask.to(query).repeat_interleave(attention.heads, 0).expand(-1, query.shape[1], -1)
        weights = attention.get_attention_scores(query, key, mask).unflatten(0, (len(told), -1)).mean(1)
        rows = round((weights.shape[1] * height / width) ** 0.5)  # weights are (B, places, L)
        coarse = weights.transpose(1, 2).unflatten(2, (rows, -1))
        maps.append(F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(look, with_kwargs=True))
        backbone.denoise(noisy, timesteps, prompts)
    return torch.stack(maps).mean(0)
