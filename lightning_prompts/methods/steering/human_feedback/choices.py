"""What is shown to whoever chooses, what they can answer, and a chooser for studies who wants a picture."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.errors import UserError
from lightning_prompts.objectives.clip import ClipSimilarity, default_clip

Action = Literal["go", "others", "undo", "finish"]


@dataclass(frozen=True)
class Round:
    """One question: where to go from here.

    Attributes:
        prompt: The person's prompt.
        pictures: What is drawn at the prompt, after each of H moves, and so here: H + 1 pictures (3, H, W) in [-1, 1].
        texts: The C candidates' texts.
        trail: Where these pictures are on the map, (H + 1, 2).
        ends: Where the C candidates are on it, (C, 2).
        draw: Draws a candidate at a strength between 0, which is here, and 1, from the noise of the other pictures.
        stopped: Whether the run has been told to stop.
    """

    prompt: str
    pictures: list[Tensor]
    texts: list[str]
    trail: Tensor
    ends: Tensor
    draw: Callable[[int, float], Tensor]
    stopped: Callable[[], bool]


@dataclass(frozen=True)
class Choice:
    """An answer.

    Attributes:
        action: Go to a candidate, see other candidates, take the last move back, or finish.
        candidate: Its number, from 0.
        strength: How far to go, from 0 to 1.
    """

    action: Action
    candidate: int = 0
    strength: float = 1.0


def checked_choice(choice: object, candidates: int) -> Choice:
    """Check an answer, which a function of the user may have given.

    Args:
        choice: The answer.
        candidates: Number of candidates of the round.

    Raises:
        UserError: It is no choice, or not one of this round.
    """
    if not isinstance(choice, Choice):
        raise UserError(f"An answer must be a Choice, got {choice!r:.40}; return such as Choice('go', 0, 0.5).")
    if choice.action not in get_args(Action):
        raise UserError(f"A Choice's action must be one of {', '.join(get_args(Action))}, got {choice.action!r:.40}.")
    number, strength = choice.candidate, choice.strength
    if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= number < candidates:
        raise UserError(f"A Choice's candidate must be a whole number from 0 to {candidates - 1}, got {number!r:.40}.")
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise UserError(f"A Choice's strength must be a number from 0 to 1, got {strength!r:.40}.")
    return Choice(choice.action, int(number), float(strength))  # NumPy's numbers cannot be recorded


class Chooser(ABC):
    """A source of choices."""

    @abstractmethod
    def open(self, backbone: Backbone, offline: bool) -> None:
        """Prepares, before the search."""

    @abstractmethod
    def choose(self, question: Round) -> Choice | None:
        """Answers, however long it takes; None when the run has been told to stop meanwhile."""

    @abstractmethod
    def close(self, last_words: str) -> None:
        """Ends, after the search."""


class Scripted(Chooser):
    """Wants a picture, and goes to what looks most like it; for tests and studies.

    How much it likes a picture is the cosine to the wanted one, by the CLIP that goes with the backbone, less half of their mean
    squared difference: a CLIP alone is pleased by pictures that a person is not.

    Args:
        wants: The picture's file.
        strengths: How far it tries to go to the candidate that it likes most. If it likes where it is more, it asks for others.
        clip: Folder or hub id of another CLIP.
    """

    def __init__(self, wants: str, strengths: Sequence[float] = (1.0,), clip: str | None = None) -> None:
        if not strengths or not all(0 < strength <= 1 for strength in strengths):
            raise UserError(
                f"The chooser's strengths are between 0 and 1, not {list(strengths)}; give such as [0.5, 1.0]."
            )
        if not os.path.isfile(wants):  # before a model is loaded
            raise UserError(f"There is no file {wants!r} that the chooser could want; check the path of the picture.")
        self.wants, self.strengths, self.clip_name = wants, list(strengths), clip

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Looks at the wanted picture."""
        self.clip = ClipSimilarity(self.clip_name or default_clip(backbone), offline)
        self.wanted = to_tensor(load_image(self.wants, backbone.image_size))

    @torch.no_grad()
    def likes(self, pictures: Sequence[Tensor]) -> Tensor:
        """How much it likes B pictures (3, H, W) in [-1, 1], (B,); at most 1."""
        seen = torch.stack([self.wanted, *pictures])
        features = self.clip.features(seen).cpu()
        return features[1:] @ features[0] - 0.5 * (seen[1:] - seen[0]).square().flatten(1).mean(1)

    def choose(self, question: Round) -> Choice | None:
        """Goes to the most similar."""
        seen = self.likes([question.pictures[-1], *(question.draw(i, 1.0) for i in range(len(question.ends)))])
        best = int(seen[1:].argmax())
        tried = self.likes([question.draw(best, strength) for strength in self.strengths])
        if tried.max() <= seen[0]:
            return Choice("others")
        return Choice("go", best, self.strengths[int(tried.argmax())])

    def close(self, last_words: str) -> None:
        """Has nothing to end."""
