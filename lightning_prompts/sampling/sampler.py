"""Sample images of encoded prompts and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, repeat
from lightning_prompts.errors import UserError
from lightning_prompts.sampling.microbatch import Microbatch
from lightning_prompts.setting_types import Positive

FEW_CALLS = 4  # denoiser calls per image through all of which a gradient can be computed


@dataclass(frozen=True)
class SamplerSettings:
    """Set how `fit`, `test` and `predict` generate images.

    Args:
        num_inference_steps: Denoising steps; None for the model's default, at most 10 in methods that generate many
            images during the search.
        guidance_scale: Classifier-free guidance scale; None for the model's default.
    """

    num_inference_steps: Positive | None = None
    guidance_scale: float | None = None

    def build(self, backbone: Backbone, microbatch: Microbatch, most_steps: int | None = None) -> Sampler:
        """Build the sampler, with the model's defaults for unset values.

        Args:
            backbone: The model.
            microbatch: Images per call.
            most_steps: Upper limit of the model's default number of steps; None for no limit.

        Raises:
            UserError: The model's scheduler does not support this number of steps.
        """
        own = backbone.default_steps
        steps = int(self.num_inference_steps or min(own, most_steps or own))
        guidance = backbone.default_guidance if self.guidance_scale is None else self.guidance_scale
        return Sampler(backbone, steps, guidance, microbatch)


class Sampler:
    """A frozen model with its number of denoising steps, guidance scale and microbatch.

    Args:
        backbone: The model.
        num_inference_steps: Denoising steps per image.
        guidance_scale: Classifier-free guidance scale; up to 1 there is no guidance.
        microbatch: Images per call.

    Raises:
        UserError: The model's scheduler does not support this number of steps.
    """

    def __init__(
        self, backbone: Backbone, num_inference_steps: int, guidance_scale: float, microbatch: Microbatch
    ) -> None:
        self.backbone, self.microbatch = backbone, microbatch
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        backbone.calls(num_inference_steps)

    # --- cost

    @property
    def calls(self) -> int:
        """Denoiser calls per image; some schedulers make several per step."""
        return self.backbone.calls(self.num_inference_steps)

    @property
    def is_few_step(self) -> bool:
        """Whether images take so few denoiser calls that a gradient can be computed through all of them."""
        return self.calls <= FEW_CALLS

    @property
    def guided(self) -> bool:
        """Whether images are sampled with classifier-free guidance."""
        return self.backbone.guided(self.guidance_scale)

    def cost(self, calls: int | None = None, grad_steps: int = 0) -> int:
        """Return the denoiser samples per image; guidance doubles them, and a backward pass counts as one.

        Args:
            calls: Denoiser calls; None for all.
            grad_steps: Number of the last calls that propagate a gradient.
        """
        calls = self.calls if calls is None else calls
        return (calls + min(grad_steps, calls)) * (2 if self.guided else 1)

    def check_guided(self, consequence: str, instead: str = "leave it out") -> None:
        """Refuse a setting that only has an effect with classifier-free guidance.

        Args:
            consequence: What happens without guidance, such as "a negative prompt does nothing".
            instead: What to do, such as "leave it out".

        Raises:
            UserError: There is no guidance.
        """
        if self.backbone.guides_itself:
            raise UserError(
                f"The model {self.backbone.name!r} has guidance built in, so {consequence}; {instead}, or choose "
                "another model."
            )
        if not self.guided:
            raise UserError(
                f"With --model.sampler.guidance_scale {self.guidance_scale:g}, {consequence}; give a value above 1, or "
                f"{instead}."
            )

    # --- images

    def sample(self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, noise: Tensor) -> Tensor:
        """Sample images (B, 3, H, W) in [-1, 1] in one call.

        Args:
            prompt_embeds: Encoded prompts, (B, R, D).
            negative_prompt_embeds: Encoded negative prompts, (1, R, D) or (B, R, D).
            noise: Standard normal, (B, C, h, w).
        """
        latents = self.backbone.sample(
            prompt_embeds, negative_prompt_embeds, noise, self.num_inference_steps, self.guidance_scale
        )
        return self.backbone.decode(latents)

    @torch.no_grad()
    def generate(self, noise: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Generate images (B, 3, H, W) in [-1, 1] from noise (B, C, h, w) in microbatches, and return them on the CPU.

        Args:
            noise: Standard normal, (B, C, h, w).
            encode: Returns the encoded prompts (b, R, D) and negative prompts (1, R, D) or (b, R, D) of the images with
                the indices (b,).
        """
        return self.microbatch.map(
            len(noise), lambda indices: self.sample(*encode(indices), noise[indices]).cpu(), noise.device
        )

    def generate_from_texts(
        self,
        texts: Sequence[str],
        noise: Tensor,
        negative: str | Sequence[str],
        encode: Callable[[Sequence[str], bool], Tensor],
    ) -> Tensor:
        """Generate images (B, 3, H, W) in [-1, 1] of B texts.

        Args:
            texts: The prompts.
            noise: Standard normal, (B, C, h, w).
            negative: A negative prompt for all images, or one per image.
            encode: Encodes texts to (b, R, D), given whether they are negative prompts.

        Raises:
            UserError: There is a negative prompt without guidance.
        """
        if any([negative] if isinstance(negative, str) else negative):
            self.check_guided("a negative prompt does nothing")

        def encode_both(indices: Tensor) -> tuple[Tensor, Tensor]:
            some = indices.tolist()
            negatives = [negative] if isinstance(negative, str) else [negative[i] for i in some]
            return encode([texts[i] for i in some], False), encode(negatives, True)

        return self.generate(noise, encode_both)

    def generate_from_embeds(self, embeds: Tensor, noise: Tensor) -> Tensor:
        """Generate images (P, N, 3, H, W) of encoded prompts (P, S, R, D) from noise (P, N, C, h, w); see `split`."""
        prompt_embeds, negative_prompt_embeds = self.split(embeds, noise.shape[1])
        images = self.generate(
            noise.flatten(0, 1), lambda indices: (prompt_embeds[indices], negative_prompt_embeds[indices])
        )
        return images.view(*noise.shape[:2], *images.shape[1:])

    def split(self, embeds: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """Split encoded prompts (Q, S, R, D) into `prompt_embeds` and `negative_prompt_embeds`, repeated `count` times.

        With S = 1, the negative prompt is the empty text.
        """
        prompt_embeds = embeds[:, 0]
        if embeds.shape[1] == 2:
            negative_prompt_embeds = embeds[:, 1]
        else:
            negative_prompt_embeds = self.backbone.encode_text([""], negative=True).expand(len(embeds), -1, -1)
        return repeat(prompt_embeds, count), repeat(negative_prompt_embeds, count)

    def sample_and_score(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        noise: Tensor,
        score: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
        grad_steps: int = 0,
        calls: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample B latents and score them, one microbatch at a time, with or without a gradient.

        Args:
            prompt_embeds: Encoded prompts, (B, R, D).
            negative_prompt_embeds: Encoded negative prompts, (B, R, D).
            noise: Standard normal, (B, C, h, w).
            score: Given latents (b, C, h, w) and their indices (b,), returns scores (b,) and other tensors (b, ...) by
                name.
            grad_steps: Number of the last denoiser calls that propagate a gradient to both prompts; see
                `Backbone.sample`.
            calls: Denoiser calls after which the clean latents are predicted; None for all.

        Returns:
            The scores (B,), with a gradient if `grad_steps` is above 0, and the other tensors (B, ...), detached.
        """

        def call(embeds: list[Tensor], indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            latents = self.backbone.sample(
                embeds[0], embeds[1], noise[indices], self.num_inference_steps, self.guidance_scale, grad_steps, calls
            )
            return score(latents, indices)

        with torch.set_grad_enabled(grad_steps > 0 and torch.is_grad_enabled()):
            return self.microbatch.value_and_grad(call, prompt_embeds, negative_prompt_embeds)
