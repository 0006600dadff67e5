"""What happens around the steps: projection, scoring, checkpoints, results, guards and progress."""

from lightning_prompts.callbacks.best_prompt import BestPrompt
from lightning_prompts.callbacks.between import Between
from lightning_prompts.callbacks.checkpoint import (
    AtomicCheckpointIO,
    PromptCheckpoint,
    SavedConfig,
    checkpoints_of_all,
    is_checkpoint,
    last_checkpoint,
    parts_of,
    ranks_in,
)
from lightning_prompts.callbacks.dry_run import DryRun
from lightning_prompts.callbacks.grid import SampleGrid
from lightning_prompts.callbacks.guard import NonFiniteGuard
from lightning_prompts.callbacks.mix import Mix, parents_of
from lightning_prompts.callbacks.owner import OwnerGuard
from lightning_prompts.callbacks.progress import PromptProgress
from lightning_prompts.callbacks.projection import VocabularyProjection
from lightning_prompts.callbacks.results import Results, check_seeds
from lightning_prompts.callbacks.scores import Scores

__all__ = [
    "AtomicCheckpointIO",
    "BestPrompt",
    "Between",
    "DryRun",
    "Mix",
    "NonFiniteGuard",
    "OwnerGuard",
    "PromptCheckpoint",
    "PromptProgress",
    "Results",
    "SampleGrid",
    "SavedConfig",
    "Scores",
    "VocabularyProjection",
    "check_seeds",
    "checkpoints_of_all",
    "is_checkpoint",
    "last_checkpoint",
    "parents_of",
    "parts_of",
    "ranks_in",
]
