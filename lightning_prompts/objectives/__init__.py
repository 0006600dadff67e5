"""What is minimised: plain modules that state their range and direction."""

from lightning_prompts.objectives.clip import ClipSimilarity
from lightning_prompts.objectives.denoising import Denoising

__all__ = ["ClipSimilarity", "Denoising"]
