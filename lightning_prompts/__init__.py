"""Searches the prompt space of frozen text-to-image diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prompts.api import Result, dpo_diff, human_feedback, invert, metric_guidance, seed_invariance
    from lightning_prompts.backbones import BackboneSettings, load_backbone
    from lightning_prompts.sampling import SamplerSettings

__version__ = "0.1.0"
__all__ = [
    "BackboneSettings",
    "Result",
    "SamplerSettings",
    "dpo_diff",
    "human_feedback",
    "invert",
    "load_backbone",
    "metric_guidance",
    "seed_invariance",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: Lightning takes seconds, which `--help` need not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_prompts import api

    return getattr(api, name)
