"""What a picture can be judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_prompts.backbones import Backbone


class Objective(nn.Module, ABC):
    """A judgement of pictures that passes a gradient on to their pixels.

    Args:
        weight: What it counts for beside others, and the scale of its gradient.
    """

    lowest: ClassVar[float]
    highest: ClassVar[float]
    higher_is_better: ClassVar[bool] = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Loads what depends on the model that draws."""

    @abstractmethod
    def forward(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judges pictures.

        Args:
            pictures: (B, 3, H, W) in [-1, 1].
            prompts: The B prompts as the person wrote them.

        Returns:
            Values (B,) between `lowest` and `highest`.
        """
