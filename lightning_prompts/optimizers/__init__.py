"""Optimizers that treat every row of a parameter as an independent problem."""

from lightning_prompts.optimizers.adam_on_lion import AdamOnLion
from lightning_prompts.optimizers.lbfgs import BatchedLBFGS
from lightning_prompts.optimizers.rowwise import (
    RowwiseOptimizer,
    build_optimizer,
    check_optimizer,
    describe_optimizer,
    optimizer_names,
    optimizer_settings,
)

__all__ = [
    "AdamOnLion",
    "BatchedLBFGS",
    "RowwiseOptimizer",
    "build_optimizer",
    "check_optimizer",
    "describe_optimizer",
    "optimizer_names",
    "optimizer_settings",
]
