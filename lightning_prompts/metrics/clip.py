"""Similarity of pictures to pictures and to texts by a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.metrics.mean import Mean
from lightning_prompts.objectives.clip import ClipSimilarity


class ClipMean(Mean):
    """What means of a CLIP's features have in common.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    def __init__(self, clip: str | ClipSimilarity, offline: bool = False) -> None:
        super().__init__()
        self.scorer = clip if isinstance(clip, ClipSimilarity) else ClipSimilarity(clip, offline)


class ClipImageSimilarity(ClipMean):
    """Mean cosine between the CLIP features of drawn pictures and of their targets, in [-1, 1]; higher is better.

    Args:
        clip: Folder or hub id of a CLIPModel, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = True

    def update(self, drawn: Tensor, targets: Tensor) -> None:
        """Adds all pairs of pictures (B, 3, H, W) and the targets (I, 3, H, W) they should look like, both in [-1, 1]."""
        self.add(self.scorer.features(drawn) @ self.scorer.features(targets).T)


class ClipTextSimilarity(ClipMean):
    """Mean cosine between the CLIP features of pictures and of their texts, in [-1, 1]; higher is better.

    Of a text that is longer than the CLIP takes, the beginning counts.

    Args:
        clip: Folder or hub id of a CLIPModel with its tokenizer, or one that is loaded.
        offline: Do not connect to the hub.
    """

    higher_is_better = True

    def update(self, pictures: Tensor, texts: Sequence[str]) -> None:
        """Adds pictures (B, 3, H, W) in [-1, 1] and their B texts."""
        if len(pictures) != len(texts):
            raise ValueError(f"There are {len(pictures)} pictures and {len(texts)} texts; give each picture its text.")
        features = self.scorer.features_of(texts)
        self.add((self.scorer.features(pictures) * features).sum(1))
