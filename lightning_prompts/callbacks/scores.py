"""The scores of finished prompts, which take no part in the search."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

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
    read_dictionary,
)
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import default_clip, load_clip
from lightning_prompts.objectives.lpips import missing_lpips_weights
from lightning_prompts.runs.record import InversionResult, Problem, RefinementResult
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.methods.inversion.base import Inverter

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """The scores to compute for finished problems.

    Args:
        scorer: Folder or hub id of a held-out CLIP, which takes no part in the search. None for the one that the
            model's metadata.json names, or else for no held-out scores.
        dictionary: File with one word per line, for the share of dictionary words. None for the one that the model's
            metadata.json names, or else for no such score.
        language_model: Folder or hub id of the causal language model for the perplexity; None for no perplexity.
        lpips_weights: File of the weights of LPIPS's AlexNet; None for the one in torch's cache, if it is there.
    """

    scorer: str | None = None
    dictionary: str | None = None
    language_model: str | None = None
    lpips_weights: str | None = None

    def check(self, offline: bool = False) -> None:
        """Load everything once and release it, so that mistakes are reported before the search.

        Raises:
            UserError: A model or file cannot be loaded.
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
        """Return the held-out CLIP, or None without one.

        Args:
            method: The method, whose CLIPs take part in the search.
            searching: Other CLIPs that take part in it.

        Raises:
            UserError: The CLIP takes part in the search, or cannot be loaded.
        """
        name = self.scorer or method.backbone.metadata.scorer
        if name is None:
            return None
        clip = _clip(method, name)
        if _load_once(
            method, f"searching by {name}", lambda: any(map(clip.has_same_image_encoder, (*method.clips(), *searching)))
        ):
            raise UserError(
                f"The scorer {name!r} has the weights of a CLIP that this search uses, so its scores would not be held "
                "out; give another CLIP as --scorer, or leave it out."
            )
        return clip

    def check_heldout(self, method: PromptMethod, *searching: ClipSimilarity) -> None:
        """Refuse a scorer that takes part in the search; see `heldout`."""
        self.heldout(method, *searching)
        _offload(method)

    def evaluate(self, method: Inverter, problems: Sequence[Problem], images: Tensor) -> None:
        """Score P problems by their prompts and by the images (P, N, 3, H, W) generated from them.

        Scores that cannot be computed are left out, and the reason is printed.
        """
        for problem in problems:
            problem.result = InversionResult()
        self._score_images(method, list(zip(problems, images, method.data.target_images(problems), strict=True)))
        self._score_texts(method, problems)
        _offload(method)

    def compare(self, method: PromptMethod, problems: Sequence[Problem], before: Tensor, after: Tensor) -> None:
        """Score P problems by the held-out CLIP's cosines of the user's prompt with images before and after.

        Args:
            method: The method.
            problems: The records.
            before: Images of the user's prompts, (P, N, 3, H, W).
            after: Images of the refined prompts, (P, N, 3, H, W).
        """
        with _report_user_errors():
            if clip := self.heldout(method):
                texts = clip.features_of([problem.target for problem in problems]).unsqueeze(1)
                before_and_after = [
                    (clip.features_of_many(images, method.microbatch.size) * texts).sum(2).tolist()
                    for images in (before, after)
                ]
                for problem, *cosines in zip(problems, *before_and_after, strict=True):
                    result = RefinementResult.of(problem)
                    result.heldout_before, result.heldout_after = cosines
        _offload(method)

    def _score_images(self, method: PromptMethod, rows: Sequence[tuple[Problem, Tensor, Tensor]]) -> None:
        """Score problems by their generated images (N, 3, H, W) and their targets (I, 3, H, W)."""
        with _report_user_errors():
            own = _clip(method, default_clip(method.backbone))
            similarity, diversity, agreement = ClipImageSimilarity(own), Diversity(own), ClipTextSimilarity(own)
            for problem, images, target in rows:
                result = InversionResult.of(problem)
                result.clip_similarity = float(similarity(images, target))
                result.diversity = float(diversity(images[None]))
            for problem, _, target in rows:
                if problem.embedding is None:  # else the prompt is pseudo-words, which a CLIP cannot encode
                    cosine = agreement(target, [str(problem.prompt)] * len(target))
                    InversionResult.of(problem).clip_text_similarity = float(cosine)
        with _report_user_errors():
            if clip := self.heldout(method):
                similarity, diversity = ClipImageSimilarity(clip), Diversity(clip)
                for problem, images, target in rows:
                    result = InversionResult.of(problem)
                    result.heldout_clip_similarity = float(similarity(images, target))
                    result.diversity = float(diversity(images[None]))  # in place of that by a CLIP of the search
        with _report_user_errors():
            if not missing_lpips_weights(weights=self.lpips_weights):
                lpips = _load_once(method, "lpips", lambda: Lpips(weights=self.lpips_weights))
                for problem, images, target in rows:
                    InversionResult.of(problem).lpips = float(lpips(images, target))

    def _score_texts(self, method: PromptMethod, problems: Sequence[Problem]) -> None:
        """Score problems by the text of their prompts."""
        metadata = method.backbone.metadata
        recall, special = WordRecall(metadata.synonyms), SpecialCharacters()
        texts = [problem for problem in problems if problem.embedding is None]
        for problem in texts:
            result = InversionResult.of(problem)
            if problem.caption:
                result.word_recall = float(recall([str(problem.prompt)], [problem.caption]))
            result.special_characters = float(special([str(problem.prompt)]))
        with _report_user_errors():
            if name := self.dictionary or metadata.dictionary:
                share = DictionaryWords(_load_once(method, name, lambda: read_dictionary(name)))
                for problem in texts:
                    InversionResult.of(problem).dictionary_words = float(share([str(problem.prompt)]))
        with _report_user_errors():
            if self.language_model:
                model = self.language_model
                perplexity = _load_once(method, model, lambda: Perplexity(model, method.offline))
                for problem in texts:
                    InversionResult.of(problem).perplexity = float(perplexity([str(problem.prompt)]))


def _load_once(method: PromptMethod, name: str, load: Callable[[], T]) -> T:
    """Return a scorer by name, which is loaded once per run."""
    if name not in method.scorers:
        method.scorers[name] = load()
    scorer: T = method.scorers[name]
    return scorer


def _clip(method: PromptMethod, name: str) -> ClipSimilarity:
    """Return a CLIP on the method's device, loaded once per run."""
    return _load_once(method, f"CLIP {name}", lambda: ClipSimilarity(name, method.offline)).to(method.device)


def _offload(method: PromptMethod) -> None:
    """Move all scorers to the CPU, to free the device's memory for the search."""
    for scorer in method.scorers.values():
        if isinstance(scorer, torch.nn.Module):
            scorer.to("cpu")


@contextmanager
def _report_user_errors() -> Iterator[None]:
    """Print a UserError and continue."""
    try:
        yield
    except UserError as error:
        say(f"Some scores are missing: {error}", stream=sys.stderr)
