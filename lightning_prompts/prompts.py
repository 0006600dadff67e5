"""What trains: the prompts, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prompts.backbones import Vocabulary
from lightning_prompts.embeddings import slerp
from lightning_prompts.errors import UserError
from lightning_prompts.substitutes.space import Part, Space
from lightning_prompts.typed_module import TypedModule
from lightning_prompts.vocabulary import (
    LARGEST,
    Metric,
    decode,
    fill_template,
    nearest_tokens,
    template_ids,
    token_lists,
)


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


class PromptEmbeds(TypedModule):
    """Encoded prompts (P, S, R, D) of P problems: S is 1 for what the denoiser is told, 2 with what it is led away from.

    Args:
        moving: Gives which rows of encoded prompts change, (R,) bool.
        one_row: These are one row, repeated; it starts as the last of them that is not zeros.
    """

    initial: Tensor
    moving: Tensor

    def __init__(self, moving: Callable[[Tensor], Tensor], one_row: bool = False) -> None:
        super().__init__()
        self.one_row, self.which = one_row, moving
        self.register_buffer("moving", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("initial", torch.empty(0, 1, 1, 0), persistent=False)
        self.rows = nn.Parameter(torch.empty(0, 1, 0, 0))  # (P, S, M, D) of the M moving rows, or (P, S, 1, D)

    def show(self, initial: Tensor) -> None:
        """Makes encoded prompts (P, S, R, D) those that the search starts from."""
        self.initial = initial.detach().float()
        self.moving = self.which(initial).nonzero().squeeze(1)

    @torch.no_grad()
    def start(self, first: Tensor) -> Tensor:
        """What trains, (Q, S, M, D), where it starts at encoded prompts (Q, S, R, D)."""
        rows = self.of(first.to(self.initial))
        if self.one_row:
            number = torch.arange(rows.shape[2], device=rows.device)
            last = (number * (rows != 0).any(3)).argmax(2)[..., None, None]
            rows = rows.gather(2, last.expand(-1, -1, 1, rows.shape[3]))
        return rows

    def of(self, embeds: Tensor) -> Tensor:
        """The moving rows (..., M, D) of encoded prompts (..., R, D)."""
        return embeds.index_select(-2, self.moving)

    def sound(self) -> Tensor:
        """Which problems' embeddings are finite, (P,)."""
        return self.rows.detach().isfinite().flatten(1).all(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Encoded prompts (Q, S, R, D) of the problems `rows` (Q,)."""
        moved = self.rows[rows].expand(-1, -1, len(self.moving), -1)
        return self.initial[rows].index_copy(2, self.moving, moved)


class PromptArc(TypedModule):
    """Encoded prompts (P, 1, R, D) on the arc from P prompts to another one; how far each is, is all that trains.

    Args:
        start: The logistic function of it is the place on the arc to start from, 0 for the prompt and 1 for the other.
    """

    initial: Tensor
    other: Tensor

    def __init__(self, start: float = -5.0) -> None:
        super().__init__()
        self.near = start
        for name in ("initial", "other"):
            self.register_buffer(name, torch.empty(0, 1, 1, 0), persistent=False)
        self.place = nn.Parameter(torch.empty(0, 1, 1, 1))

    def show(self, initial: Tensor) -> None:
        """Makes encoded prompts (P, 1, R, D) those that the search starts from."""
        self.initial = initial.detach().float()

    def start(self, first: Tensor) -> Tensor:
        """What trains, (Q, 1, 1, 1), where it starts: near the prompts."""
        return torch.full((len(first), 1, 1, 1), self.near, device=self.initial.device)

    def sound(self) -> Tensor:
        """Which problems' places are finite, (P,)."""
        return self.place.detach().isfinite().flatten(1).all(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Encoded prompts (Q, 1, R, D) of the problems `rows` (Q,)."""
        return slerp(self.initial[rows], self.other.expand(len(rows), -1, -1, -1), self.place[rows].sigmoid())


class MixedPrompts(NamedTuple):
    """Prompts in which mixtures of words stand; what `Backbone.encode` takes.

    Attributes:
        ids: Token ids of the words drawn, (Q, L).
        embeddings: Embeddings, (Q, L, D); with one-hot weights those of the words drawn.
        texts: The Q texts of the words drawn, for text encoders that are not searched.
    """

    ids: Tensor
    embeddings: Tensor
    texts: list[str]


class WordChoices(TypedModule):
    """For each of P problems a word to choose for each of S slots, as logits (P, S, W); W is that of the longest slot.

    Args:
        vocabulary: The vocabulary that the words' tokens are of.
    """

    table: Tensor

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("table", vocabulary.table, persistent=False)
        self.logits = nn.Parameter(torch.empty(0, 0, 0))
        self.show([])

    def show(self, spaces: Sequence[Space]) -> None:
        """Makes the spaces those that the logits choose from."""
        self.spaces = list(spaces)
        self.word_ids = [[self.vocabulary.token_lists(slot.words) for slot in space.slots] for space in spaces]
        slots = max((len(space.slots) for space in spaces), default=0)
        words = max((len(slot.words) for space in spaces for slot in space.slots), default=0)
        self.counts = torch.full((len(spaces), slots, words), -1)  # tokens of each word, -1 where there is none
        for p, row in enumerate(self.word_ids):
            for s, ids in enumerate(row):
                self.counts[p, s, : len(ids)] = torch.tensor([len(word) for word in ids])

    def start(self, unchanged: float | None = None) -> Tensor:
        """Logits (P, S, W) of 0, and `initial` for what stands in each slot before the search."""
        logits = torch.zeros(self.counts.shape, device=self.table.device)
        if logits.numel():
            logits[:, :, 0] = self.initial(unchanged).to(logits)
        return logits

    def initial(self, unchanged: float | None = None) -> Tensor:
        """Logits (P, S) of what stands in each slot before the search.

        Args:
            unchanged: Chance, in (0, 1), that a draw leaves a slot as it is. None: the logit is 1, as in the paper, whatever the
                chance is with so many words.
        """
        others = ((self.counts >= 0).sum(2) - 1).clamp(min=1)
        return torch.ones(others.shape) if unchanged is None else (others * unchanged / (1 - unchanged)).log()

    def sound(self) -> Tensor:
        """Which problems' logits are finite, (P,)."""
        return self.logits.detach().isfinite().flatten(1).all(1)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, without start and end."""
        return token_lists(self.vocabulary.tokenizer, [text])[0]

    def perturbed(self, rows: Tensor, gumbel: Tensor) -> Tensor:
        """Logits (Q, S, W) of some problems, plus noise (Q, S, W); minus infinity where there is no word."""
        absent = (self.counts[rows] < 0).to(self.logits.device)
        return (self.logits[rows.to(self.logits.device)] + gumbel).masked_fill(absent, -torch.inf)

    def forward(self, rows: Tensor, gumbel: Tensor, temperature: float = 1.0) -> list[MixedPrompts]:
        """Mixes the embeddings of the words of each slot by their Gumbel-softmax weights (arXiv 2407.01606, section 3.2).

        A slot's words can have different numbers of tokens. The word with the highest perturbed logit, which is a draw from the
        softmax, decides the number; only words of that many tokens are mixed.

        Args:
            rows: Numbers of the problems, (Q,).
            gumbel: Standard Gumbel noise, (Q, S, W).
            temperature: Of the softmax.

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
        """Ids (L,) and embeddings (L, D) of a text whose slots are mixtures by weights (S, W)."""
        ids = self.vocabulary.encode_text(["".join(part.text for part in parts)])[0]
        ids, place = ids.to(self.table.device), self.vocabulary.first
        embeddings = self.table[ids].to(self.logits.dtype)
        for part in parts:
            if part.slot is None:
                place += len(self.tokens(part.text))
                continue
            words = word_ids[part.slot]
            count = len(words[choice[part.slot]])
            alike = [i for i, word in enumerate(words) if len(word) == count]
            table = self.table[torch.tensor([words[i] for i in alike], device=ids.device)]  # (A, T, D)
            mixed = torch.einsum("a,atd->td", weights[part.slot, alike], table.to(weights))
            embeddings = embeddings.index_copy(0, torch.arange(place, place + count, device=ids.device), mixed)
            place += count
        return ids, embeddings
