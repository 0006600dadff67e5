"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.towers import Said, at_least_float32


class StableDiffusion3(Backbone):
    """Two CLIP text towers side by side, filled up to the width of T5's hidden states, which stand below; both pooled vectors.

    Without its T5, which is optional, the model is told zeros in its place.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    reads = (
        Reads("text_encoder", "CLIPTextModelWithProjection", layer=-2),
        Reads("text_encoder_2", "CLIPTextModelWithProjection", layer=-2),
        Reads("text_encoder_3", "T5EncoderModel", length=256, optional=True),
    )
    denoises = ("transformer", "SD3Transformer2DModel")
    predicts = ("flow_prediction",)
    pipeline_steps, pipeline_guidance = 28, 7.0
    patch = 2
    takes_clip_skip = True
    vae_statistics = ("shift_factor",)

    def widths(self) -> dict[str, tuple[int, int]]:
        """See `Backbone.widths`."""
        config = self.denoiser.config
        taken = config.joint_attention_dim
        return {
            "T5 encoder's hidden states": (self.towers[2].width if len(self.towers) == 3 else taken, taken),
            "pooled vectors": (self.pooled_width, config.pooled_projection_dim),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    @property
    def pooled_width(self) -> int:
        """Of both projections together."""
        return sum(tower.encoder.config.projection_dim for tower in self.towers[:2])

    def combine(self, said: Sequence[Said]) -> Tensor:
        """See `Backbone.combine`."""
        clip = torch.cat([part.hidden for part in said[:2]], dim=-1)
        width, length = self.denoiser.config.joint_attention_dim, self.reads[2].length
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5 = said[2].hidden if len(said) == 3 else clip.new_zeros(len(clip), int(length or 0), width)
        pooled = torch.cat([part.pooled for part in said[:2] if part.pooled is not None], dim=-1)
        return self.join(torch.cat([clip, t5.to(clip)], dim=-2), pooled)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Calls the transformer; see `Backbone.denoise`."""
        dtype = self.denoiser.dtype
        told, pooled = self.split(prompts.to(dtype))
        output: Tensor = self.denoiser(
            noisy.to(dtype), encoder_hidden_states=told, pooled_projections=pooled, timestep=timesteps
        ).sample
        return at_least_float32(output)
