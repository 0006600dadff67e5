"""Frozen text-to-image models behind one interface, and the code that loads them."""

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.from_pipeline import as_backbone
from lightning_prompts.backbones.loading import EMOJI, load_backbone, quiet
from lightning_prompts.backbones.memory import save_memory
from lightning_prompts.backbones.registry import families
from lightning_prompts.backbones.sampling_loop import repeat
from lightning_prompts.backbones.settings import BackboneLike, BackboneSettings
from lightning_prompts.backbones.text_encoders import TextEncoder, TextEncoderSpec, Vocabulary

__all__ = [
    "EMOJI",
    "Backbone",
    "BackboneLike",
    "BackboneSettings",
    "TextEncoder",
    "TextEncoderSpec",
    "Vocabulary",
    "as_backbone",
    "families",
    "load_backbone",
    "quiet",
    "repeat",
    "save_memory",
]
