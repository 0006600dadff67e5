"""Token embeddings of inversion methods: the parameter that trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prompts.backbones import Vocabulary
from lightning_prompts.backbones.vocabulary import (
    LARGEST,
    Metric,
    decode,
    fill_template,
    nearest_tokens,
    template_ids,
)
from lightning_prompts.errors import UserError
from lightning_prompts.typed_module import TypedModule


class TokenEmbeddings(TypedModule):
    """M token embeddings for each of P problems, standing in a template of fixed tokens.

    Args:
        vocabulary: The vocabulary that is searched.
        template: Fixed words around the prompt, with `{}` where it goes.
        tokens: M, how many tokens the prompt has.
        blocked: Words, or parts of words, that no token may contain.
        words: The only words that may be used; None for the whole vocabulary.
        metric: Distance by which an embedding is replaced with a token.
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
            raise UserError(
                f"A prompt of {tokens} tokens was asked for; it needs at least one, so raise --model.tokens."
            )
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
        """Ids of the nearest allowed tokens, (P, M)."""
        return nearest_tokens(self.embeddings, self.table, self.allowed, self.metric)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Find the nearest allowed tokens (Q, M) of the problems `rows` (Q,); any where the embeddings are not finite."""
        sound = self.sound()[rows].view(-1, 1, 1)
        return nearest_tokens(self.embeddings[rows].where(sound, 0), self.table, self.allowed, self.metric)

    def sound(self) -> Tensor:
        """Which problems' embeddings are numbers that have a nearest token, (P,) bool."""
        sound: Tensor = (self.embeddings.detach().norm(dim=2) < LARGEST).all(dim=1)
        return sound

    def ids(self, token_ids: Tensor) -> Tensor:
        """Puts prompts (P, m) of up to M tokens into the template: ids with start, end and padding, (P, L)."""
        used = token_ids.shape[1]
        ids = self.template.repeat(len(token_ids), 1)
        ids[:, self.positions[:used]] = token_ids
        if used == len(self.positions):
            return ids
        rest = self.positions[-1] + 1  # what follows the prompt moves up to it; what it leaves behind it is padding
        ends = self.positions[used]
        return torch.cat([ids[:, :ends], ids[:, rest:], ids[:, -1:].expand(-1, int(rest - ends))], dim=1)

    def texts(self, token_ids: Tensor) -> list[str]:
        """Write prompts (P, m) as P texts in the template, as a user would paste them."""
        return [fill_template(self.words_around, text) for text in decode(self.vocabulary.tokenizer, token_ids)]

    def forward(self, rows: Tensor, straight_through: bool = False) -> tuple[Tensor, Tensor]:
        """What the text encoder is given for some of the problems.

        Args:
            rows: Numbers of the problems, (Q,).
            straight_through: Use the nearest tokens' embeddings and pass their gradient on to the continuous ones (PEZ).

        Returns:
            Ids (Q, L), those of the nearest tokens or, where none are asked for, of any; and embeddings (Q, L, D). Those of a
            problem that has left the numbers are not numbers, so that neither its loss nor its gradient is taken for one, and the other problems go on.
        """
        embeddings = self.embeddings[rows]
        sound = self.sound()[rows].view(-1, 1, 1)
        if straight_through:
            token_ids = self.nearest(rows)
            embeddings = self.table[token_ids] + embeddings - embeddings.detach()
        else:  # all that an id says beside an embedding is that a token stands there
            token_ids = self.positions.new_full((len(rows), len(self.positions)), self.some_token)
        embeddings = embeddings.where(sound, torch.nan)
        ids = self.ids(token_ids)
        return ids, self.table[ids].index_copy(1, self.positions, embeddings.to(self.table.dtype))
