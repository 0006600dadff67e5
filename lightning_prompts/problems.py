"""The record of each problem: what is searched, and the best that was found for it so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from typing_extensions import TypedDict  # pydantic checks no others before Python 3.12

from lightning_prompts.files import finite

# "not improved" is finished, too, but the prompt is no better than the one that the search started from.
Status = Literal["open", "done", "not improved", "failed"]

MEASURED_ON_REQUEST = (  # in result.json only where there is a number
    *("clip_text_similarity", "diversity", "lpips"),
    *("word_recall", "dictionary_words", "special_characters", "perplexity"),
)


class Better(TypedDict):
    """A prompt that was the best when it was found."""

    unet_samples: int
    validation_loss: float
    prompt: str


class Candidate(TypedDict):
    """A prompt that was drawn and judged."""

    prompt: str
    negative_prompt: str
    choice: list[int]  # of each slot the word's number
    losses: list[float]  # what is minimised, by seed: of an attack the negative distances
    budget: float  # generations spent by then


class Move(TypedDict):
    """Where a person has gone: on the arc to a text."""

    text: str
    candidate: int  # its number in its round, from 0
    strength: float  # how far it went, 1 is all the way
    others: int  # rounds without a move before it


def unreadable_key(names: Sequence[str]) -> str:
    """Return the key of a problem that cannot be read, by its files or by the line of a list that names it."""
    canonical = json.dumps({"unreadable": list(names)}, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass
class Problem:
    """One independent problem and the best that was found for it so far. Losses are better lower, similarities higher."""

    key: str  # 16 hexadecimal digits, the hash of the content and of the settings that matter; names the record's file
    target: str  # what to show a person: a file name, a folder or a prompt
    paths: list[str] = field(default_factory=list)
    caption: str | None = None
    index: int = 0  # place among the inputs, which is the order of results
    status: Status = "open"
    reason: str | None = None  # one sentence, why it is "not improved" or "failed"
    prompt: str | None = None
    token_ids: list[int] | None = None
    embedding: list[list[float]] | None = None  # (M, D) of a prompt that is no text: what its pseudo-word stands for
    validation_loss: float | None = None
    initial_validation_loss: float | None = None  # of the prompt that the search started from
    clip_similarity: float | None = None
    heldout_clip_similarity: float | None = None  # by a CLIP that took no part in the search
    clip_text_similarity: float | None = None  # of the prompt and the target's pictures
    diversity: float | None = None  # of the pictures that the prompt draws
    lpips: float | None = None
    word_recall: float | None = None  # of the target's caption
    dictionary_words: float | None = None  # shares of the prompt's words and characters
    special_characters: float | None = None
    perplexity: float | None = None
    negative_prompt: str | None = None  # found by methods that search one
    words: list[list[str]] | None = None  # of each slot its name and what was chosen
    loss_before: list[float] | None = None  # of the person's prompt, by seed
    loss_after: list[float] | None = None
    fresh_loss_before: list[float] | None = None  # on seeds that the search has not seen
    fresh_loss_after: list[float] | None = None
    heldout_before: list[float] | None = (
        None  # similarity of fresh pictures and the person's prompt, by the held-out CLIP
    )
    heldout_after: list[float] | None = None
    target_seed: int | None = None  # whose picture is to come from every seed
    metric_before: list[float] | None = None  # of the person's prompt, by seed
    metric_after: list[float] | None = None
    fresh_metric_before: list[float] | None = None  # on seeds that the search has not seen
    fresh_metric_after: list[float] | None = None
    values_before: dict[str, list[float]] | None = None  # the same of each objective, watched ones too, by name
    values_after: dict[str, list[float]] | None = None
    fresh_values_before: dict[str, list[float]] | None = None
    fresh_values_after: dict[str, list[float]] | None = None
    moves: list[Move] = field(default_factory=list)  # of a person who chooses, oldest first
    others: int = 0  # rounds since then in which none of the candidates was liked
    budget: float | None = None  # generations that the search has spent
    similarity: float | None = None  # of the prompt to the person's, by the sentence encoder
    candidates: list[Candidate] = field(default_factory=list)  # evaluated, in their order
    unet_samples: int = 0  # forward and backward counted each
    seconds: float = 0.0
    history: list[Better] = field(default_factory=list)  # of the best prompt, oldest first
    stamps: list[str] = field(default_factory=list)  # of each file, by which it is known again without being read

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"The status {self.status!r} is unknown; use one of {get_args(Status)}.")

    @property
    def shown(self) -> str:
        """The prompt for a person's eyes, with the negative one if there is any."""
        return (self.prompt or "") + (f" | without {self.negative_prompt}" if self.negative_prompt else "")

    def keep(
        self, prompt: str, loss: float, token_ids: list[int] | None = None, embedding: list[list[float]] | None = None
    ) -> None:
        """Takes a better prompt."""
        self.prompt, self.validation_loss, self.token_ids, self.embedding = prompt, loss, token_ids, embedding
        self.history.append({"unet_samples": self.unet_samples, "validation_loss": loss, "prompt": prompt})

    def offer(
        self, prompt: str, loss: float, token_ids: list[int] | None = None, embedding: list[list[float]] | None = None
    ) -> bool:
        """Keep a prompt if its loss is the lowest so far; return whether it is."""
        improves = self.validation_loss is None or loss < self.validation_loss
        if improves:
            self.keep(prompt, loss, token_ids, embedding)
        return improves

    def move_to(self, here: Problem) -> bool:
        """Takes over what the inputs say now: the pictures may have moved or been renamed, and others come before them.

        Returns:
            Whether anything is new.
        """
        names = ("target", "paths", "stamps", "caption", "index")
        new = [name for name in names if getattr(self, name) != getattr(here, name)]
        for name in new:
            setattr(self, name, getattr(here, name))
        return bool(new)

    def forget_prompt(self) -> None:
        """Takes away the best prompt, so that the next one is kept whatever its loss."""
        self.prompt = self.validation_loss = self.token_ids = self.embedding = None
        self.history.clear()

    def forget_scores(self) -> None:
        """Takes away what was measured when the search had ended, perhaps of another prompt or by another scorer."""
        for name in ("clip_similarity", "heldout_clip_similarity", *MEASURED_ON_REQUEST):
            setattr(self, name, None)

    def finish(self) -> None:
        """Sets the final status from the two losses; without any, a problem is done, and one that failed stays so."""
        if self.status == "failed":
            return
        loss, initial = finite(self.validation_loss), finite(self.initial_validation_loss)
        self.status, self.reason = "done", None
        if loss is None and self.validation_loss is not None:
            self.status, self.reason = "failed", "The validation loss of the prompt is not a finite number."
        elif loss is None and initial is not None:
            self.status = "failed"
            self.reason = "No prompt was found that is read again as the same tokens and holds no blocked word."
        elif loss is None and self.initial_validation_loss is not None:
            self.status = "failed"
            self.reason = "The validation loss is not a finite number from the start; try --model.dtype float32."
        elif loss is not None and initial is not None and loss >= initial:
            self.status = "not improved"
            self.reason = (
                f"The best prompt's validation loss {loss:.6g} is no lower than the initial one's {initial:.6g}."
            )
