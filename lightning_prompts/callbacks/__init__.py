"""Callbacks around the steps of a search: projection, scoring, results, guards and progress."""

from lightning_prompts.callbacks.best_prompt import BestPrompt
from lightning_prompts.callbacks.guard import NonFiniteGuard
from lightning_prompts.callbacks.image_writer import ImageWriter
from lightning_prompts.callbacks.owner import OwnerGuard
from lightning_prompts.callbacks.progress import PromptProgress
from lightning_prompts.callbacks.projection import VocabularyProjection
from lightning_prompts.callbacks.results import Results
from lightning_prompts.callbacks.sample_grid import SampleGrid
from lightning_prompts.callbacks.scores import Scores

__all__ = [
    "BestPrompt",
    "ImageWriter",
    "NonFiniteGuard",
    "OwnerGuard",
    "PromptProgress",
    "Results",
    "SampleGrid",
    "Scores",
    "VocabularyProjection",
]
