"""FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.towers import Said, at_least_float32


class Flux(Backbone):
    """T5's hidden states, and the pooled vector of a CLIP text tower, which says little more than the subject.

    The model has learned to guide itself: nothing can be led away from. FLUX.1-dev is told the guidance, FLUX.1-schnell has one.
    """

    pipelines = ("FluxPipeline",)
    reads = (Reads("text_encoder", "CLIPTextModel"), Reads("text_encoder_2", "T5EncoderModel", length=512))
    denoises = ("transformer", "FluxTransformer2DModel")
    searched = "t5"
    predicts = ("flow_prediction",)
    pipeline_steps, pipeline_guidance = 28, 3.5
    fixed = 0
    patch = 2
    vae_statistics = ("shift_factor",)
    guides_itself = True

    def widths(self) -> dict[str, tuple[int, int]]:
        """See `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "T5 encoder's hidden states": (self.towers[1].width, config.joint_attention_dim),
            "pooled vectors": (self.pooled_width, config.pooled_projection_dim),
            "autoencoder's latents": (4 * self.vae.config.latent_channels, config.in_channels),
        }

    @property
    def pooled_width(self) -> int:
        """Of the CLIP's."""
        return self.towers[0].width

    @property
    def trained_size(self) -> int:
        """128 latents a side, which no config states."""
        return 128 * self.factor

    def combine(self, said: Sequence[Said]) -> Tensor:
        """See `Backbone.combine`."""
        pooled: Any = said[0].pooled
        return self.join(said[1].hidden, pooled)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Noise levels that are evenly spaced before they are shifted; see `Backbone.schedule`."""
        levels = (
            {}
            if self.scheduler.config.get("use_flow_sigmas")
            else {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
        )
        return super().schedule(steps) | levels

    def _defaults(self) -> tuple[int, float]:
        """Those of FLUX.1-schnell are fewer."""
        return super()._defaults() if self.denoiser.config.guidance_embeds else (4, 1.0)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Calls the transformer on squares of four latents; see `Backbone.denoise`."""
        dtype, (height, width) = self.denoiser.dtype, noisy.shape[-2:]
        told, pooled = self.split(prompts.to(dtype))
        squares = noisy.to(dtype).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
        rows, columns = torch.meshgrid(
            torch.arange(height // 2, device=noisy.device), torch.arange(width // 2, device=noisy.device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(dtype)
        output: Tensor = self.denoiser(
            squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2),
            encoder_hidden_states=told,
            pooled_projections=pooled,
            timestep=timesteps.to(dtype) / 1000,
            guidance=noisy.new_full((len(noisy),), guidance_scale) if self.denoiser.config.guidance_embeds else None,
            txt_ids=places.new_zeros(told.shape[1], 3),
            img_ids=places,
        ).sample
        squares = output.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))  # (B, h/2, w/2, C, 2, 2)
        return at_least_float32(squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))
