"""Rounds, choices and choosers of human feedback, with a scripted chooser for studies."""

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

Action = Literal["move", "others", "undo", "finish"]


@dataclass(frozen=True)
class Round:
    """One question to the user: which candidate to move to.

    Attributes:
        prompt: The user's prompt.
        images: Images of the prompt and after each of K moves: K + 1 images (3, H, W) in [-1, 1], the last one is the
            current one.
        texts: The texts of the C candidates.
        positions: Positions of these images on the map, (K + 1, 2).
        candidate_positions: Positions of the C candidates on the map, (C, 2).
        generate: Generates the image of a candidate, given its index and a strength from 0, the current image, to 1,
            from the noise of the other images.
        stopped: Returns whether the run is stopping.
    """

    prompt: str
    images: list[Tensor]
    texts: list[str]
    positions: Tensor
    candidate_positions: Tensor
    generate: Callable[[int, float], Tensor]
    stopped: Callable[[], bool]


@dataclass(frozen=True)
class Choice:
    """The answer to a round.

    Attributes:
        action: Move to a candidate (`move`), show other candidates, undo the last move, or finish.
        candidate: Index of the candidate.
        strength: How far to move, from 0 to 1.
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
        UserError: The answer is not a choice of this round.
    """
    if not isinstance(choice, Choice):
        raise UserError(f"An answer must be a Choice, got {choice!r:.40}; return for example Choice('move', 0, 0.5).")
    if choice.action not in get_args(Action):
        raise UserError(f"A Choice's action must be one of {', '.join(get_args(Action))}, got {choice.action!r:.40}.")
    number, strength = choice.candidate, choice.strength
    if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= number < candidates:
        raise UserError(f"A Choice's candidate must be a whole number from 0 to {candidates - 1}, got {number!r:.40}.")
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise UserError(f"A Choice's strength must be a number from 0 to 1, got {strength!r:.40}.")
    return Choice(choice.action, int(number), float(strength))  # NumPy numbers cannot be written to a record


class Chooser(ABC):
    """A source of choices."""

    @abstractmethod
    def open(self, backbone: Backbone, offline: bool) -> None:
        """Prepare before the search."""

    @abstractmethod
    def choose(self, question: Round) -> Choice | None:
        """Return the answer, however long it takes; None if the run is stopping."""

    @abstractmethod
    def close(self, message: str) -> None:
        """Close after the search, with a message about how it ended."""


class Scripted(Chooser):
    """Choose the candidate that is most similar to a wanted image, for tests and studies.

    The similarity is the cosine in the CLIP that goes with the backbone, minus half of the mean squared error, since
    images that a CLIP finds similar do not always look similar to a user.

    Args:
        wants: File of the wanted image.
        strengths: Strengths to try for the most similar candidate. If the current image is more similar, the choice is
            `others`.
        clip: Folder or hub id of another CLIP.
    """

    def __init__(self, wants: str, strengths: Sequence[float] = (1.0,), clip: str | None = None) -> None:
        if not strengths or not all(0 < strength <= 1 for strength in strengths):
            raise UserError(
                f"--model.chooser.strengths must be above 0 and at most 1, got {list(strengths)}; give for "
                "example [0.5, 1.0]."
            )
        if not os.path.isfile(wants):  # before a model is loaded
            raise UserError(
                f"--model.chooser.wants must be an image file, got {wants!r}, which does not exist; check the path."
            )
        self.wants, self.strengths, self.clip_name = wants, list(strengths), clip

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Load the wanted image."""
        self.clip = ClipSimilarity(self.clip_name or default_clip(backbone), offline)
        self.wanted = to_tensor(load_image(self.wants, backbone.image_size))

    @torch.no_grad()
    def similarities(self, images: Sequence[Tensor]) -> Tensor:
        """Compute the similarities (B,), at most 1, of B images (3, H, W) in [-1, 1] to the wanted one."""
        together = torch.stack([self.wanted, *images])
        features = self.clip.features(together).cpu()
        return features[1:] @ features[0] - 0.5 * (together[1:] - together[0]).square().flatten(1).mean(1)

    def choose(self, question: Round) -> Choice | None:
        """Choose the most similar candidate."""
        candidates = [question.generate(i, 1.0) for i in range(len(question.texts))]
        current, *others = self.similarities([question.images[-1], *candidates])
        best = int(torch.stack(others).argmax())
        tried = self.similarities([question.generate(best, strength) for strength in self.strengths])
        if tried.max() <= current:
            return Choice("others")
        return Choice("move", best, self.strengths[int(tried.argmax())])

    def close(self, message: str) -> None:
        """Do nothing: a script shows no message."""
