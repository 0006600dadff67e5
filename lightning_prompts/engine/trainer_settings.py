"""The settings of Lightning's Trainer that every search needs."""

from __future__ import annotations

from typing import Any

TRAINER: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,  # until no problem is open
    "enable_checkpointing": False,  # PromptCheckpoint, which is atomic, takes its place
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10**9,  # scoring is the BestPrompt callback's
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""Trainer settings that every search needs."""
