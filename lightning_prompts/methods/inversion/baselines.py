"""Baselines for inversion: random tokens, and words chosen by a CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.setting_types import Positive


class RandomTokens(Inverter):
    """Draw new random tokens at each step, and keep the best by validation loss.

    Args:
        **kwargs: See `Inverter`.
    """

    moves_embeddings = has_loss = False

    def step(self, batch: Step, rows: Tensor) -> None:
        """Draw new random tokens."""
        drawn = self.random_tokens(rows, [batch.steps[row] for row in rows.tolist()])
        self.prompt.embeddings.data[rows.to(self.device)] = self.prompt.table[drawn].float()


class ClipWords(Inverter):
    """Build a prompt of the words that are most similar to the images in CLIP; one step, without the denoiser.

    Args:
        beams: Prompts to keep at each length; 1 is greedy.
        **kwargs: See `Inverter`.
    """

    moves_embeddings = has_loss = False

    def __init__(self, *, beams: Positive = 1, **kwargs: Any) -> None:
        super().__init__(init="random", allow_pickle=False, **kwargs)  # there is no initial prompt
        self.beams = beams

    @classmethod
    def search_length(cls, settings: Mapping[str, Any]) -> None:
        """Return None: the first step finds all words."""
        return

    @property
    def uses_clip(self) -> bool:
        """Return true: the CLIP chooses the words."""
        return True

    def step(self, batch: Step, rows: Tensor) -> None:
        """Find all words. They are the result even if the initial random tokens have a lower validation loss."""
        new = torch.tensor([row for row in rows.tolist() if batch.steps[row] == 0], dtype=torch.long)
        if len(new):
            words = self.clip_words(new, self.beams)
            self.prompt.embeddings.data[new.to(self.device)] = self.prompt.table[words].float()
            for row in new.tolist():
                self.batch[row].record.forget_prompt()
