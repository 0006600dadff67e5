"""The scores of what a run has found; they choose nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.errors import UserError
from lightning_prompts.metrics import (
    ClipImageSimilarity,
    ClipTextSimilarity,
    DictionaryWords,
    Diversity,
    Lpips,
    Perplexity,
    SpecialCharacters,
    WordRecall,
    missing_lpips_weights,
    read_dictionary,
)
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import default_clip, load_clip
from lightning_prompts.runs.record import InversionResult, Problem, RefinementResult
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.methods.inversion.base import Inverter

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """What scores the results, after everything has been selected.

    Args:
        scorer: Folder or hub id of the CLIP that scores and takes no part in any search; None for the embedded model's own
            on the embedded model, and for no held-out score elsewhere.
        dictionary: File of words, one a line, to find in the prompts; None for those of its captions on the embedded model,
            and for no such score elsewhere.
        language_model: Folder or hub id of the causal language model that gives the prompts' perplexity; None for none.
        lpips_weights: File of the weights of LPIPS's AlexNet; None for the one in torch's cache, if it is there.
    """

    scorer: str | None = None
    dictionary: str | None = None
    language_model: str | None = None
    lpips_weights: str | None = None

    def check(self, offline: bool = False) -> None:
        """Tries what was given, so that a mistake is found before a search and not after it.

        Nothing of it is kept: what scores in the end takes no memory from the search.
        """
        if self.scorer:
            load_clip(self.scorer, offline)
        if self.dictionary:
            read_dictionary(self.dictionary)
        if self.language_model:
            Perplexity(self.language_model, offline)
        if self.lpips_weights:
            Lpips(weights=self.lpips_weights)

    def heldout(self, method: PromptMethod, *searching: ClipSimilarity) -> ClipSimilarity | None:
        """Return the CLIP that takes no part in the search, where there is one.

        Args:
            method: The method, whose own CLIPs may take part.
            searching: Other CLIPs that take part.

        Raises:
            UserError: It takes part, or cannot be loaded.
        """
        name = self.scorer or (str(EMOJI.parent / "scorer") if method.backbone.name == "emoji" else None)
        if name is None:
            return None
        clip = _clip(method, name)
        if _kept(
            method, f"searching by {name}", lambda: any(map(clip.has_same_image_encoder, (*method.clips(), *searching)))
        ):
            raise UserError(
                f"The scorer {name!r} has the weights of the CLIP that this search goes by, so that its scores would not be held out; "
                "give another CLIP as --scorer, or leave it out."
            )
        return clip

    def check_heldout(self, method: PromptMethod, *searching: ClipSimilarity) -> None:
        """Refuse a scorer that takes part in the search, see `heldout`; its memory on the device is freed again."""
        self.heldout(method, *searching)
        _leave_the_device(method)

    def measure(self, method: Inverter, problems: Sequence[Problem], drawn: Tensor) -> None:
        """Scores P problems that have a prompt, by it and by the pictures (P, N, 3, H, W) drawn from each.

        What cannot be measured is left out, and a line says why: the prompts are found all the same.
        """
        for problem in problems:
            problem.result = InversionResult()
        self._score_pictures(method, list(zip(problems, drawn, method.data.pictures(problems), strict=True)))
        self._score_texts(method, problems)
        _leave_the_device(method)

    def compare(self, method: PromptMethod, problems: Sequence[Problem], before: Tensor, after: Tensor) -> None:
        """Tells how similar the pictures of P problems are to the person's prompt, by the CLIP that takes no part in any search.

        Args:
            method: What has drawn them.
            problems: The records.
            before: What the person's prompt draws, (P, N, 3, H, W).
            after: What was found draws, (P, N, 3, H, W).
        """
        with _told():
            if clip := self.heldout(method):
                wanted = clip.features_of([problem.target for problem in problems]).unsqueeze(1)
                found = [
                    (clip.features_of_many(drawn, method.microbatch.size) * wanted).sum(2).tolist()
                    for drawn in (before, after)
                ]
                for problem, *cosines in zip(problems, *found, strict=True):
                    result = RefinementResult.of(problem)
                    result.heldout_before, result.heldout_after = cosines
        _leave_the_device(method)

    def _score_pictures(self, method: PromptMethod, rows: Sequence[tuple[Problem, Tensor, Tensor]]) -> None:
        """Scores problems by their drawn pictures (N, 3, H, W) and their targets (I, 3, H, W)."""
        with _told():
            own = _clip(method, default_clip(method.backbone))
            similarity, diversity, agreement = ClipImageSimilarity(own), Diversity(own), ClipTextSimilarity(own)
            for problem, drawn, target in rows:
                result = InversionResult.of(problem)
                result.clip_similarity = float(similarity(drawn, target))
                result.diversity = float(diversity(drawn[None]))
            for problem, _, target in rows:
                if problem.embedding is None:  # the others' prompts are pseudo-words, which only their backbone knows
                    cosine = agreement(target, [str(problem.prompt)] * len(target))
                    InversionResult.of(problem).clip_text_similarity = float(cosine)
        with _told():
            if clip := self.heldout(method):
                similarity, diversity = ClipImageSimilarity(clip), Diversity(clip)
                for problem, drawn, target in rows:
                    result = InversionResult.of(problem)
                    result.heldout_clip_similarity = float(similarity(drawn, target))
                    result.diversity = float(diversity(drawn[None]))  # rather than by a CLIP that may have searched
        with _told():
            if not missing_lpips_weights(weights=self.lpips_weights):
                lpips = _kept(method, "lpips", lambda: Lpips(weights=self.lpips_weights))
                for problem, drawn, target in rows:
                    InversionResult.of(problem).lpips = float(lpips(drawn, target))

    def _score_texts(self, method: PromptMethod, problems: Sequence[Problem]) -> None:
        """Scores problems by their prompts alone."""
        synonyms, words = _world(method.backbone.name)
        recall, special = WordRecall(synonyms), SpecialCharacters()
        texts = [problem for problem in problems if problem.embedding is None]
        for problem in texts:
            result = InversionResult.of(problem)
            if problem.caption:
                result.word_recall = float(recall([str(problem.prompt)], [problem.caption]))
            result.special_characters = float(special([str(problem.prompt)]))
        with _told():
            name = self.dictionary
            if known := _kept(method, name, lambda: read_dictionary(str(name))) if name else words:
                dictionary = DictionaryWords(known)
                for problem in texts:
                    InversionResult.of(problem).dictionary_words = float(dictionary([str(problem.prompt)]))
        with _told():
            if self.language_model:
                model = self.language_model
                perplexity = _kept(method, model, lambda: Perplexity(model, method.offline))
                for problem in texts:
                    InversionResult.of(problem).perplexity = float(perplexity([str(problem.prompt)]))


def _kept(method: PromptMethod, name: str, load: Callable[[], T]) -> T:
    """What scores, loaded once a run, as problems are finished one after the other."""
    if name not in method.scorers:
        method.scorers[name] = load()
    kept: T = method.scorers[name]
    return kept


def _clip(method: PromptMethod, name: str) -> ClipSimilarity:
    """A CLIP on the device."""
    return _kept(method, f"CLIP {name}", lambda: ClipSimilarity(name, method.offline)).to(method.device)


def _leave_the_device(method: PromptMethod) -> None:
    """Leaves the device's memory to the search."""
    for scorer in method.scorers.values():
        if isinstance(scorer, torch.nn.Module):
            scorer.to("cpu")


@contextmanager
def _told() -> Iterator[None]:
    """Goes on after a person's mistake, with a line about it."""
    try:
        yield
    except UserError as error:
        say(f"Not everything is scored: {error}", stream=sys.stderr)


def _world(backbone: str) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """The synonyms and all words that captions can have, where they are known."""
    if backbone != "emoji":
        return {}, frozenset()
    from lightning_prompts.emoji.world import SYNONYMS, caption_words

    return SYNONYMS, caption_words()
