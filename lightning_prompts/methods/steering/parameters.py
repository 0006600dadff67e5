"""Encoded prompts of steering methods: the parameter that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_prompts.embeddings import slerp
from lightning_prompts.typed_module import TypedModule


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

    def is_finite(self) -> Tensor:
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

    def is_finite(self) -> Tensor:
        """Which problems' places are finite, (P,)."""
        return self.place.detach().isfinite().flatten(1).all(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Encoded prompts (Q, 1, R, D) of the problems `rows` (Q,)."""
        return slerp(self.initial[rows], self.other.expand(len(rows), -1, -1, -1), self.place[rows].sigmoid())
