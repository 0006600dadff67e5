"""The search methods, each a LightningModule in a file of its own."""

from lightning_prompts.engine.method import PromptMethod
from lightning_prompts.engine.trainer_settings import TRAINER
from lightning_prompts.methods.dpo_diff.method import DPODiff
from lightning_prompts.methods.inversion.baselines import ClipWords, RandomTokens
from lightning_prompts.methods.inversion.gcg import GCG
from lightning_prompts.methods.inversion.pez import PEZ
from lightning_prompts.methods.inversion.ph2p import PH2P
from lightning_prompts.methods.inversion.textual_inversion import TextualInversion
from lightning_prompts.methods.steering.human_feedback import HumanFeedback
from lightning_prompts.methods.steering.metric_guidance import MetricGuidance
from lightning_prompts.methods.steering.seed_invariance import SeedInvariance

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
