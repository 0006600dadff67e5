"""Which words of a caption a prompt has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_STOP = frozenset("a an the of on at in over against with and to by for is are background picture photo image".split())


def all_words(text: str) -> list[str]:
    """Runs of letters and digits, with hyphens and apostrophes between them, in lower case."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def content_words(text: str) -> list[str]:
    """The words that carry content, in lower case."""
    return [word for word in all_words(text) if word not in _STOP]


class WordRecall(Metric):
    """Share of the caption's content words, or synonyms of them, that the prompt has; in [0, 1], higher is better.

    Args:
        synonyms: Words that count as each other: a word and its synonyms, in lower case.
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
        """Adds prompts and the captions of their targets."""
        for prompt, caption in zip(prompts, captions, strict=True):
            said, wanted = set(content_words(prompt)), content_words(caption)
            self.found += sum(bool(said & self.groups.get(word, frozenset([word]))) for word in wanted)
            self.count += len(wanted)

    def compute(self) -> Tensor:
        """The share over all captions."""
        return self.found / self.count.clamp(min=1)
