"""Semantic similarity of prompts, by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.hub import hub_access
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.objectives.clip import ClipSimilarity

ROUNDING = 1e-6  # of a cosine, so that a text is as similar to itself as any threshold asks


@dataclass(frozen=True)
class Similarity:
    """Set how similar in meaning the new prompt must be to the user's.

    Args:
        threshold: Minimum cosine of the two in the sentence encoder; -1 for any.
        encoder: Folder or hub id of a sentence-transformers model; None for the text encoder of the CLIP that scores.
    """

    threshold: float = 0.9
    encoder: str | None = None

    def __post_init__(self) -> None:
        """Refuse a threshold that is not a cosine."""
        if not -1 <= self.threshold <= 1:
            raise UserError(f"--model.similarity.threshold must be between -1 and 1, got {self.threshold:g}.")


class SemanticSimilarity:
    """The cosine of texts in a sentence encoder, and whether it reaches a threshold.

    Args:
        clip: Its text encoder is the sentence encoder, unless the settings name one.
        settings: The threshold and the sentence encoder.
        offline: Do not connect to the hub.

    Raises:
        UserError: sentence-transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, clip: ClipSimilarity, settings: Similarity = Similarity(), offline: bool = False) -> None:
        self.clip, self.threshold = clip, settings.threshold
        self.encoder = None if settings.encoder is None else _load(settings.encoder, offline)

    def reaches(self, text: str, others: Sequence[str]) -> list[bool]:
        """Return which of B other texts are similar enough to a text."""
        if all(other == text for other in others):
            return [True] * len(others)
        return (self(text, others) >= self.threshold - ROUNDING).tolist()

    def __call__(self, text: str, others: Sequence[str]) -> Tensor:
        """Compute the cosines (B,) in [-1, 1] of a text and B others.

        The texts are encoded together and not cached, since a cache would differ after resuming and rounding depends on
        the batch.
        """
        texts = list(dict.fromkeys([text, *others]))
        rows = dict(zip(texts, self._encode(texts).cpu(), strict=True))
        cosines: Tensor = (torch.stack([rows[other] for other in others]) * rows[text]).sum(1)
        return cosines

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        # The search's precision must not change which texts reach the threshold.
        with torch.autocast(self.clip.clip.device.type, enabled=False):
            if self.encoder is None:
                return self.clip.features_of(texts)
            rows = self.encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
            return F.normalize(rows.float(), dim=1)


def _load(name: str, offline: bool) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "--model.similarity.encoder needs sentence-transformers; run `pip install sentence-transformers`, or leave "
            "it out."
        ) from error
    try:
        with hub_access(offline):
            return SentenceTransformer(name, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The sentence encoder {name!r} cannot be loaded; give a folder or hub id of a sentence-transformers model."
        ) from error


def filter_by_similarity(space: Space, similarity: SemanticSimilarity) -> Space:
    """Remove the words that, replaced alone, change the meaning of the prompt.

    Raises:
        UserError: No word is left.
    """
    prompt, slots = space.texts([0] * len(space.slots))[0], []
    for number, slot in enumerate(space.slots):
        similar = similarity.reaches(prompt, [space.texts(choice)[0] for choice in space.single_changes(number)])
        slots.append(Slot(slot.name, tuple(word for i, word in enumerate(slot.words) if i == 0 or similar[i])))
    smaller = space.with_slots(slots)
    if not smaller.slots:
        raise UserError(
            f"No replacement of a word keeps the meaning of {prompt!r} at a cosine of {similarity.threshold:g}; lower "
            "--model.similarity.threshold or name other sources as --model.positive."
        )
    return smaller
