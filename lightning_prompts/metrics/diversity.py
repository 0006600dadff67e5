"""How different from each other the pictures are that one prompt draws."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.metrics.clip import ClipMean


class Diversity(ClipMean):
    """Mean over prompts of the mean of one minus the cosine over all pairs of a prompt's pictures, by a CLIP's features.

    In [0, 2], and 0 when all pictures of each prompt are the same. Higher means that the seed decides more and the prompt less;
    which of them is better depends on what the prompt is for.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = None

    def update(self, pictures: Tensor) -> None:
        """Adds N pictures, two or more, of each of P prompts, (P, N, 3, H, W) in [-1, 1]."""
        if pictures.ndim != 5 or pictures.shape[1] < 2:
            raise ValueError(
                f"Diversity needs two or more pictures a prompt, (P, N, 3, H, W), not {(*pictures.shape,)}."
            )
        features = self.scorer.features(pictures.flatten(0, 1)).view(*pictures.shape[:2], -1)
        # Between unit vectors half the squared distance is one minus the cosine, and exactly 0 for equal ones.
        self.add(torch.stack([F.pdist(several).square().mean() / 2 for several in features]))
