"""The family of FLUX.1, by black-forest-labs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.text_encoders import TextEncoderOutput, TextEncoderSpec, at_least_float32, t5


class Flux(Backbone):
    """FLUX.1: the hidden states of T5 and the pooled vector of a CLIP, which carries little more than the subject.

    Guidance is distilled into the model, so negative prompts have no effect. The guidance scale is an input of
    FLUX.1-dev and fixed in FLUX.1-schnell.
    """

    pipelines = ("FluxPipeline",)
    text_encoder_specs = (TextEncoderSpec("text_encoder", "CLIPTextModel"), t5("text_encoder_2", length=512))
    denoiser_spec = ("transformer", "FluxTransformer2DModel")
    default_vocabulary = "t5"
    prediction_types = ("flow_prediction",)
    pipeline_steps, pipeline_guidance = 28, 3.5
    fixed_rows = 0
    patch = 2
    vae_statistics = ("shift_factor",)
    guides_itself = True

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of T5, of the CLIP's pooled vector and of packed latents, see `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "T5 encoder's hidden states": (self.text_encoders[1].width, config.joint_attention_dim),
            "pooled vectors": (self.pooled_width, config.pooled_projection_dim),
            "autoencoder's latents": (4 * self.vae.config.latent_channels, config.in_channels),
        }

    @property
    def pooled_width(self) -> int:
        """The width of the CLIP."""
        return self.text_encoders[0].width

    @property
    def trained_size(self) -> int:
        """The height and width of 128 latents, in pixels, which no config states."""
        return 128 * self.factor

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Join T5's hidden states and the CLIP's pooled vector, see `Backbone.combine`."""
        pooled: Any = outputs[0].pooled
        return self.join(outputs[1].hidden, pooled)

    def timestep_options(self, steps: int) -> dict[str, Any]:
        """Return evenly spaced noise levels, which the scheduler shifts, see `LatentDiffusion.timestep_options`."""
        levels = (
            {}
            if self.scheduler.config.get("use_flow_sigmas")
            else {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
        )
        return super().timestep_options(steps) | levels

    def _default_sampling(self) -> tuple[int, float]:
        """Return the defaults, which are 4 steps and guidance 1 for FLUX.1-schnell."""
        return super()._default_sampling() if self.denoiser.config.guidance_embeds else (4, 1.0)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the transformer on patches of 2 x 2 latents, see `LatentDiffusion.denoise`."""
        dtype, (height, width) = self.denoiser.dtype, noisy.shape[-2:]
        hidden, pooled = self.split(prompt_embeds.to(dtype))
        patches = noisy.to(dtype).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
        rows, columns = torch.meshgrid(
            torch.arange(height // 2, device=noisy.device), torch.arange(width // 2, device=noisy.device), indexing="ij"
        )
        positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(dtype)
        output: Tensor = self.denoiser(
            patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=timesteps.to(dtype) / 1000,
            guidance=noisy.new_full((len(noisy),), guidance_scale) if self.denoiser.config.guidance_embeds else None,
            txt_ids=positions.new_zeros(hidden.shape[1], 3),
            img_ids=positions,
        ).sample
        patches = output.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))  # (B, h/2, w/2, C, 2, 2)
        return at_least_float32(patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))
