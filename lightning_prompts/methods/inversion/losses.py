"""The weights of the losses that an inversion minimizes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prompts.errors import UserError
from lightning_prompts.setting_types import Weight
from lightning_prompts.unused import refuse_unused


@dataclass(frozen=True)
class LossWeights:
    """Set the weights of the terms of the loss.

    Args:
        denoising: Weight of the denoising loss.
        negative: Weight of the denoising loss of `--data.negative_images`, relative to that of the target.
        clip: Weight of one minus the cosine of prompt and images in CLIP.
    """

    denoising: Weight = 1.0
    negative: Weight = 0.2
    clip: Weight = 0.0

    def check(self, method: str, has_loss: bool) -> None:
        """Refuse weights that leave nothing to minimize, or that a method without a loss does not use.

        Args:
            method: Class of the method.
            has_loss: Whether its steps minimize the loss.

        Raises:
            UserError: The weights cannot be used.
        """
        if not has_loss:
            unused = {"denoising": self.denoising, "clip": self.clip}
            refuse_unused(LossWeights, f"in {method}, which minimizes no loss", unused, "--model.loss_weights")
        if not self.denoising and not self.clip:
            raise UserError(
                "Both loss weights are 0; set --model.loss_weights.denoising or --model.loss_weights.clip above 0."
            )
