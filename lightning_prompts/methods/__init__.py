"""One paper, one file, one LightningModule."""

from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.methods.pez import PEZ
from lightning_prompts.methods.ph2p import PH2P

__all__ = ["PEZ", "PH2P", "PromptMethod"]
