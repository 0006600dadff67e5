"""What every inverter has to beat: random tokens, and words that a CLIP chooses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_prompts.data.problems import Step
from lightning_prompts.methods.inverter import Inverter
from lightning_prompts.ranges import Positive


class RandomTokens(Inverter):
    """New random tokens at each step, of which the best by validation loss are kept.

    Args:
        **kwargs: See `Inverter`.
    """

    def search(self, batch: Step, rows: Tensor) -> None:
        """Draws."""
        drawn = self.prompt.table[self.random_tokens(batch.step)].float()
        self.prompt.embeddings.data[rows] = drawn[rows]


class ClipWords(Inverter):
    """The words that the CLIP finds most similar to the pictures, added one after the other; one step, without the denoiser.

    Args:
        beams: Prompts that are kept at each length; 1 is greedy.
        **kwargs: See `Inverter`.
    """

    def __init__(self, *, beams: Positive = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beams = beams

    def search(self, batch: Step, rows: Tensor) -> None:
        """Finds all words; they are the result, also where the random tokens of the start have a lower validation loss."""
        if batch.step == 0:
            self.prompt.embeddings.data[rows] = self.prompt.table[self.clip_words(self.beams)][rows].float()
            for row in rows.tolist():
                self.problems[row].forget_prompt()
