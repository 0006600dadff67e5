"""How far a picture is from one that a person shows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.metrics.perceptual import Lpips
from lightning_prompts.objectives.base import Objective


class _ToReference(Objective):
    """A distance from a picture, in [0, inf), lower is nearer.

    Args:
        reference: File of the picture.
        weight: See `Objective`.
    """

    lowest, highest = 0.0, math.inf
    higher_is_better = False
    picture: Tensor

    def __init__(self, reference: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        load_image(reference, 8)  # refuses what is no picture before a model is loaded
        self.reference = reference

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Reads the picture at the size that the model draws."""
        picture = to_tensor(load_image(self.reference, backbone.image_size))[None]
        self.register_buffer("picture", picture, persistent=False)

    def forward(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of pictures (B, 3, H, W) in [-1, 1]."""
        return self.distance(pictures)

    @abstractmethod
    def distance(self, pictures: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]."""


class Perceptual(_ToReference):
    """LPIPS (arXiv 1801.03924) to a reference picture.

    Args:
        reference: File of the picture.
        lpips_weights: File of the weights of its AlexNet; None for the one in torch's cache.
        weight: See `Objective`.
    """

    def __init__(self, reference: str, lpips_weights: str | None = None, weight: float = 1.0) -> None:
        super().__init__(reference, weight)
        self.network = Lpips(weights=lpips_weights).network.eval()

    def distance(self, pictures: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]."""
        pair = [F.interpolate(x, size=64) if min(x.shape[-2:]) < 64 else x for x in (pictures, self.picture)]
        distances: Tensor = self.network(pair[0], pair[1].expand_as(pair[0]))
        return distances.flatten()


class LatentDistance(_ToReference):
    """Mean squared difference of latents, as the model's autoencoder encodes them, to a reference picture's.

    Args:
        reference: File of the picture.
        weight: See `Objective`.
    """

    latents: Tensor

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Encodes the picture."""
        super().attach(backbone, offline)
        self._encode = backbone.encode_image
        self.register_buffer("latents", self._encode(self.picture), persistent=False)

    def distance(self, pictures: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]."""
        return (self._encode(pictures) - self.latents).square().flatten(1).mean(1)
