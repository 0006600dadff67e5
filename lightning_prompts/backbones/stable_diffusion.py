"""Stable Diffusion 1, 2 and XL, and models in their format, including few-step ones such as SD-Turbo and LCM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from packaging import version
from torch import Tensor

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.cross_attention import cross_attention_maps
from lightning_prompts.backbones.text_encoders import TextEncoderOutput, TextEncoderSpec, at_least_float32


class StableDiffusion(Backbone):
    """Stable Diffusion 1 and 2: one CLIP, whose last hidden state after the final norm the UNet attends to."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    text_encoder_specs: ClassVar[tuple[TextEncoderSpec, ...]] = (
        TextEncoderSpec("text_encoder", "CLIPTextModel", use_config_mask=True),
    )
    denoiser_spec = ("unet", "UNet2DConditionModel")
    single_files: ClassVar[Mapping[str, str]] = {
        "cond_stage_model.transformer.": "sd15",
        "cond_stage_model.model.": "sd21",
    }
    cross_attends = True
    supports_clip_skip = True
    pipeline_steps, pipeline_guidance = 50, 7.5

    @classmethod
    def correct_scheduler(cls, pipeline: str, scheduler: Any) -> None:
        """Correct values that would clip latents and start a timestep early, see `Backbone.correct_scheduler`."""
        if pipeline == "StableDiffusionPipeline":
            corrected = {"steps_offset": 1, "clip_sample": False}
            scheduler.register_to_config(**{key: value for key, value in corrected.items() if key in scheduler.config})

    @classmethod
    def correct_denoiser(cls, pipeline: str, denoiser: Any) -> None:
        """Set 64 latents per side for UNets of old files that state fewer, see `Backbone.correct_denoiser`."""
        written, size = denoiser.config.get("_diffusers_version"), denoiser.config.get("sample_size")
        old = written is not None and version.parse(version.parse(written).base_version) < version.parse("0.9.0.dev0")
        if pipeline == "StableDiffusionPipeline" and old and isinstance(size, int) and size < 64:
            denoiser.register_to_config(sample_size=64)

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of all CLIPs together and of the latents, see `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "text encoder's hidden states": (
                sum(encoder.width for encoder in self.text_encoders), config.cross_attention_dim,
            ),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }  # fmt: skip

    @property
    def guides_itself(self) -> bool:
        """Whether the guidance scale is an input of the UNet, as in latent consistency models (arXiv 2310.04378)."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Return the hidden states, see `Backbone.combine`."""
        return outputs[0].hidden

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the UNet, see `LatentDiffusion.denoise`."""
        dtype = self.denoiser.dtype
        hidden, pooled = self.split(prompt_embeds.to(dtype))
        output: Tensor = self.denoiser(
            noisy.to(dtype),
            self.condition(timesteps),
            hidden,
            timestep_cond=self._guidance_embedding(guidance_scale, len(noisy)) if self.guides_itself else None,
            added_cond_kwargs=None if pooled is None else self.added_conditions(pooled),
        ).sample
        return at_least_float32(output)

    def added_conditions(self, pooled: Tensor) -> dict[str, Tensor]:
        """Return the UNet's inputs besides tokens and timesteps, given pooled vectors (B, D)."""
        return {}

    def _guidance_embedding(self, scale: float, count: int) -> Tensor:
        """Return the sinusoidal embedding (count, D) of 1000 * (scale - 1), an input of latent consistency models."""
        half = self.denoiser.config.time_cond_proj_dim // 2
        exponents = torch.arange(half, device=self.device) / max(half - 1, 1)
        angles = 1000 * (scale - 1) * torch.exp(-torch.log(torch.tensor(10000.0)) * exponents)
        embedding = torch.cat([angles.sin(), angles.cos()]).to(self.denoiser.dtype)
        return embedding.expand(count, -1)

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the maps of the UNet's cross-attention, see `LatentDiffusion.attention_maps`."""
        return cross_attention_maps(self, noisy, timesteps, prompt_embeds)


class StableDiffusionXL(StableDiffusion):
    """SDXL: the penultimate hidden states of two CLIPs, concatenated, and the pooled vector of the second.

    The size of the image and of the crop are inputs of the UNet, too; nothing is cropped.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    text_encoder_specs = (
        TextEncoderSpec("text_encoder", "CLIPTextModel", layer=-2),
        TextEncoderSpec("text_encoder_2", "CLIPTextModelWithProjection", embedding_key="clip_g", layer=-2),
    )
    single_files: ClassVar[Mapping[str, str]] = {"conditioner.embedders.1.model.": "sdxl"}
    pipeline_steps, pipeline_guidance = 50, 5.0
    vae_statistics = ("latents_mean", "latents_std")
    zeroes_empty = True

    @property
    def pooled_width(self) -> int:
        """The width of the second text encoder's projection."""
        width: int = self.text_encoders[1].encoder.config.projection_dim
        return width

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Join the hidden states and the pooled vector, see `Backbone.combine`."""
        pooled: Any = outputs[1].pooled
        return self.join(torch.cat([output.hidden for output in outputs], dim=-1), pooled)

    def added_conditions(self, pooled: Tensor) -> dict[str, Tensor]:
        """Return the pooled vectors and the time ids: original size, top left corner of the crop, target size."""
        sizes = pooled.new_full((6,), self.image_size)  # created on the device; copying a list would block the host
        sizes[2:4] = 0
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
