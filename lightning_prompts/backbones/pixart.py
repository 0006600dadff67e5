"""PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.cross_attention import cross_attention_maps
from lightning_prompts.backbones.towers import Said, at_least_float32


class PixArt(Backbone):
    """T5's hidden states; those of padding are zeros, and what is zeros is not attended to."""

    pipelines = ("PixArtSigmaPipeline",)
    reads = (Reads("text_encoder", "T5EncoderModel", length=300, masked=True, lower=True),)
    cross_attends = True
    denoises = ("transformer", "PixArtTransformer2DModel")
    searched = "t5"
    pipeline_steps, pipeline_guidance = 20, 4.5
    fixed = 0
    patch = 2

    def widths(self) -> dict[str, tuple[int, int]]:
        """See `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "T5 encoder's hidden states": (self.towers[0].width, config.caption_channels),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    def combine(self, said: Sequence[Said]) -> Tensor:
        """See `Backbone.combine`."""
        return said[0].hidden

    def gist(self, prompts: Tensor) -> Tensor:
        """The mean of what is attended to; see `Backbone.gist`."""
        return F.normalize(prompts.sum(-2), dim=-1)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Calls the transformer, which also predicts a variance that nobody uses; see `Backbone.denoise`."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            noisy.to(dtype),
            encoder_hidden_states=prompts.to(dtype),
            encoder_attention_mask=(prompts != 0).any(2).to(dtype),
            timestep=self.condition(timesteps),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return at_least_float32(output[:, : noisy.shape[1]])

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """See `Backbone.attention_maps`."""
        return cross_attention_maps(self, noisy, timesteps, prompts)
