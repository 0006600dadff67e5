"""Encoded prompts of steering methods: the parameter that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_prompts.embeddings import slerp
from lightning_prompts.typed_module import TypedModule


class PromptEmbeds(TypedModule):
    """Encoded prompts (P, S, R, D) of P problems: S is 1 for `prompt_embeds` alone, 2 with `negative_prompt_embeds`.

    Args:
        moving: Returns the rows of encoded prompts that may change, (R,) bool.
        one_row: Repeat one row in place of these; it is initialized with the last of them that is not zero.
    """

    initial: Tensor
    moving: Tensor

    def __init__(self, moving: Callable[[Tensor], Tensor], one_row: bool = False) -> None:
        super().__init__()
        self.one_row, self.which = one_row, moving
        self.register_buffer("moving", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("initial", torch.empty(0, 1, 1, 0), persistent=False)
        self.rows = nn.Parameter(
            torch.empty(0, 1, 0, 0)
        )  # the M moving rows (P, S, M, D), or (P, S, 1, D) with `one_row`

    def set_initial(self, initial: Tensor) -> None:
        """Set the users' encoded prompts, (P, S, R, D)."""
        self.initial = initial.detach().float()
        self.moving = self.which(initial).nonzero().squeeze(1)

    @torch.no_grad()
    def init_params(self, embeds: Tensor) -> Tensor:
        """Return the parameters (Q, S, M, D) for encoded prompts (Q, S, R, D)."""
        rows = self.moving_rows(embeds.to(self.initial))
        if self.one_row:
            number = torch.arange(rows.shape[2], device=rows.device)
            last = (number * (rows != 0).any(3)).argmax(2)[..., None, None]
            rows = rows.gather(2, last.expand(-1, -1, 1, rows.shape[3]))
        return rows

    def moving_rows(self, embeds: Tensor) -> Tensor:
        """Return the moving rows (..., M, D) of encoded prompts (..., R, D)."""
        return embeds.index_select(-2, self.moving)

    def is_finite(self) -> Tensor:
        """Return which problems' embeddings are finite, (P,)."""
        return self.rows.detach().isfinite().flatten(1).all(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the encoded prompts (Q, S, R, D) of the problems `rows` (Q,)."""
        moving = self.rows[rows].expand(-1, -1, len(self.moving), -1)
        return self.initial[rows].index_copy(2, self.moving, moving)


class PromptArc(TypedModule):
    """Encoded prompts (P, 1, R, D) on the arc from P prompts to another one; only the position on the arc trains.

    Args:
        initial_logit: Logit of the initial position, from 0 for the prompt to 1 for the other one.
    """

    initial: Tensor
    other: Tensor

    def __init__(self, initial_logit: float = -5.0) -> None:
        super().__init__()
        self.initial_logit = initial_logit
        for name in ("initial", "other"):
            self.register_buffer(name, torch.empty(0, 1, 1, 0), persistent=False)
        self.place = nn.Parameter(torch.empty(0, 1, 1, 1))  # logits of the positions

    def set_initial(self, initial: Tensor) -> None:
        """Set the users' encoded prompts, (P, 1, R, D)."""
        self.initial = initial.detach().float()

    def init_params(self, embeds: Tensor) -> Tensor:
        """Return the initial parameters (Q, 1, 1, 1), near the start of the arc, for encoded prompts (Q, 1, R, D)."""
        return torch.full((len(embeds), 1, 1, 1), self.initial_logit, device=self.initial.device)

    def is_finite(self) -> Tensor:
        """Return which problems' positions are finite, (P,)."""
        return self.place.detach().isfinite().flatten(1).all(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the encoded prompts (Q, 1, R, D) of the problems `rows` (Q,)."""
        return slerp(self.initial[rows], self.other.expand(len(rows), -1, -1, -1), self.place[rows].sigmoid())
