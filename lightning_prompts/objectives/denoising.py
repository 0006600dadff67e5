"""The denoising loss of images given prompts."""

from __future__ import annotations

from torch import Tensor

from lightning_prompts.backbones import Backbone, repeat
from lightning_prompts.sampling.microbatch import Microbatch
from lightning_prompts.typed_module import TypedModule


class Denoising(TypedModule):
    """Mean squared error of the denoiser on the target's noisy latents, given the prompt; 0 or more, lower is better.

    Args:
        microbatch: Samples per denoiser call. Memory does not grow with the number of problems or samples, and a loss
            depends on the other problems only through rounding.
    """

    def __init__(self, microbatch: Microbatch) -> None:
        super().__init__()
        self.microbatch = microbatch

    def forward(self, backbone: Backbone, prompts: Tensor, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Compute the loss of each of P problems, over its N samples.

        Args:
            backbone: The frozen model.
            prompts: Encoded prompts, (P, R, D).
            latents: Latents of the targets, (P, N, C, h, w).
            timesteps: Timesteps, (P, N).
            noise: Standard normal, (P, N, C, h, w).

        Returns:
            The losses (P,), with a gradient to the prompts where gradients are enabled.
        """
        count, samples = timesteps.shape
        flat = latents.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()

        def squared_errors(inputs: list[Tensor], indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """Return the squared errors (b, C, h, w) of some of the samples."""
            x, eps, t = (tensor[indices] for tensor in flat)
            output = backbone.denoise(backbone.add_noise(x, eps, t), t, inputs[0])
            return (output - backbone.target(x, eps, t)).square(), {}

        losses, _ = self.microbatch.value_and_grad(squared_errors, repeat(prompts, samples))
        return losses.view(count, samples).mean(1)
