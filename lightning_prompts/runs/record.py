"""The record of each problem: what is searched, and the best that was found for it so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from typing_extensions import Self, TypedDict  # pydantic checks no others before Python 3.12

from lightning_prompts.runs.atomic_io import finite

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

# "not improved" is finished, too, but the prompt is no better than the one that the search started from.
Status = Literal["open", "done", "not improved", "failed"]

BEST_CANDIDATES = 5  # of DPO-Diff in result.json


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


@dataclass
class MethodResult:
    """The result of a method for one problem; a method that records more than the common fields has a subclass of its own."""

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Return the problem's result as this class; the first call makes an empty one."""
        if problem.result is None:
            problem.result = cls()
        elif isinstance(problem.result, dict):  # as it was read
            problem.result = cls(**problem.result)
        if not isinstance(problem.result, cls):
            raise TypeError(f"The problem has a {type(problem.result).__name__}, not a {cls.__name__}.")
        return problem.result

    @classmethod
    def read(cls, content: dict[str, Any] | None) -> Self | dict[str, Any] | None:
        """Check what a record or a checkpoint holds of a result; this base class takes that of any method, as it is.

        Raises:
            ValueError: It is not a result of this class.
        """
        return content if content is None or cls is MethodResult else checked(cls, content)

    def entry(self, problem: Problem) -> dict[str, Any]:
        """Return the fields of an entry of `result.json` that come after the common ones."""
        return _without_none(asdict(self))

    @property
    def summary(self) -> str:
        """The scores in a few words; empty without any."""
        return ""


@dataclass
class InversionResult(MethodResult):
    """Scores of a prompt that was found for images; None where a score was not measured.

    Attributes:
        clip_similarity: Cosine of the target and the generated images, by the model's own CLIP.
        heldout_clip_similarity: The same by a CLIP that took no part in the search.
        clip_text_similarity: Cosine of the prompt and the target's images.
        diversity: One minus the mean cosine between generated images.
        lpips: Perceptual distance of the generated images to the target.
        word_recall: Share of the words of the target's caption that the prompt has.
        dictionary_words: Share of the prompt's words that are in the dictionary.
        special_characters: Share of the prompt's characters that are neither letters, digits nor spaces.
        perplexity: Perplexity of the prompt under a language model.
    """

    clip_similarity: float | None = None
    heldout_clip_similarity: float | None = None
    clip_text_similarity: float | None = None
    diversity: float | None = None
    lpips: float | None = None
    word_recall: float | None = None
    dictionary_words: float | None = None
    special_characters: float | None = None
    perplexity: float | None = None

    def entry(self, problem: Problem) -> dict[str, Any]:
        """See `MethodResult.entry`; the two similarities are there even if they were not measured."""
        similarities = {
            "clip_similarity": self.clip_similarity,
            "heldout_clip_similarity": self.heldout_clip_similarity,
        }
        return similarities | super().entry(problem)

    @property
    def summary(self) -> str:
        """See `MethodResult.summary`."""
        return "" if self.clip_similarity is None else f"similarity {self.clip_similarity:.2f}"


@dataclass
class RefinementResult(MethodResult):
    """Scores of images before and after a method changed a user's prompt.

    Attributes:
        heldout_before: Cosine of the prompt and its images on fresh seeds, one per seed, by a CLIP that took no part in the search.
        heldout_after: The same after the change.
    """

    heldout_before: list[float] | None = None
    heldout_after: list[float] | None = None

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """What to compare before and after, the most important first: a name and the values per seed."""
        return [("held-out similarity", self.heldout_before, self.heldout_after)]

    @property
    def summary(self) -> str:
        """See `MethodResult.summary`."""
        compared = [
            f"{name} {fmean(after):.3f}, was {fmean(before):.3f}"
            for name, before, after in self.comparisons
            if before and after
        ]
        return f"on fresh seeds {'; '.join(compared)}" if compared else ""


@dataclass
class DPODiffResult(RefinementResult):
    """The result of DPO-Diff.

    Attributes:
        words: Name and chosen word of each slot.
        loss_before: Distance of the prompt and its images, one per seed of the search.
        loss_after: The same of the best prompt.
        fresh_loss_before: The distances on seeds that the search has not used.
        fresh_loss_after: The same of the best prompt.
        similarity: Cosine of the best prompt and the user's, by the sentence encoder.
        budget: Generations spent.
        candidates: Everything that was evaluated, in order.
    """

    words: list[list[str]] | None = None
    loss_before: list[float] | None = None
    loss_after: list[float] | None = None
    fresh_loss_before: list[float] | None = None
    fresh_loss_after: list[float] | None = None
    similarity: float | None = None
    budget: float | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def entry(self, problem: Problem) -> dict[str, Any]:
        """See `MethodResult.entry`; of the candidates only the best, with the losses as distances."""
        if self.loss_before is None:
            return {}
        best = sorted(self.candidates, key=lambda candidate: sum(candidate["losses"]))[:BEST_CANDIDATES]
        candidates = [{**candidate, "losses": [abs(loss) for loss in candidate["losses"]]} for candidate in best]
        texts = {"original_prompt": problem.target, "negative_prompt": problem.negative_prompt}
        return {**texts, **asdict(replace(self, candidates=[])), "candidates": candidates}

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """See `RefinementResult.comparisons`."""
        return [*super().comparisons, ("loss", self.fresh_loss_before, self.fresh_loss_after)]


@dataclass
class SteeringResult(RefinementResult):
    """The result of a method that moves encoded prompts.

    Attributes:
        metric_before: The metric of the prompt's images, one per seed of the search.
        metric_after: The same of the best embeddings.
        fresh_metric_before: The metric on seeds that the search has not used.
        fresh_metric_after: The same of the best embeddings.
        values_before: By the name of each objective, the watched one included, its value per seed.
        values_after: The same of the best embeddings.
        fresh_values_before: The values on seeds that the search has not used.
        fresh_values_after: The same of the best embeddings.
    """

    metric_before: list[float] | None = None
    metric_after: list[float] | None = None
    fresh_metric_before: list[float] | None = None
    fresh_metric_after: list[float] | None = None
    values_before: dict[str, list[float]] | None = None
    values_after: dict[str, list[float]] | None = None
    fresh_values_before: dict[str, list[float]] | None = None
    fresh_values_after: dict[str, list[float]] | None = None

    def entry(self, problem: Problem) -> dict[str, Any]:
        """See `MethodResult.entry`."""
        return super().entry(problem) if self.metric_before else {}

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """See `RefinementResult.comparisons`."""
        return [("metric", self.fresh_metric_before, self.fresh_metric_after), *super().comparisons]


@dataclass
class SeedInvarianceResult(SteeringResult):
    """The result of SeedInvariance.

    Attributes:
        target_seed: The seed whose image every seed should give.
    """

    target_seed: int | None = None


@dataclass
class HumanFeedbackResult(SteeringResult):
    """The result of HumanFeedback.

    Attributes:
        moves: What the user chose, oldest first.
        others: Rounds since the last move in which the user chose none of the candidates.
    """

    moves: list[Move] = field(default_factory=list)
    others: int = 0

    def entry(self, problem: Problem) -> dict[str, Any]:
        """See `MethodResult.entry`."""
        scores = {"heldout_before": self.heldout_before, "heldout_after": self.heldout_after}
        return {"moves": self.moves, **_without_none(scores)} if self.moves else {}


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


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
    negative_prompt: str | None = None  # found by methods that search one
    unet_samples: int = 0  # forward and backward counted each
    seconds: float = 0.0
    history: list[Better] = field(default_factory=list)  # of the best prompt, oldest first
    result: MethodResult | dict[str, Any] | None = None  # of the method; a dictionary where its class is not known
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
            self.reason = (
                "The validation loss is not a finite number from the start; try --model.backbone.dtype float32."
            )
        elif loss is not None and initial is not None and loss >= initial:
            self.status = "not improved"
            self.reason = (
                f"The best prompt's validation loss {loss:.6g} is no lower than the initial one's {initial:.6g}."
            )


def checked(kind: type[T], content: dict[str, Any]) -> T:
    """Make a dataclass of what a JSON file holds of its fields; a ValueError names a field that is unknown or of another type."""
    if unknown := sorted(content.keys() - {field.name for field in fields(kind)}):  # type: ignore[arg-type]
        raise ValueError(f"the field {unknown[0]!r} is unknown")
    content = {name: None if value is None else _with_nan(value) for name, value in content.items()}
    checked: T = _adapter(cast("Any", kind)).validate_python(content)
    return checked


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _with_nan(value: Any) -> Any:
    """Replace null by NaN, of which `to_json` has made it; in a list or an entry of one, null stands for nothing else."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return float("nan") if value is None else value
