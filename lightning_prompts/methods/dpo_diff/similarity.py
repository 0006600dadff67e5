"""Whether other words keep the meaning of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.hub import hub_access
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.objectives.clip import ClipSimilarity

ROUNDING = 1e-6  # of a cosine, so that a text means the same as itself


class Meaning:
    """Likeness of texts in a sentence encoder.

    Args:
        clip: Its text tower is the encoder if no other is named.
        name: Folder or hub id of a sentence-transformers model.
        offline: Do not connect to the hub.

    Raises:
        UserError: sentence-transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, clip: ClipSimilarity, name: str | None = None, offline: bool = False) -> None:
        self.clip, self.name = clip, name
        self.encoder = None if name is None else _load(name, offline)

    def kept(self, text: str, others: Sequence[str], threshold: float) -> list[bool]:
        """Which of B other texts mean the same, at a cosine of at least a threshold."""
        if all(other == text for other in others):
            return [True] * len(others)
        return (self(text, others) >= threshold - ROUNDING).tolist()

    def __call__(self, text: str, others: Sequence[str]) -> Tensor:
        """Cosines (B,) in [-1, 1] of a text and B others.

        They are encoded together and not remembered: what an earlier call has encoded is not there when a search goes on.
        """
        texts = list(dict.fromkeys([text, *others]))
        rows = dict(zip(texts, self._encode(texts).cpu(), strict=True))
        cosines: Tensor = (torch.stack([rows[other] for other in others]) * rows[text]).sum(1)
        return cosines

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        # What passes the threshold does not depend on the search's precision.
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
            "A sentence encoder by name needs sentence-transformers; run `pip install sentence-transformers`, or leave "
            "--model.sentence_encoder out."
        ) from error
    try:
        with hub_access(offline):
            return SentenceTransformer(name, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The sentence encoder {name!r} cannot be loaded; give a folder or hub id of a sentence-transformers model."
        ) from error


def keeping(space: Space, meaning: Meaning, threshold: float) -> Space:
    """A space without the words that change the meaning of the prompt on their own.

    Raises:
        UserError: None is left.
    """
    prompt, slots = space.texts([0] * len(space.slots))[0], []
    for number, slot in enumerate(space.slots):
        kept = meaning.kept(prompt, [space.texts(choice)[0] for choice in space.alone(number)], threshold)
        slots.append(Slot(slot.name, tuple(word for i, word in enumerate(slot.words) if i == 0 or kept[i])))
    smaller = space.with_slots(slots)
    if not smaller.slots:
        raise UserError(
            f"No other word keeps the meaning of {prompt!r} at a cosine of {threshold:g}; lower --model.threshold or name other "
            "sources as --model.positive."
        )
    return smaller
