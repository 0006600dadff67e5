"""Stable Diffusion 1 and 2, and models in their format."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone, Conditioning


class StableDiffusion(Backbone):
    """One CLIP text tower; the UNet attends to its last hidden state after the final layer norm."""

    def encode(self, ids: Tensor, embeddings: Tensor | None = None) -> Conditioning:
        """Turns P prompts (P, L) into their hidden states; see `Backbone.encode`."""
        hidden, _ = self.towers[0](ids, embeddings)
        return Conditioning(hidden)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the UNet; see `Backbone.denoise`."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(noisy.to(dtype), timesteps, conditioning.prompt_embeds.to(dtype)).sample
        return output.to(torch.promote_types(output.dtype, torch.float32))

    @torch.no_grad()
    def attention_maps(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Averages the UNet's cross-attentions, coarse ones interpolated; see `Backbone.attention_maps`."""
        layers = [module for name, module in self.denoiser.named_modules() if name.endswith(".attn2")]
        height, width = noisy.shape[-2:]
        maps: list[Tensor] = []

        def look(attention: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
            # The UNet's own attention never shows its probabilities, so they are computed a second time beside it.
            told = kwargs["encoder_hidden_states"]
            query, key = attention.to_q(args[0]), attention.to_k(told)
            query, key = (
                attention.head_to_batch_dim(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (query, key)
            )
            weights = attention.get_attention_scores(query, key).unflatten(0, (len(told), -1)).mean(1)  # (B, places, L)
            rows = round((weights.shape[1] * height / width) ** 0.5)
            coarse = weights.transpose(1, 2).unflatten(2, (rows, -1))
            maps.append(F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False))

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_pre_hook(look, with_kwargs=True))
            self.denoise(noisy, timesteps, conditioning)
        return torch.stack(maps).mean(0)
