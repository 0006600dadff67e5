"""The sampling loop: from noise to latents with the model's diffusers scheduler."""

from __future__ import annotations

import copy
import inspect
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from lightning_prompts.backbones.latent_diffusion import LatentDiffusion


def sample_latents(
    model: LatentDiffusion,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    grad_steps: int,
    stop: int | None,
) -> Tensor:
    """Sample latents (P, C, h, w), see `LatentDiffusion.sample`."""
    scheduler = new_scheduler(model, steps)  # on the CPU, so that the host never waits for a timestep
    # Diffusers' pipelines set eta, the noise that DDIM and TCD add, to 0 whatever the default of the class.
    parameters = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": 0.0} if "eta" in parameters else {}
    if "generator" in parameters:
        extra["generator"] = generators_of(noise)
    scale = getattr(scheduler, "scale_model_input", lambda latents, t: latents)  # flow schedulers have none
    calls = len(scheduler.timesteps) if stop is None else stop
    first = 0 if grad_steps >= steps else calls - grad_steps
    tracking, guided = torch.is_grad_enabled(), model.guided(guidance_scale)
    if guided:
        negative = negative_prompt_embeds
        prompt_embeds = torch.cat([repeat(negative, len(noise)) if len(negative) == 1 else negative, prompt_embeds])
    latents: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(tracking and i >= first):
            scaled = scale(latents, t)
            noisy = torch.cat([scaled, scaled]) if guided else scaled
            output = _denoise(model, noisy, t, prompt_embeds, guidance_scale)
            if guided:
                unconditional, conditional = output.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            if i + 1 == stop:
                # Some samplers scale their latents; the denoiser's input is never scaled.
                timesteps = t.expand(len(scaled)).to(noise.device, non_blocking=True)
                return model.predict_x0(scaled, output, timesteps)
            latents = scheduler.step(output, t, latents, **extra).prev_sample
    return latents


def new_scheduler(model: LatentDiffusion, steps: int) -> Any:
    """Return a new scheduler with `steps` timesteps; schedulers keep state between steps.

    Raises:
        UserError: The model's scheduler cannot make this many steps.
    """
    if steps > model.num_train_timesteps:
        raise UserError(
            f"Images cannot be sampled in {steps} steps, as the model {model.name!r} has {model.num_train_timesteps} "
            "noise levels; give fewer."
        )
    scheduler = copy.deepcopy(model.scheduler)
    try:
        parameters = inspect.signature(scheduler.set_timesteps).parameters
        options = {name: value for name, value in model.timestep_options(steps).items() if name in parameters}
        scheduler.set_timesteps(steps, device="cpu", **options)
    except ValueError as error:
        raise UserError(
            f"The {type(scheduler).__name__} of the model {model.name!r} cannot sample in {steps} steps ({error}); "
            "give another number."
        ) from error
    return scheduler


def _denoise(model: LatentDiffusion, noisy: Tensor, t: Tensor, prompt_embeds: Tensor, guidance_scale: float) -> Tensor:
    """Call the denoiser without keeping activations; unlike a scheduler's step, it has no state and may run twice."""
    timesteps = t.expand(len(noisy)).to(noisy.device, non_blocking=True)
    arguments = noisy, timesteps, prompt_embeds, guidance_scale
    if not torch.is_grad_enabled():
        return model.denoise(*arguments)
    return checkpoint(model.denoise, *arguments, use_reentrant=False, preserve_rng_state=False)


def repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each row for its samples: a, b becomes a, a, b, b."""
    # The gradient of `expand` is a sum, which is deterministic on every device.
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def generators_of(noise: Tensor) -> list[torch.Generator]:
    """Return one generator per row, seeded by the row, for samplers that add noise at each step."""
    rows = noise.detach().float().cpu().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
