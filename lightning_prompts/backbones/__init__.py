"""Frozen text-to-image models behind one interface, and where they are loaded from."""

from lightning_prompts.backbones.base import Backbone, repeat
from lightning_prompts.backbones.loading import EMOJI, FAMILIES, load_backbone, quiet
from lightning_prompts.backbones.memory import save_memory
from lightning_prompts.backbones.settings import BackboneLike, BackboneSettings
from lightning_prompts.backbones.towers import Kind, TextTower, Vocabulary

__all__ = [
    "EMOJI",
    "FAMILIES",
    "Backbone",
    "BackboneLike",
    "BackboneSettings",
    "Kind",
    "TextTower",
    "Vocabulary",
    "load_backbone",
    "quiet",
    "repeat",
    "save_memory",
]
