"""The family of PixArt-Sigma, which reads T5 alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.cross_attention import cross_attention_maps
from lightning_prompts.backbones.text_encoders import TextEncoderOutput, at_least_float32, t5


class PixArt(Backbone):
    """PixArt-Sigma: the hidden states of T5, zeros for padding. The attention masks rows of zeros."""

    pipelines = ("PixArtSigmaPipeline",)
    text_encoder_specs = (t5("text_encoder", length=300, mask_padding=True, lowercase=True),)
    denoiser_spec = ("transformer", "PixArtTransformer2DModel")
    cross_attends = True
    default_vocabulary = "t5"
    pipeline_steps, pipeline_guidance = 20, 4.5
    fixed_rows = 0
    patch = 2

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of T5 and of the latents, see `Backbone.widths`."""
        config = self.denoiser.config
        return {
            "T5 encoder's hidden states": (self.text_encoders[0].width, config.caption_channels),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Return the hidden states, see `Backbone.combine`."""
        return outputs[0].hidden

    def summary_embedding(self, prompt_embeds: Tensor) -> Tensor:
        """Return the direction of the mean row, see `Backbone.summary_embedding`."""
        return F.normalize(prompt_embeds.sum(-2), dim=-1)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the transformer, whose predicted variance is dropped, see `LatentDiffusion.denoise`."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            noisy.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            encoder_attention_mask=(prompt_embeds != 0).any(2).to(dtype),
            timestep=self.condition(timesteps),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return at_least_float32(output[:, : noisy.shape[1]])

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the maps of the transformer's cross-attention, see `LatentDiffusion.attention_maps`."""
        return cross_attention_maps(self, noisy, timesteps, prompt_embeds)
