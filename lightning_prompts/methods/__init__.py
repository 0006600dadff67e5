"""One paper, one file, one LightningModule."""

from lightning_prompts.methods.base import TRAINER, PromptMethod
from lightning_prompts.methods.baselines import ClipWords, RandomTokens
from lightning_prompts.methods.dpo_diff import DPODiff
from lightning_prompts.methods.gcg import GCG
from lightning_prompts.methods.human_feedback import HumanFeedback
from lightning_prompts.methods.metric_guidance import MetricGuidance
from lightning_prompts.methods.pez import PEZ
from lightning_prompts.methods.ph2p import PH2P
from lightning_prompts.methods.seed_invariance import SeedInvariance
from lightning_prompts.methods.textual_inversion import TextualInversion

__all__ = [
    "GCG",
    "PEZ",
    "PH2P",
    "TRAINER",
    "ClipWords",
    "DPODiff",
    "HumanFeedback",
    "MetricGuidance",
    "PromptMethod",
    "RandomTokens",
    "SeedInvariance",
    "TextualInversion",
]
