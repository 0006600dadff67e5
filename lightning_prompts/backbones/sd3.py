"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.text_encoders import TextEncoderOutput, TextEncoderSpec, at_least_float32, t5


class StableDiffusion3(Backbone):
    """Stable Diffusion 3: two CLIPs, concatenated and padded to the width of T5, then T5's rows; both pooled vectors.

    T5 is optional; without it, its rows are zeros.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    text_encoder_specs = (
        TextEncoderSpec("text_encoder", "CLIPTextModelWithProjection", layer=-2),
        TextEncoderSpec("text_encoder_2", "CLIPTextModelWithProjection", embedding_key="clip_g", layer=-2),
        t5("text_encoder_3", length=256, optional=True),
    )
    denoiser_spec = ("transformer", "SD3Transformer2DModel")
    prediction_types = ("flow_prediction",)
    pipeline_steps, pipeline_guidance = 28, 7.0
    patch = 2
    supports_clip_skip = True
    vae_statistics = ("shift_factor",)

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of T5, of both pooled vectors and of the latents, see `Backbone.widths`."""
        config = self.denoiser.config
        expected = config.joint_attention_dim
        t5_width = self.text_encoders[2].width if len(self.text_encoders) == 3 else expected
        return {
            "T5 encoder's hidden states": (t5_width, expected),
            "pooled vectors": (self.pooled_width, config.pooled_projection_dim),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    @property
    def pooled_width(self) -> int:
        """The width of both projections together."""
        return sum(encoder.encoder.config.projection_dim for encoder in self.text_encoders[:2])

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Join the rows of the CLIPs, those of T5, and the pooled vectors, see `Backbone.combine`."""
        clip = torch.cat([output.hidden for output in outputs[:2]], dim=-1)
        width, length = self.denoiser.config.joint_attention_dim, self.text_encoder_specs[2].length
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5_rows = outputs[2].hidden if len(outputs) == 3 else clip.new_zeros(len(clip), int(length or 0), width)
        pooled = torch.cat([output.pooled for output in outputs[:2] if output.pooled is not None], dim=-1)
        return self.join(torch.cat([clip, t5_rows.to(clip)], dim=-2), pooled)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the transformer, see `LatentDiffusion.denoise`."""
        dtype = self.denoiser.dtype
        hidden, pooled = self.split(prompt_embeds.to(dtype))
        output: Tensor = self.denoiser(
            noisy.to(dtype), encoder_hidden_states=hidden, pooled_projections=pooled, timestep=timesteps
        ).sample
        return at_least_float32(output)
