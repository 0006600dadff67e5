"""The base class of objectives, which score images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_prompts.backbones import Backbone


class Objective(nn.Module, ABC):
    """A differentiable score of images.

    Args:
        weight: Weight among other objectives, and scale of the gradient.
    """

    lowest: ClassVar[float]
    highest: ClassVar[float]
    higher_is_better: ClassVar[bool] = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Load what depends on the model that generates the images."""

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: Images (B, 3, H, W) in [-1, 1].
            prompts: The B prompts as the user wrote them.

        Returns:
            Scores (B,) between `lowest` and `highest`.
        """
