"""The record of each problem: its inputs, and its best prompt so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from typing_extensions import Self, TypedDict  # before Python 3.12, pydantic accepts only these

from lightning_prompts.runs.atomic_io import finite

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

# "not improved" is finished, too, but its prompt is no better than the initial one.
Status = Literal["open", "done", "not improved", "failed"]

BEST_CANDIDATES = 5  # of DPO-Diff in result.json


class Better(TypedDict):
    """A prompt of the history, which was the best of its time."""

    unet_samples: int
    validation_loss: float
    prompt: str


class Candidate(TypedDict):
    """A prompt that was sampled and evaluated."""

    prompt: str
    negative_prompt: str
    choice: list[int]  # index of the word, by slot
    losses: list[float]  # minimized, by seed; of an attack the negative distances
    budget: float  # generations spent up to here


class Move(TypedDict):
    """A choice of the user: a move on the arc to a text."""

    text: str
    candidate: int  # its index in the round
    strength: float  # fraction of the arc, in [0, 1]
    others: int  # rounds without a move before it


@dataclass
class MethodResult:
    """The result of a method for one problem; a method with fields of its own has a subclass."""

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Return the problem's result as this class; the first call creates an empty one.

        Raises:
            TypeError: The problem has a result of another method.
        """
        if problem.result is None:
            problem.result = cls()
        elif isinstance(problem.result, dict):  # as it was read
            problem.result = cls(**problem.result)
        if not isinstance(problem.result, cls):
            raise TypeError(f"The problem has a {type(problem.result).__name__}, not a {cls.__name__}.")
        return problem.result

    @classmethod
    def read(cls, content: dict[str, Any] | None) -> Self | dict[str, Any] | None:
        """Check a result from a record or a checkpoint; this base class accepts that of any method unchanged.

        Raises:
            ValueError: The content is not a result of this class.
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
    """Scores of a prompt that was found for images; None where a score was not computed.

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
        """Return the fields for `result.json`; the two similarities are always present."""
        similarities = {
            "clip_similarity": self.clip_similarity,
            "heldout_clip_similarity": self.heldout_clip_similarity,
        }
        return similarities | super().entry(problem)

    @property
    def summary(self) -> str:
        """Return the similarity to the target, for the terminal."""
        return "" if self.clip_similarity is None else f"similarity {self.clip_similarity:.2f}"


@dataclass
class RefinementResult(MethodResult):
    """Scores of images before and after a method changed a user's prompt.

    Attributes:
        heldout_before: Cosine of the prompt and its images on fresh seeds, one per seed, by a CLIP that took no part in
            the search.
        heldout_after: The same after the change.
    """

    heldout_before: list[float] | None = None
    heldout_after: list[float] | None = None

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """Return scores before and after the change, the most important first: a name and the values per seed."""
        return [("held-out similarity", self.heldout_before, self.heldout_after)]

    @property
    def summary(self) -> str:
        """Return the scores before and after, for the terminal."""
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
        """Return the fields for `result.json`; of the candidates only the best, with the losses as distances."""
        if self.loss_before is None:
            return {}
        best = sorted(self.candidates, key=lambda candidate: sum(candidate["losses"]))[:BEST_CANDIDATES]
        candidates = [{**candidate, "losses": [abs(loss) for loss in candidate["losses"]]} for candidate in best]
        texts = {"original_prompt": problem.target, "negative_prompt": problem.negative_prompt}
        return {**texts, **asdict(replace(self, candidates=[])), "candidates": candidates}

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """Return the scores and the loss before and after the change."""
        return [*super().comparisons, ("loss", self.fresh_loss_before, self.fresh_loss_after)]


@dataclass
class SteeringResult(RefinementResult):
    """The result of a method that moves encoded prompts.

    Attributes:
        metric_before: The metric of the prompt's images, one per seed of the search.
        metric_after: The same of the best embeddings.
        fresh_metric_before: The metric on seeds that the search has not used.
        fresh_metric_after: The same of the best embeddings.
        values_before: By the name of each objective, that of the constraint included, its value per seed.
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
        """Return the fields for `result.json`, none without a metric."""
        return super().entry(problem) if self.metric_before else {}

    @property
    def comparisons(self) -> list[tuple[str, list[float] | None, list[float] | None]]:
        """Return the metric and the scores before and after the change."""
        return [("metric", self.fresh_metric_before, self.fresh_metric_after), *super().comparisons]


@dataclass
class SeedInvarianceResult(SteeringResult):
    """The result of SeedInvariance.

    Attributes:
        target_seed: The seed whose image every seed should give.
    """

    target_seed: int | None = None


@dataclass
class HumanFeedbackResult(RefinementResult):
    """The result of HumanFeedback, which has no metric.

    Attributes:
        moves: What the user chose, oldest first.
        others: Rounds since the last move in which the user chose none of the candidates.
    """

    moves: list[Move] = field(default_factory=list)
    others: int = 0

    def entry(self, problem: Problem) -> dict[str, Any]:
        """Return the fields for `result.json`, none without a move."""
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
    """One independent problem and its best prompt so far. Lower losses are better."""

    key: str  # 16 hexadecimal digits: a hash of the inputs and of the settings that identify the problem
    target: str  # the name in messages: of a file, folder or subject, or the prompt
    paths: list[str] = field(default_factory=list)
    caption: str | None = None
    index: int = 0  # place among the inputs, which is the order of results
    status: Status = "open"
    reason: str | None = None  # one sentence, why it is "not improved" or "failed"
    prompt: str | None = None
    token_ids: list[int] | None = None
    embedding: list[list[float]] | None = None  # (M, D) of a pseudo-word, whose prompt is no text
    validation_loss: float | None = None
    initial_validation_loss: float | None = None  # of the initial prompt
    negative_prompt: str | None = None  # of methods that search one
    unet_samples: int = 0  # a forward and a backward pass count one each
    seconds: float = 0.0
    history: list[Better] = field(default_factory=list)  # of the best prompt, oldest first
    result: MethodResult | dict[str, Any] | None = None  # of the method; a dictionary if its class is not known
    stamps: list[str] = field(default_factory=list)  # of each file, to recognize it without reading it

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"The status {self.status!r} is unknown; use one of {get_args(Status)}.")

    @property
    def display_prompt(self) -> str:
        """The prompt with the negative prompt, if any, for display."""
        return (self.prompt or "") + (f" | without {self.negative_prompt}" if self.negative_prompt else "")

    def offer(
        self, prompt: str, loss: float, token_ids: list[int] | None = None, embedding: list[list[float]] | None = None
    ) -> bool:
        """Keep a prompt if its loss is the lowest so far; return whether it is."""
        improves = self.validation_loss is None or loss < self.validation_loss
        if improves:
            self.prompt, self.validation_loss, self.token_ids, self.embedding = prompt, loss, token_ids, embedding
            self.history.append({"unet_samples": self.unet_samples, "validation_loss": loss, "prompt": prompt})
        return improves

    def move_to(self, current: Problem) -> bool:
        """Copy the fields of the inputs from a problem without results, since files may have moved.

        Args:
            current: The problem with the same key among the current inputs.

        Returns:
            Whether a field has changed.
        """
        names = ("target", "paths", "stamps", "caption", "index")
        changed = [name for name in names if getattr(self, name) != getattr(current, name)]
        for name in changed:
            setattr(self, name, getattr(current, name))
        return bool(changed)

    def forget_prompt(self) -> None:
        """Remove the best prompt, so that the next one is kept whatever its loss."""
        self.prompt = self.validation_loss = self.token_ids = self.embedding = None
        self.history.clear()

    def finish(self) -> None:
        """Set the final status by the validation losses; without losses it is `done`, and `failed` stays."""
        if self.status == "failed":
            return
        loss, initial = finite(self.validation_loss), finite(self.initial_validation_loss)
        self.status, self.reason = "done", None
        if loss is None and self.validation_loss is not None:
            self.status, self.reason = "failed", "The validation loss of the prompt is not a finite number."
        elif loss is None and initial is not None:
            self.status = "failed"
            self.reason = "No prompt was found whose text encodes to the same tokens and has no blocked word."
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
    """Create a dataclass from JSON values, and check the type of each field.

    Args:
        kind: The dataclass.
        content: Values by field; null in place of a number in a list or dictionary becomes NaN.

    Raises:
        ValueError: A field is unknown, missing or of another type.
    """
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
    """Replace null by NaN, which `to_json` writes as null; lists and their entries have no other null."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return float("nan") if value is None else value
