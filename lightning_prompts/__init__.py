"""Search the prompt space of frozen text-to-image diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prompts.api import dpo_diff, human_feedback, invert, metric_guidance, seed_invariance
    from lightning_prompts.backbones import BackboneSettings, load_backbone
    from lightning_prompts.python_search import Result
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
    """Import a name when it is first used, since Lightning takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_prompts import api, backbones, python_search, sampling

    return next(vars(home)[name] for home in (api, backbones, python_search, sampling) if name in vars(home))
