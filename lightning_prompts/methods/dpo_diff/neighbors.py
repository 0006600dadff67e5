"""Words with similar token embeddings in the text encoder."""

from __future__ import annotations

import re

import torch
from torch.nn import functional as F

from lightning_prompts.backbones import Vocabulary


class Neighbors:
    """The nearest words of a word, by the cosine of token embeddings.

    Args:
        vocabulary: The searched vocabulary.
        count: Neighbors per word.
    """

    def __init__(self, vocabulary: Vocabulary, count: int = 5) -> None:
        self.vocabulary, self.count = vocabulary, count
        self.tokens = vocabulary.allowed().nonzero().squeeze(1).tolist()
        texts = [vocabulary.tokenizer.decode([token]).strip() for token in self.tokens]
        self.words = {
            text: token for text, token in zip(texts, self.tokens, strict=True) if re.fullmatch(r"[^\W\d_]{2,}", text)
        }

    @torch.no_grad()
    def __call__(self, word: str) -> list[str]:
        """Return the neighbors of a word, nearest first; a word of several tokens has their mean embedding."""
        (ids,) = self.vocabulary.token_lists([word])
        if not ids:
            return []
        table = F.normalize(self.vocabulary.table.float(), dim=1)
        names = [name for name in self.words if name != word.casefold()]
        rows = table[torch.tensor([self.words[name] for name in names], device=table.device)]
        cosines = rows @ F.normalize(table[ids].mean(0), dim=0)
        return [names[i] for i in cosines.topk(min(self.count, len(names))).indices.tolist()]
