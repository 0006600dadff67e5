"""Search prompts of AuraFlow, a family of models that Lightning Prompts does not know."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import Backbone, TextEncoderSpec
from lightning_prompts.backbones.text_encoders import TextEncoderOutput, at_least_float32


class AuraFlow(Backbone):
    """AuraFlow: the hidden states of Pile-T5, whose vocabulary is that of Llama; those of padding are zeros."""

    pipelines = ("AuraFlowPipeline",)
    text_encoder_specs = (
        TextEncoderSpec(
            component="text_encoder",
            network="UMT5EncoderModel",
            kind="pile_t5",
            tokenizer_class="LlamaTokenizerFast",
            tokenizer_files=("tokenizer.model",),
            embedding_key="pile_t5xl",  # ComfyUI's name
            length=256,
            mask_padding=True,
        ),
    )
    denoiser_spec = ("transformer", "AuraFlowTransformer2DModel")
    default_vocabulary = "pile_t5"
    prediction_types = ("flow_prediction",)
    pipeline_steps, pipeline_guidance = 50, 3.5
    fixed_rows = 0
    patch = 2

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of the text encoder and of the latents, each with the one that the transformer takes."""
        config = self.denoiser.config
        return {
            "text encoder's hidden states": (self.text_encoders[0].width, config.joint_attention_dim),
            "autoencoder's latents": (self.vae.config.latent_channels, config.in_channels),
        }

    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Return the hidden states, (P, R, D)."""
        return outputs[0].hidden

    def summary_embedding(self, prompt_embeds: Tensor) -> Tensor:
        """Return the direction (..., D) of the mean row of encoded prompts (..., R, D), whose last rows are zeros."""
        return F.normalize(prompt_embeds.sum(-2), dim=-1)

    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Predict the velocity (B, C, h, w) of noisy latents; the transformer takes times between 0 and 1."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            noisy.to(dtype), encoder_hidden_states=prompt_embeds.to(dtype), timestep=timesteps.to(dtype) / 1000
        ).sample
        return at_least_float32(output)
