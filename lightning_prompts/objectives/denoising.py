"""The denoising loss of pictures under prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, repeat
from lightning_prompts.microbatch import Microbatch
from lightning_prompts.typed_module import TypedModule


class Denoising(TypedModule):
    """How badly the denoiser predicts the noise in the target's latents when told the prompt; 0 is best, lower is better.

    Args:
        microbatch: Samples per call of the denoiser. The gradient is computed call by call, so memory does not grow with the
            number of problems or samples, and a problem's result does not depend on the others, but for how a call's kernels round.
    """

    def __init__(self, microbatch: Microbatch) -> None:
        super().__init__()
        self.microbatch = microbatch

    def forward(self, backbone: Backbone, prompts: Tensor, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error over the N samples of each of P problems.

        Args:
            backbone: The frozen model.
            prompts: P encoded prompts, (P, R, D).
            latents: Of the targets, (P, N, C, h, w).
            timesteps: (P, N).
            noise: Standard normal, (P, N, C, h, w).

        Returns:
            A loss a problem, (P,), with a gradient to the prompts where gradients are enabled.
        """
        count, samples = timesteps.shape
        told = repeat(prompts, samples)
        embeds = told.detach().requires_grad_(torch.is_grad_enabled())
        flat = latents.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()

        def call(rows: Tensor) -> tuple[Tensor, Tensor | None]:
            """Losses (b,) of some of the samples, and their gradients (b, R, D)."""
            part, (x, eps, t) = embeds[rows], (tensor[rows] for tensor in flat)
            output = backbone.denoise(backbone.add_noise(x, eps, t), t, part)
            squares = (output - backbone.target(x, eps, t)).square().flatten(1)
            losses = squares.detach().mean(1)
            if not squares.requires_grad:
                return losses, None
            # Of the sum: through a float16 denoiser the gradient of the mean would vanish.
            (gradient,) = torch.autograd.grad(squares.sum(), part)
            return losses, gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / squares.shape[1]

        losses, gradient = self.microbatch.over(count * samples, call, embeds.device)
        value = losses.view(count, samples).mean(1)
        if gradient is None:
            return value
        # Zero in value, and in gradient what the calls above have computed.
        slope = (told - embeds.detach()) * gradient
        return value + slope.flatten(1).sum(1).view(count, samples).mean(1)
