"""Stable Diffusion 1 and 2, and models in their format, few-step ones such as SD-Turbo and LCM among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.cross_attention import cross_attention_maps
from lightning_prompts.backbones.towers import Said, at_least_float32


class StableDiffusion(Backbone):
    """One CLIP text tower; the UNet attends to its last hidden state after the final layer norm."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    reads: ClassVar[tuple[Reads, ...]] = (Reads("text_encoder", "CLIPTextModel", obeys_mask=True),)
    cross_attends = True
    takes_clip_skip = True
    denoises = ("unet", "UNet2DConditionModel")
    pipeline_steps, pipeline_guidance = 50, 7.5

    def widths(self) -> dict[str, tuple[int, int]]:
        """See `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "text encoder's hidden states": (sum(tower.width for tower in self.towers), config.cross_attention_dim),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    @property
    def guides_itself(self) -> bool:
        """Latent consistency models are told the guidance (arXiv 2310.04378)."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def combine(self, said: Sequence[Said]) -> Tensor:
        """The hidden states; see `Backbone.combine`."""
        return said[0].hidden

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Calls the UNet; see `Backbone.denoise`."""
        dtype = self.denoiser.dtype
        told, pooled = self.split(prompts.to(dtype))
        output: Tensor = self.denoiser(
            noisy.to(dtype),
            self.condition(timesteps),
            told,
            timestep_cond=self._guidance(guidance_scale, len(noisy)) if self.guides_itself else None,
            added_cond_kwargs=None if pooled is None else self.added(pooled),
        ).sample
        return at_least_float32(output)

    def added(self, pooled: Tensor) -> dict[str, Tensor]:
        """What the UNet is told beside the tokens and the timestep, of pooled vectors (B, D)."""
        return {}

    def _guidance(self, scale: float, count: int) -> Tensor:
        """The guidance as latent consistency models are told it: sines and cosines of 1000 times the scale less one."""
        half = self.denoiser.config.time_cond_proj_dim // 2
        exponents = torch.arange(half, device=self.device) / max(half - 1, 1)
        angles = 1000 * (scale - 1) * torch.exp(-torch.log(torch.tensor(10000.0)) * exponents)
        embedding = torch.cat([angles.sin(), angles.cos()]).to(self.denoiser.dtype)
        return embedding.expand(count, -1)

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """See `Backbone.attention_maps`."""
        return cross_attention_maps(self, noisy, timesteps, prompts)


class StableDiffusionXL(StableDiffusion):
    """Two CLIP text towers, whose hidden states before the last layer stand side by side, and the pooled vector of the second.

    The UNet is also told the picture's size and that nothing was cropped.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    reads = (
        Reads("text_encoder", "CLIPTextModel", layer=-2),
        Reads("text_encoder_2", "CLIPTextModelWithProjection", layer=-2),
    )
    pipeline_steps, pipeline_guidance = 50, 5.0
    vae_statistics = ("latents_mean", "latents_std")

    @property
    def pooled_width(self) -> int:
        """Of the second tower's projection."""
        width: int = self.towers[1].encoder.config.projection_dim
        return width

    def combine(self, said: Sequence[Said]) -> Tensor:
        """Both towers' hidden states and the second one's pooled vector; see `Backbone.combine`."""
        pooled: Any = said[1].pooled
        return self.join(torch.cat([part.hidden for part in said], dim=-1), pooled)

    def added(self, pooled: Tensor) -> dict[str, Tensor]:
        """The pooled vectors, and the sizes of the picture, of what was cropped, and of what is drawn."""
        sizes = pooled.new_full((6,), self.image_size)  # made on the device; from a list the host would wait for it
        sizes[2:4] = 0
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
