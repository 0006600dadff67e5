"""The noise schedule that a model was trained with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.typed_module import TypedModule


class NoiseSchedule(TypedModule):
    """Noisy latents and training targets at each noise level of a diffusers scheduler.

    Args:
        name: The model's name, for messages.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.

    Raises:
        UserError: The scheduler's prediction type is not one of `prediction_types`.
    """

    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    alphas_cumprod: Tensor
    sigmas: Tensor

    def __init__(self, name: str, scheduler: Any) -> None:
        super().__init__()
        self.name, self.scheduler = name, scheduler
        self.prediction_type: str = scheduler.config.get("prediction_type", "flow_prediction")
        if self.prediction_type not in self.prediction_types:
            raise UserError(
                f"The model {name!r} has a scheduler for {self.prediction_type!r}, and its family predicts "
                f"{' or '.join(map(repr, self.prediction_types))}; choose another model."
            )
        alphas = getattr(scheduler, "alphas_cumprod", torch.empty(0))  # flows and EDM have none
        self.register_buffer("alphas_cumprod", alphas.float().clone(), persistent=False)
        sigmas = torch.empty(0)
        if self.sigma_data is not None:
            # In diffusers the largest sigma comes first, and EDMEulerScheduler has one sigma more than there are
            # timesteps.
            sigmas = scheduler.sigmas[: self.num_train_timesteps].flip(0).float()
        self.register_buffer("sigmas", sigmas.clone(), persistent=False)

    @property
    def num_train_timesteps(self) -> int:
        """The number of noise levels; timesteps are 0, ..., num_train_timesteps - 1."""
        count: int = self.scheduler.config.num_train_timesteps
        return count

    @property
    def sigma_data(self) -> float | None:
        """The data's deviation in EDM's preconditioning (arXiv 2206.00364, table 1); None for other schedules."""
        value: float | None = self.scheduler.config.get("sigma_data")
        return value

    def condition(self, timesteps: Tensor) -> Tensor:
        """Return the denoiser's input for the noise level, (B,): the timesteps or, with EDM, `c_noise` = ln(sigma) / 4.

        Args:
            timesteps: (B,). Integers 0, ..., num_train_timesteps - 1 are training timesteps; larger is noisier. With
                EDM they index the scheduler's sigmas in ascending order, and floating-point timesteps come from its
                sampler and are already `c_noise`.
        """
        if self.sigma_data is None or timesteps.is_floating_point():
            return timesteps
        return self.sigmas[timesteps.long()].log() / 4

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the latents and of the noise in noisy latents, (B, 1, 1, 1) each."""
        if self.prediction_type == "flow_prediction":
            sigma = (timesteps.to(self.alphas_cumprod) / self.num_train_timesteps).view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        if self.sigma_data is not None:
            sigma = (4 * self.condition(timesteps).to(self.sigmas)).exp().view(-1, 1, 1, 1)
            c_in = (sigma**2 + self.sigma_data**2).rsqrt()
            return c_in, sigma * c_in
        before = timesteps.long()
        alphas = self.alphas_cumprod[before]
        if timesteps.is_floating_point():
            # Some samplers step between two training timesteps, where they interpolate sigma.
            after = self.alphas_cumprod[(before + 1).clamp(max=self.num_train_timesteps - 1)]
            low, high, share = (1 / alphas - 1).sqrt(), (1 / after - 1).sqrt(), (timesteps - before).to(alphas)
            alphas = torch.where(share > 0, 1 / (1 + low.lerp(high, share).square()), alphas)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents (B, C, h, w), the denoiser's input; with EDM they are scaled by `c_in`.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        a, s = self._signal_and_noise(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the denoiser's output, (B, C, h, w).

        With EDM this is the target of the network F itself, `(x0 - c_skip * x) / c_out`. Its variance is 1 at every
        noise level, so all timesteps have equal weight in the squared error.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        if self.prediction_type == "flow_prediction":
            return noise - latents
        a, s = self._signal_and_noise(timesteps)
        if self.sigma_data is not None:
            # With x0 / sigma_data in place of x0, EDM has the factors of a variance-preserving schedule, and F predicts
            # its velocity; "epsilon" means the opposite sign of c_out.
            velocity = self.sigma_data * a * noise - s / self.sigma_data * latents
            return -velocity if self.prediction_type == "epsilon" else velocity
        return noise if self.prediction_type == "epsilon" else a * noise - s * latents

    def predict_x0(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents (B, C, h, w) that the denoiser's output implies.

        Args:
            noisy: Noisy latents, the denoiser's input, (B, C, h, w).
            output: Its output, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        a, s = self._signal_and_noise(timesteps)
        if self.prediction_type == "flow_prediction":
            return noisy - s * output
        if self.sigma_data is not None:
            velocity = -output if self.prediction_type == "epsilon" else output
            return self.sigma_data * (self.sigma_data * a * noisy - s * velocity)
        return (noisy - s * output) / a if self.prediction_type == "epsilon" else a * noisy - s * output
