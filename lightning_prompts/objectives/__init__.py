"""Losses, and objectives that score images; each objective states its range and direction."""

from lightning_prompts.objectives.base import Objective
from lightning_prompts.objectives.clip import ClipSimilarity
from lightning_prompts.objectives.clip_scores import Aesthetic, ClipQuality, ClipText, Preference
from lightning_prompts.objectives.denoising import Denoising
from lightning_prompts.objectives.reference import LatentDistance, Perceptual
from lightning_prompts.objectives.sharpness import Blurriness, Sharpness

__all__ = [
    "Aesthetic",
    "Blurriness",
    "ClipQuality",
    "ClipSimilarity",
    "ClipText",
    "Denoising",
    "LatentDistance",
    "Objective",
    "Perceptual",
    "Preference",
    "Sharpness",
]
