"""CLIP similarity of images to images and to texts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.metrics.mean import Mean
from lightning_prompts.objectives.clip import ClipSimilarity


class ClipMean(Mean):
    """The base class of means over CLIP features.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    def __init__(self, clip: str | ClipSimilarity, offline: bool = False) -> None:
        super().__init__()
        self.scorer = clip if isinstance(clip, ClipSimilarity) else ClipSimilarity(clip, offline)


class ClipImageSimilarity(ClipMean):
    """Mean cosine between the CLIP features of generated images and of their targets, in [-1, 1]; higher is better.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = True

    def update(self, images: Tensor, targets: Tensor) -> None:
        """Add all pairs of generated images (B, 3, H, W) and target images (I, 3, H, W), both in [-1, 1]."""
        self.add(self.scorer.features(images) @ self.scorer.features(targets).T)


class ClipTextSimilarity(ClipMean):
    """Mean cosine between the CLIP features of images and of their texts, in [-1, 1]; higher is better.

    Texts longer than the CLIP's context are truncated.

    Args:
        clip: Folder or hub id of a CLIPModel with its tokenizer, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = True

    def update(self, images: Tensor, texts: Sequence[str]) -> None:
        """Add images (B, 3, H, W) in [-1, 1] and their B texts."""
        if len(images) != len(texts):
            raise ValueError(f"There are {len(images)} images and {len(texts)} texts; give each image its text.")
        features = self.scorer.features_of(texts)
        self.add((self.scorer.features(images) * features).sum(1))
