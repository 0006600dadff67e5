"""Metrics of found prompts and of the pictures drawn from them."""

from lightning_prompts.metrics.clip import ClipImageSimilarity
from lightning_prompts.metrics.perceptual import lpips_lacks, perceptual_distance
from lightning_prompts.metrics.words import WordRecall

__all__ = ["ClipImageSimilarity", "WordRecall", "lpips_lacks", "perceptual_distance"]
