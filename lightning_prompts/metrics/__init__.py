"""Metrics of prompts and of the images generated from them."""

from lightning_prompts.metrics.clip import ClipImageSimilarity, ClipTextSimilarity
from lightning_prompts.metrics.diversity import Diversity
from lightning_prompts.metrics.perceptual import Lpips
from lightning_prompts.metrics.readability import DictionaryWords, Perplexity, SpecialCharacters, read_dictionary
from lightning_prompts.metrics.words import WordRecall

__all__ = [
    "ClipImageSimilarity",
    "ClipTextSimilarity",
    "DictionaryWords",
    "Diversity",
    "Lpips",
    "Perplexity",
    "SpecialCharacters",
    "WordRecall",
    "read_dictionary",
]
