"""Token embeddings of inversion methods: the parameter that trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prompts.backbones import Vocabulary
from lightning_prompts.backbones.vocabulary import (
    LARGEST,
    Metric,
    contains_blocked,
    decode,
    fill_template,
    nearest_tokens,
    round_trip,
    template_ids,
)
from lightning_prompts.errors import UserError
from lightning_prompts.typed_module import TypedModule


class DecodedPrompt(NamedTuple):
    """A prompt as text, with its tokens or, for methods without readable text, its embeddings.

    Attributes:
        prompt: The text.
        token_ids: Its M tokens.
        embedding: Its embeddings, (M, D).
        valid: Whether the text encodes to the same tokens and has no blocked word.
    """

    prompt: str
    token_ids: list[int] | None
    embedding: list[list[float]] | None
    valid: bool = True


class TokenEmbeddings(TypedModule):
    """M token embeddings for each of P problems, in a template of fixed tokens.

    Args:
        vocabulary: The searched vocabulary.
        template: Fixed words around the prompt, with `{}` in its place.
        tokens: M, the length of the prompt in tokens.
        blocked: Words, or parts of words, that no token may contain.
        words: The only words that may be used; None for the whole vocabulary.
        metric: Distance that decides which token is nearest to an embedding.
    """

    template: Tensor
    positions: Tensor
    table: Tensor
    allowed: Tensor

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: str = "{}",
        tokens: int = 8,
        blocked: tuple[str, ...] = (),
        words: tuple[str, ...] | None = None,
        metric: Metric = "euclidean",
    ) -> None:
        super().__init__()
        if tokens < 1:
            raise UserError(f"--model.num_tokens must be at least 1, got {tokens}.")
        ids, positions = template_ids(vocabulary.tokenizer, template, tokens, vocabulary.length, vocabulary.rows)
        self.vocabulary, self.words_around = vocabulary, template
        self.metric: Metric = metric
        self.blocked, self.listed = blocked, words is not None
        self.register_buffer("template", ids, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("table", vocabulary.table, persistent=False)
        self.register_buffer("allowed", vocabulary.allowed(blocked, words), persistent=False)
        self.some_token = int(self.allowed.int().argmax())
        self.embeddings = nn.Parameter(torch.empty(0, tokens, self.table.shape[1]))

    @torch.no_grad()
    def project(self) -> Tensor:
        """Return the ids of the nearest allowed tokens, (P, M)."""
        return nearest_tokens(self.embeddings, self.table, self.allowed, self.metric)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Return the nearest allowed tokens (Q, M) of `rows` (Q,); any tokens where embeddings are not finite."""
        finite = self.is_finite()[rows].view(-1, 1, 1)
        return nearest_tokens(self.embeddings[rows].where(finite, 0), self.table, self.allowed, self.metric)

    def is_finite(self) -> Tensor:
        """Return which problems' embeddings are finite and small enough to have a nearest token, (P,) bool."""
        finite: Tensor = (self.embeddings.detach().norm(dim=2) < LARGEST).all(dim=1)
        return finite

    def ids(self, token_ids: Tensor) -> Tensor:
        """Put prompts (P, m) of up to M tokens into the template: ids with start, end and padding, (P, L)."""
        used = token_ids.shape[1]
        ids = self.template.repeat(len(token_ids), 1)
        ids[:, self.positions[:used]] = token_ids
        if used == len(self.positions):
            return ids
        rest = self.positions[-1] + 1  # the tokens after a shorter prompt move up to it, and padding fills the end
        ends = self.positions[used]
        return torch.cat([ids[:, :ends], ids[:, rest:], ids[:, -1:].expand(-1, int(rest - ends))], dim=1)

    def texts(self, token_ids: Tensor) -> list[str]:
        """Decode prompts (P, m) to P texts in the template, as a user would paste them."""
        return [fill_template(self.words_around, text) for text in decode(self.vocabulary.tokenizer, token_ids)]

    def decode(self, token_ids: Tensor) -> list[DecodedPrompt]:
        """Decode prompts (P, M) to texts in the template, and check that these encode to the same tokens."""
        texts, survives = round_trip(self.vocabulary.tokenizer, token_ids)
        prompts = [fill_template(self.words_around, text) for text in texts]
        return [
            DecodedPrompt(prompt, ids, None, same and not contains_blocked(prompt, self.blocked))
            for prompt, ids, same in zip(prompts, token_ids.tolist(), survives.tolist(), strict=True)
        ]

    def forward(self, rows: Tensor, straight_through: bool = False) -> tuple[Tensor, Tensor]:
        """Return the input of the text encoder for the problems `rows` (Q,).

        Args:
            rows: Rows of the problems, (Q,).
            straight_through: Use the nearest tokens' embeddings and pass their gradient on to the continuous ones
                (PEZ).

        Returns:
            Ids (Q, L), with the nearest tokens if `straight_through` and otherwise any token, and embeddings (Q, L, D).
            The embeddings of a problem that is not finite are NaN, so that its loss and its gradient are too, and the
            others are not affected.
        """
        embeddings = self.embeddings[rows]
        finite = self.is_finite()[rows].view(-1, 1, 1)
        if straight_through:
            token_ids = self.nearest(rows)
            embeddings = self.table[token_ids] + embeddings - embeddings.detach()
        else:  # beside an embedding, an id only marks the position of a token
            token_ids = self.positions.new_full((len(rows), len(self.positions)), self.some_token)
        embeddings = embeddings.where(finite, torch.nan)
        ids = self.ids(token_ids)
        return ids, self.table[ids].index_copy(1, self.positions, embeddings.to(self.table.dtype))
