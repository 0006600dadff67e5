"""Optimizers that treat every row of a parameter as an independent problem."""

from lightning_prompts.optimizers.adam import BatchedAdam
from lightning_prompts.optimizers.adam_on_lion import AdamOnLion
from lightning_prompts.optimizers.lbfgs import BatchedLBFGS

__all__ = ["AdamOnLion", "BatchedAdam", "BatchedLBFGS"]
