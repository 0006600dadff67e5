"""What every frozen text-to-image model has: text towers, noise schedule, image coding and the sampling loop."""

from __future__ import annotations

import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self


class TextTower(nn.Module):
    """A text encoder with its tokenizer.

    Args:
        tokenizer: The tokenizer.
        encoder: The text encoder, a transformers model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder: Any = encoder

    @property
    def table(self) -> Tensor:
        """The embedding of each token, (V, D) float32; of an encoder in half precision a copy, so take it once."""
        return _at_least_float32(self.encoder.get_input_embeddings().weight.detach())

    @property
    def length(self) -> int:
        """L, how many tokens the encoder takes, start and end included."""
        most: int = self.tokenizer.model_max_length
        return min(most, getattr(self.encoder.config, "max_position_embeddings", most))

    def forward(self, ids: Tensor, embeddings: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encodes tokens.

        Args:
            ids: Token ids, (P, L). With embeddings they still say where the text ends.
            embeddings: What stands in place of the tokens' embeddings, (P, L, D). `table[ids]` changes nothing.

        Returns:
            The last hidden state, (P, L, D'), and the pooled output, (P, D''), of encoders that have one.
        """
        if embeddings is None:
            output = self.encoder(ids)
        else:  # encoders that take embeddings as an argument then lack the ids, and CLIP's takes none
            layer = self.encoder.get_input_embeddings()
            with layer.register_forward_hook(lambda module, args, replaced: embeddings.to(replaced.dtype)):
                output = self.encoder(ids)
        return output.last_hidden_state, output.get("pooler_output")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser is told about P prompts: hidden states (P, L, D') and, in some families, a pooled (P, D'')."""

    prompt_embeds: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Selects prompts, as rows of a tensor."""
        return Conditioning(self.prompt_embeds[rows], None if self.pooled is None else self.pooled[rows])

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Repeats each prompt for its samples: a, b becomes a, a, b, b."""

        def repeat(x: Tensor) -> Tensor:  # the gradient of `expand` is a sum, which is deterministic on every device
            return x.unsqueeze(1).expand(-1, repeats, *x.shape[1:]).flatten(0, 1)

        return Conditioning(repeat(self.prompt_embeds), None if self.pooled is None else repeat(self.pooled))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Puts prompts one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(torch.cat([part.prompt_embeds for part in parts]), torch.cat(pooled) if pooled else None)


class Backbone(nn.Module, ABC):
    """A frozen text-to-image model: no parameter requires a gradient and it never leaves evaluation mode.

    A family says how text becomes a conditioning (`encode`), how the denoiser is called (`denoise`) and where in the picture it
    uses which token (`attention_maps`). Latents, noise and images outside of the networks are float32, whatever the networks'
    precision.

    Args:
        name: How the person named it.
        towers: The text encoders.
        denoiser: The diffusers model that predicts noise or velocity.
        vae: The diffusers autoencoder.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.
    """

    towers: Sequence[TextTower]
    alphas_cumprod: Tensor

    def __init__(
        self, name: str, towers: Sequence[TextTower], denoiser: nn.Module, vae: nn.Module, scheduler: Any
    ) -> None:
        super().__init__()
        self.name, self.scheduler = name, scheduler
        self.towers = cast("Sequence[TextTower]", nn.ModuleList(towers))
        self.denoiser: Any = denoiser
        self.vae: Any = vae
        self.prediction_type: str = scheduler.config.get("prediction_type", "flow")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"The model {name!r} predicts {self.prediction_type!r}, and only 'epsilon' and 'v_prediction' are supported; "
                "choose another model."
            )
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float().clone(), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, also when the module that holds it is put into training mode."""
        return super().train(False)

    @abstractmethod
    def encode(self, ids: Tensor, embeddings: Tensor | None = None) -> Conditioning:
        """Turns P prompts into what the denoiser is told.

        Args:
            ids: Token ids with start, end and padding, (P, L).
            embeddings: What stands in place of the tokens' embeddings, (P, L, D); gradients flow to it.
        """

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the denoiser on noisy latents (B, C, h, w), timesteps (B,) and B prompts; gives (B, C, h, w) float32."""

    @abstractmethod
    def attention_maps(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """How much each place of a picture looks at each token of its prompt while `denoise` runs; no gradient.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,).
            conditioning: B prompts.

        Returns:
            Cross-attention probabilities (B, L, h, w) float32, the mean over heads and layers; in [0, 1], and over the L tokens of
            a place they sum to one.
        """

    @property
    def num_train_timesteps(self) -> int:
        """How many noise levels there are; timesteps are 0, ..., num_train_timesteps - 1."""
        return len(self.alphas_cumprod)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents that the denoiser was trained on."""
        config = self.denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images that the denoiser was trained on."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of latents and noise in noisy latents, (B, 1, 1, 1) each."""
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) from latents and noise (B, C, h, w) and timesteps (B,)."""
        a, s = self._signal_and_noise(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, (B, C, h, w), for latents and noise (B, C, h, w) and timesteps (B,)."""
        a, s = self._signal_and_noise(timesteps)
        return noise if self.prediction_type == "epsilon" else a * noise - s * latents

    def predict_x0(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents (B, C, h, w) that the denoiser's output (B, C, h, w) for noisy latents stands for."""
        a, s = self._signal_and_noise(timesteps)
        return (noisy - s * output) / a if self.prediction_type == "epsilon" else a * noisy - s * output

    def encode_image(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), the mean of the posterior, of images (B, 3, H, W) in [-1, 1]."""
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        return cast("Tensor", _at_least_float32(latents) * self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w).

        What is scored is what can be saved: values beyond the range are cut off, and no gradient comes from those pixels.
        """
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return _at_least_float32(images).clamp(-1, 1)

    def sample(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        steps: int = 25,
        guidance_scale: float = 7.5,
        grad_steps: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Draws P images with the model's own sampler; what a row becomes does not depend on the rows beside it.

        With `stop` it is the shortcut of DPO-Diff (arXiv 2407.01606, section 3.3): from what the denoiser says at the last call the
        clean latents are predicted at once. With `grad_steps` 1 no more than that call passes a gradient on, so that memory and the
        backward pass do not depend on the number of steps.

        Args:
            conditioning: P prompts.
            negative: What to lead away from, 1 or P prompts; not used without guidance.
            noise: Standard normal, (P, C, h, w). It decides everything, also what samplers such as ancestral ones add later.
            steps: Sampling steps.
            guidance_scale: Weight of the prompt against the negative one; up to 1 there is no guidance, as in diffusers.
            grad_steps: How many of the last calls of the denoiser pass a gradient on; `steps` or more for all. Their activations
                are computed a second time in the backward pass instead of kept.
            stop: Calls of the denoiser after which the clean latents are predicted; None to draw to the end.

        Returns:
            Latents, (P, C, h, w).
        """
        scheduler = self._sampler(steps, noise.device)
        extra = {"generator": _generators(noise)} if "generator" in inspect.signature(scheduler.step).parameters else {}
        calls = len(scheduler.timesteps) if stop is None else stop
        first = 0 if grad_steps >= steps else calls - grad_steps
        tracking, guided = torch.is_grad_enabled(), guidance_scale > 1
        if guided:
            if len(negative.prompt_embeds) == 1:
                negative = negative.repeat_interleave(len(noise))
            conditioning = Conditioning.cat([negative, conditioning])
        latents: Tensor = noise * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(tracking and i >= first):
                scaled = scheduler.scale_model_input(latents, t)
                output = self._denoise_lean(torch.cat([scaled, scaled]) if guided else scaled, t, conditioning)
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = unconditional + guidance_scale * (conditional - unconditional)
                if i + 1 == stop:
                    # Some samplers' latents are scaled; what the denoiser is shown never is.
                    return self.predict_x0(scaled, output, t.long().expand(len(scaled)).to(noise.device))
                latents = scheduler.step(output, t, latents, **extra).prev_sample
        return latents

    def calls(self, steps: int, guidance_scale: float = 7.5) -> int:
        """Denoiser samples that `sample` spends on a picture; some samplers call the denoiser more often than they take steps."""
        return len(self._sampler(steps, "cpu").timesteps) * (2 if guidance_scale > 1 else 1)

    def _sampler(self, steps: int, device: torch.device | str) -> Any:
        """A fresh one, for samplers keep state between steps."""
        if steps > self.num_train_timesteps:
            raise UserError(
                f"Pictures were to be drawn in {steps} steps and the model has {self.num_train_timesteps} noise levels; give fewer."
            )
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def _denoise_lean(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`denoise` without keeping activations; a scheduler's step has a state and must not run twice, this may."""
        arguments = noisy, t.expand(len(noisy)), conditioning
        if not torch.is_grad_enabled():
            return self.denoise(*arguments)
        return checkpoint(self.denoise, *arguments, use_reentrant=False, preserve_rng_state=False)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _generators(noise: Tensor) -> list[torch.Generator]:
    """One generator a row, seeded by the row, for samplers that add noise at each step."""
    rows = noise.detach().float().cpu().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
