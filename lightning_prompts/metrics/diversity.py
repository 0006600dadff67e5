"""Diversity of the images generated from one prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.metrics.clip import ClipMean


class Diversity(ClipMean):
    """Mean of one minus the cosine of CLIP features, over all pairs of a prompt's images and then over prompts.

    In [0, 2]; 0 if all images of each prompt are equal. A higher value means that the images depend more on the seed
    and less on the prompt; whether that is better depends on the prompt's purpose.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = None

    def update(self, images: Tensor) -> None:
        """Add the images (P, N, 3, H, W) in [-1, 1] of P prompts, with N of 2 or more."""
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(f"Diversity needs two or more images per prompt, (P, N, 3, H, W), got {(*images.shape,)}.")
        features = self.scorer.features(images.flatten(0, 1)).view(*images.shape[:2], -1)
        # Half the squared distance of unit vectors is one minus their cosine, and exactly 0 for equal ones.
        self.add(torch.stack([F.pdist(several).square().mean() / 2 for several in features]))
