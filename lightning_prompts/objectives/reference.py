"""Distances of images from a reference image."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.objectives.base import Objective
from lightning_prompts.objectives.lpips import LpipsDistance


class _ReferenceObjective(Objective):
    """A distance from a reference image, in [0, inf); lower is better.

    Args:
        reference: File of the reference image.
        weight: See `Objective`.
    """

    lowest, highest = 0.0, math.inf
    higher_is_better = False
    image: Tensor

    def __init__(self, reference: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        load_image(reference, 8)  # raises an error for an invalid file before a model is loaded
        self.reference = reference

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Load the reference at the backbone's image size."""
        image = to_tensor(load_image(self.reference, backbone.image_size))[None]
        self.register_buffer("image", image, persistent=False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1]."""
        return self.distance(images)

    @abstractmethod
    def distance(self, images: Tensor) -> Tensor:
        """Compute the distances (B,) of images (B, 3, H, W) in [-1, 1]."""


class Perceptual(_ReferenceObjective):
    """LPIPS (arXiv 1801.03924) to a reference image.

    Args:
        reference: File of the reference image.
        lpips_weights: File of the weights of LPIPS's AlexNet; None for the one in torch's cache.
        weight: See `Objective`.
    """

    def __init__(self, reference: str, lpips_weights: str | None = None, weight: float = 1.0) -> None:
        super().__init__(reference, weight)
        self.lpips = LpipsDistance(weights=lpips_weights)

    def distance(self, images: Tensor) -> Tensor:
        """Compute the distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        distances: Tensor = self.lpips(images, self.image.expand_as(images))
        return distances


class LatentDistance(_ReferenceObjective):
    """Mean squared difference from the latents of a reference image, both encoded by the backbone's autoencoder.

    Args:
        reference: File of the reference image.
        weight: See `Objective`.
    """

    latents: Tensor

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Encode the reference image."""
        super().attach(backbone, offline)
        self._encode = backbone.encode_image
        self.register_buffer("latents", self._encode(self.image), persistent=False)

    def distance(self, images: Tensor) -> Tensor:
        """Compute the distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        return (self._encode(images) - self.latents).square().flatten(1).mean(1)
