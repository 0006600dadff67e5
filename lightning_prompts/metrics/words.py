"""Recall of a caption's words in a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_STOP = frozenset("a an the of on at in over against with and to by for is are background picture photo image".split())


def all_words(text: str) -> list[str]:
    """Return the words of a text in lower case: letters and digits, with hyphens and apostrophes inside."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def content_words(text: str) -> list[str]:
    """Return the words of a text without stop words, in lower case."""
    return [word for word in all_words(text) if word not in _STOP]


class WordRecall(Metric):
    """Share of a caption's content words, or synonyms of them, in the prompt; in [0, 1], higher is better.

    Args:
        synonyms: The synonyms of each word, in lower case.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: Tensor
    count: Tensor

    def __init__(self, synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__()
        self.groups: dict[str, frozenset[str]] = {}
        for word, others in (synonyms or {}).items():
            for member in (word, *others):
                self.groups[member] = self.groups.get(member, frozenset()) | {word, *others}
        self.add_state("found", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[str], captions: Sequence[str]) -> None:
        """Add prompts and the captions of their targets."""
        for prompt, caption in zip(prompts, captions, strict=True):
            in_prompt, in_caption = set(content_words(prompt)), content_words(caption)
            self.found += sum(bool(in_prompt & self.groups.get(word, frozenset([word]))) for word in in_caption)
            self.count += len(in_caption)

    def compute(self) -> Tensor:
        """Return the share over all captions, 0 without words."""
        return self.found / self.count.clamp(min=1)
