"""The diffusers schedulers that are supported, and those that can replace each other."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from lightning_prompts.errors import UserError

NOISE_LEVELS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Config keys that decide a scheduler's noise levels and what the denoiser predicts."""

EXCHANGEABLE = {
    "": (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ),
    "EDM": ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
    "FlowMatch": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
}
"""Diffusers schedulers that can replace each other, by the kind of their noise levels."""


def check_noise_levels(scheduler: Any) -> None:
    """Refuse a scheduler whose noise levels are not supported.

    Raises:
        TypeError: They are neither those of a discrete variance-preserving schedule nor of EDM or a flow.
    """
    name = type(scheduler).__name__
    known = _kind(name) or hasattr(scheduler, "alphas_cumprod")
    if not known or scheduler.config.get("timestep_type") == "continuous":
        raise TypeError(f"the noise levels of this {name} are not supported")


def replacement(own: Any, name: str, model: str) -> Any:
    """Return another scheduler with the noise levels and the prediction type of a model's own.

    Diffusers' `from_config` makes it from the config of the model's scheduler, with two corrections. First, the values
    that decide the noise levels and the prediction type are kept even if that scheduler has them from its class
    defaults, which differ between classes. Second, `clip_sample` and `thresholding` stay off unless that scheduler has
    them on, because latents are not confined to [-1, 1].

    Args:
        own: The model's scheduler.
        name: Class name of the other scheduler.
        model: The model's name, for messages.

    Raises:
        UserError: The scheduler is unknown, made for other noise levels, or would change them.
    """
    import diffusers

    known, own_name = exchangeable(own), type(own).__name__
    if name not in known:
        raise UserError(
            f"The scheduler {name!r} does not fit this model, whose own is {own_name}; use one of {', '.join(known)}."
        )
    kind = getattr(diffusers, name)
    try:
        parameters = inspect.signature(kind).parameters
        kept = {key: own.config[key] for key in NOISE_LEVELS if key in parameters and key in own.config}
        off = {key: bool(own.config.get(key)) for key in ("clip_sample", "thresholding") if key in parameters}
        other = kind.from_config(own.config, **kept, **off)
    except (ImportError, NotImplementedError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(" .:")
        raise UserError(
            f"The scheduler {name!r} cannot be created from the {own_name} of the model {model!r} ({reason}); leave "
            "out --model.backbone.scheduler or choose another."
        ) from error
    levels = [getattr(scheduler, "alphas_cumprod", torch.empty(0)) for scheduler in (own, other)]
    same = all(own.config.get(key) == other.config.get(key) for key in ("prediction_type", "sigma_data"))
    if not same or not torch.allclose(levels[0], levels[1], rtol=0, atol=1e-6):
        raise UserError(
            f"The scheduler {name!r} would change the noise levels or the prediction type of the model {model!r}, "
            f"whose own is {own_name}; leave out --model.backbone.scheduler or choose another."
        )
    return other


def exchangeable(scheduler: Any) -> tuple[str, ...]:
    """Return the diffusers classes that can replace a scheduler, including its own."""
    own = type(scheduler).__name__
    names = EXCHANGEABLE[_kind(own)]
    if scheduler.config.get("use_dynamic_shifting"):  # by image size, which Heun's scheduler does not support
        names = tuple(name for name in names if name != "FlowMatchHeunDiscreteScheduler")
    return tuple(dict.fromkeys((own, *names)))


def _kind(name: str) -> str:
    """Return which schedulers can replace a scheduler: those of the kind FlowMatch, EDM, or "" for the rest."""
    return next((kind for kind in ("FlowMatch", "EDM") if name.startswith(kind)), "")
