"""The denoiser and the autoencoder of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_prompts.backbones.noise_schedule import NoiseSchedule
from lightning_prompts.backbones.sampling_loop import new_scheduler, sample_latents
from lightning_prompts.backbones.text_encoders import at_least_float32
from lightning_prompts.errors import UserError


class LatentDiffusion(NoiseSchedule, ABC):
    """A latent diffusion model without its text encoders: denoiser, autoencoder, noise schedule and sampling loop.

    Outside of the networks, latents, noise and images are float32, whatever the precision of the networks.

    Args:
        name: The model's name.
        denoiser: The diffusers model that predicts noise or velocity.
        vae: The diffusers autoencoder.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.
        image_size: Height and width of generated images, in pixels; None for the size that the model was trained on.
    """

    pipeline_steps: ClassVar[int]  # default sampling steps in diffusers
    pipeline_guidance: ClassVar[float]  # default guidance scale in diffusers
    cross_attends: ClassVar[bool] = False  # whether `attention_maps` is implemented
    patch: ClassVar[int] = 1  # side of the denoiser's patches, in latents
    # Config keys of the autoencoder for the mean and the deviation of latents; the family's pipeline uses them if all
    # are set.
    vae_statistics: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, name: str, denoiser: nn.Module, vae: nn.Module, scheduler: Any, image_size: int | None = None
    ) -> None:
        super().__init__(name, scheduler)
        self.denoiser: Any = denoiser
        self.vae: Any = vae
        self.image_size = image_size or self.trained_size
        if self.image_size % (self.factor * self.patch):
            raise UserError(
                f"--model.backbone.image_size must be a multiple of {self.factor * self.patch} for the model {name!r}, "
                f"got {self.image_size}; change it."
            )
        self.default_steps, self.default_guidance = self._default_sampling()

    @property
    def device(self) -> torch.device:
        """The device of the computation."""
        return self.alphas_cumprod.device

    # --- denoiser

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the denoiser.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,), see `condition`.
            prompt_embeds: Encoded prompts, (B, R, D).
            guidance_scale: Input of models that embed the guidance scale; others ignore it.

        Returns:
            Its prediction, (B, C, h, w) float32.
        """

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return how much each location of an image attends to each token of its prompt in `denoise`; no gradient.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,).
            prompt_embeds: Encoded prompts, (B, R, D).

        Returns:
            Cross-attention probabilities (B, L, h, w) float32, averaged over heads and layers; at each location they
            sum to one over the L tokens.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no cross-attention: image and text tokens share one attention."
        )

    def guided(self, guidance_scale: float) -> bool:
        """Return whether classifier-free guidance is used, which doubles the denoiser samples."""
        return guidance_scale > 1 and not self.guides_itself

    @property
    def guides_itself(self) -> bool:
        """Whether guidance is distilled into the denoiser, so that negative prompts have no effect."""
        return False

    @property
    def trained_size(self) -> int:
        """Height and width, in pixels, of the images that the denoiser was trained on."""
        return square_size(self.denoiser.config.sample_size, self.name) * self.factor

    # --- autoencoder

    @property
    def factor(self) -> int:
        """The side of a latent in pixels."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of an image's latents."""
        side = self.image_size // self.factor
        return self.vae.config.latent_channels, side, side

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w), the mean of the posterior."""
        latents = at_least_float32(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean)
        mean, std = self._latent_statistics(latents)
        return cast("Tensor", (latents - mean) * (self.vae.config.scaling_factor / std))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1].

        Values outside of this range are clamped, as in a saved image, so clamped pixels have no gradient.
        """
        mean, std = self._latent_statistics(latents)
        images: Tensor = self.vae.decode(
            (latents * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        ).sample
        return at_least_float32(images).clamp(-1, 1)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of latents by channel, as far as the family's pipeline uses them."""
        stated = [self.vae.config.get(key) for key in self.vae_statistics]
        mean, std = (*stated, 1.0)[:2] if stated and None not in stated else (0.0, 1.0)
        return torch.as_tensor(mean).to(like).view(-1, 1, 1), torch.as_tensor(std).to(like).view(-1, 1, 1)

    # --- sampling

    def sample(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        noise: Tensor,
        steps: int = 25,
        guidance_scale: float = 7.5,
        grad_steps: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Sample P latents with the model's scheduler; the rest of the batch affects an image only through rounding.

        With `stop`, this is the shortcut of DPO-Diff (arXiv 2407.01606, section 3.3): the clean latents are predicted
        from the output of the last call. With `grad_steps` 1, only that call propagates a gradient, so that memory and
        the backward pass do not depend on the number of steps.

        Args:
            prompt_embeds: P encoded prompts, (P, R, D).
            negative_prompt_embeds: 1 or P encoded negative prompts; not used without guidance.
            noise: Standard normal, (P, C, h, w). It also seeds the noise that some samplers add later.
            steps: Sampling steps.
            guidance_scale: Classifier-free guidance scale; up to 1 there is no guidance, as in diffusers.
            grad_steps: How many of the last denoiser calls propagate a gradient; `steps` or more for all. Their
                activations are recomputed in the backward pass.
            stop: Predict the clean latents after this many denoiser calls; None to sample to the end.

        Returns:
            Latents, (P, C, h, w).
        """
        return sample_latents(
            self, prompt_embeds, negative_prompt_embeds, noise, steps, guidance_scale, grad_steps, stop
        )

    def calls(self, steps: int) -> int:
        """Return the denoiser calls that `sample` makes per image; some schedulers make several per step."""
        return len(new_scheduler(self, steps).timesteps)

    def timestep_options(self, steps: int) -> dict[str, Any]:
        """Return the arguments of `set_timesteps`, besides the number of steps, that the family's pipeline passes."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        tokens = (self.latent_shape[1] // self.patch) ** 2
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return {"mu": low + (high - low) * (tokens - short) / (long - short)}

    def _default_sampling(self) -> tuple[int, float]:
        """Return the default sampling steps and guidance: the family's, or those of a few-step model's scheduler."""
        config = self.scheduler.config
        if type(self.scheduler).__name__ == "LCMScheduler":
            return 4, 8.5 if self.guides_itself else 1.0
        # Turbo models; models that predict velocity also use this spacing, to start from pure noise.
        trailing = config.get("timestep_spacing") == "trailing" and self.prediction_type == "epsilon"
        if trailing and "Euler" in type(self.scheduler).__name__:
            return 1, 1.0
        return self.pipeline_steps, self.pipeline_guidance

    def replace_scheduler(self, scheduler: Any) -> None:
        """Sample with another scheduler that has the same noise levels.

        The model keeps its default steps and guidance, unless the scheduler is LCMScheduler.
        """
        self.scheduler = scheduler
        if type(scheduler).__name__ == "LCMScheduler":
            self.default_steps, self.default_guidance = self._default_sampling()


def square_size(sample_size: int | Sequence[int] | None, name: str) -> int:
    """Return the latents per side that a denoiser's config states, as a number or as height and width.

    Args:
        sample_size: The value in the config.
        name: The model's name, for messages.

    Raises:
        UserError: The config states no size, or height and width differ.
    """
    if sample_size is None:
        raise UserError(
            f"The denoiser of the model {name!r} does not state the size of its images; give "
            "--model.backbone.image_size in pixels."
        )
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height != width:
        raise UserError(
            f"The model {name!r} was trained on {height} x {width} latents, but only square images are supported; give "
            "--model.backbone.image_size in pixels."
        )
    return height
