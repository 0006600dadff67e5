"""Logits over the words of each slot: the parameter that trains in DPO-Diff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prompts.backbones import Vocabulary
from lightning_prompts.backbones.vocabulary import token_lists
from lightning_prompts.methods.dpo_diff.space import Part, Space
from lightning_prompts.typed_module import TypedModule


class MixedPrompts(NamedTuple):
    """Prompts whose slots hold mixtures of words, as `Backbone.encode` takes them.

    Attributes:
        ids: Token ids of the drawn words, (Q, L).
        embeddings: Embeddings, (Q, L, D); with one-hot weights those of the drawn words.
        texts: Q texts of the drawn words, for text encoders that are not searched.
    """

    ids: Tensor
    embeddings: Tensor
    texts: list[str]


class WordChoices(TypedModule):
    """Logits (P, S, W) over the words of each of S slots of P problems; W is the size of the largest slot.

    Args:
        vocabulary: The vocabulary of the words' tokens.
    """

    table: Tensor

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("table", vocabulary.table, persistent=False)
        self.logits = nn.Parameter(torch.empty(0, 0, 0))
        self.set_spaces([])

    def set_spaces(self, spaces: Sequence[Space]) -> None:
        """Set the spaces that the logits choose from, one per problem."""
        self.spaces = list(spaces)
        self.word_ids = [[self.vocabulary.token_lists(slot.words) for slot in space.slots] for space in spaces]
        slots = max((len(space.slots) for space in spaces), default=0)
        words = max((len(slot.words) for space in spaces for slot in space.slots), default=0)
        self.counts = torch.full((len(spaces), slots, words), -1)  # tokens of each word, -1 where there is none
        for p, row in enumerate(self.word_ids):
            for s, ids in enumerate(row):
                self.counts[p, s, : len(ids)] = torch.tensor([len(word) for word in ids])

    def init_logits(self, unchanged: float | None = None) -> Tensor:
        """Return initial logits (P, S, W): 0 except for each slot's first word, which leaves the prompt unchanged.

        Args:
            unchanged: Probability, in (0, 1), that a draw leaves a slot as it is. None: the first word's logit is 1, as
                in the paper.
        """
        logits = torch.zeros(self.counts.shape, device=self.table.device)
        if logits.numel():
            logits[:, :, 0] = self._first_logits(unchanged).to(logits)
        return logits

    def _first_logits(self, unchanged: float | None) -> Tensor:
        """Return the initial logits (P, S) of the first words; see `init_logits`."""
        others = ((self.counts >= 0).sum(2) - 1).clamp(min=1)
        return torch.ones(others.shape) if unchanged is None else (others * unchanged / (1 - unchanged)).log()

    def is_finite(self) -> Tensor:
        """Return which problems' logits are finite, (P,)."""
        return self.logits.detach().isfinite().flatten(1).all(1)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a piece of text, without start and end tokens."""
        return token_lists(self.vocabulary.tokenizer, [text])[0]

    def perturbed(self, rows: Tensor, gumbel: Tensor) -> Tensor:
        """Add noise (Q, S, W) to the logits (Q, S, W) of `rows` (Q,), which are minus infinity without a word."""
        absent = (self.counts[rows] < 0).to(self.logits.device)
        return (self.logits[rows.to(self.logits.device)] + gumbel).masked_fill(absent, -torch.inf)

    def forward(self, rows: Tensor, gumbel: Tensor, temperature: float = 1.0) -> list[MixedPrompts]:
        """Mix the embeddings of the words of each slot by their Gumbel-softmax weights (arXiv 2407.01606, section 3.2).

        A slot's words can have different numbers of tokens. Only words with as many tokens as the word with the highest
        perturbed logit, which is a draw from the softmax, are mixed.

        Args:
            rows: Rows of the problems, (Q,).
            gumbel: Standard Gumbel noise, (Q, S, W).
            temperature: Temperature of the softmax.

        Returns:
            The Q positive prompts, then the negative ones.
        """
        perturbed = self.perturbed(rows, gumbel)
        drawn, counts = perturbed.argmax(2).cpu(), self.counts[rows]
        same = (counts == counts.gather(2, drawn.unsqueeze(2))).to(perturbed.device)
        weights = (perturbed / temperature).masked_fill(~same, -torch.inf).softmax(2)
        tokens: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        texts = []
        for q, row in enumerate(rows.tolist()):
            space = self.spaces[row]
            choice = drawn[q, : len(space.slots)].tolist()
            texts.append(space.texts(choice))
            for side, parts in zip(tokens, space.parts(choice), strict=True):
                side.append(self._mixed(self.word_ids[row], parts, choice, weights[q]))
        return [
            MixedPrompts(
                torch.stack([ids for ids, _ in side]), torch.stack([embeddings for _, embeddings in side]), list(read)
            )
            for side, read in zip(tokens, zip(*texts, strict=True), strict=True)
        ]

    def _mixed(
        self, word_ids: Sequence[Sequence[Sequence[int]]], parts: Sequence[Part], choice: Sequence[int], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the ids (L,) and embeddings (L, D) of a text whose slots are mixtures with weights (S, W)."""
        ids = self.vocabulary.encode_text(["".join(part.text for part in parts)])[0]
        ids, position = ids.to(self.table.device), self.vocabulary.first
        embeddings = self.table[ids].to(self.logits.dtype)
        for part in parts:
            if part.slot is None:
                position += len(self.tokens(part.text))
                continue
            words = word_ids[part.slot]
            count = len(words[choice[part.slot]])
            alike = [i for i, word in enumerate(words) if len(word) == count]
            table = self.table[torch.tensor([words[i] for i in alike], device=ids.device)]  # (A, T, D)
            mixed = torch.einsum("a,atd->td", weights[part.slot, alike], table.to(weights))
            embeddings = embeddings.index_copy(0, torch.arange(position, position + count, device=ids.device), mixed)
            position += count
        return ids, embeddings
