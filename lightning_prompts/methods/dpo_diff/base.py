"""The search space of DPO-Diff and the evaluation of its candidates (arXiv 2407.01606)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.methods.dpo_diff.logits import WordChoices
from lightning_prompts.methods.dpo_diff.semantic_similarity import SemanticSimilarity, Similarity, filter_by_similarity
from lightning_prompts.methods.dpo_diff.space import Choice, Space
from lightning_prompts.methods.dpo_diff.word_sources import Source, WordSources
from lightning_prompts.methods.refinement import Refinement
from lightning_prompts.objectives.clip import ClipSimilarity, default_clip
from lightning_prompts.objectives.spherical import spherical_distance
from lightning_prompts.runs.record import Candidate, DPODiffResult, Problem
from lightning_prompts.sampling.seeding import SEARCH
from lightning_prompts.setting_types import Positive
from lightning_prompts.unused import refuse_unused


class WordSearch(Refinement):
    """Choose other words for a prompt or its negative prompt, and evaluate each choice by its images.

    Args:
        task: `improve` lowers the loss; `attack` raises it and keeps the meaning.
        positive: Sources of other words for those of the prompt. None: none to improve, the text encoder's neighbors to
            attack.
        negative: Sources of words for the negative prompt. None: the library to improve, none to attack.
        dictionary: Source of synonyms and antonyms: `wordnet`, a folder with its files, a JSON file in DPO-Diff's
            layout, or a language
            model: a folder, a hub id, or the URL of an endpoint with OpenAI's protocol.
        neighbors: Neighbors per word in the text encoder. None: 5 to improve; 60 to attack, minus those that change the
            meaning.
        protected_words: Words of the prompt that must not change.
        objective: `spherical`, half the squared angle between image and prompt, or `cosine`, one minus its cosine.
        budget: Generations that a search may spend; a generation generates the images of a candidate on all seeds.
        seeds: Images per candidate.
        similarity: How similar in meaning the new prompt must be to the user's.
        clip: Folder or hub id of the CLIP that scores; None for the one that goes with the backbone.
        **kwargs: See `PromptMethod`.
    """

    prompt: WordChoices
    result_class = DPODiffResult
    decisive = frozenset({"sampler.num_inference_steps"})  # the search itself generates images

    def __init__(
        self,
        *,
        task: Literal["improve", "attack"] = "improve",
        positive: list[Source] | None = None,
        negative: list[Source] | None = None,
        dictionary: str = "wordnet",
        neighbors: Positive | None = None,
        protected_words: list[str] | None = None,
        objective: Literal["spherical", "cosine"] = "spherical",
        budget: Positive = 40,
        seeds: Positive = 3,
        similarity: Similarity = Similarity(),
        clip: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.task, self.objective, self.budget, self.seeds = task, objective, budget, seeds
        self.positive: list[Source] = (["neighbors"] if task == "attack" else []) if positive is None else positive
        self.negative: list[Source] = (["library"] if task == "improve" else []) if negative is None else negative
        if self.negative:
            self.sampler.check_guided(
                "a negative prompt does nothing",
                "search other words for the prompt with --model.negative [] --model.positive [synonyms]",
            )
        if not self.positive:
            because = "where the prompt's words stay, without --model.positive"
            refuse_unused(WordSearch, because, {"protected_words": protected_words})
            refuse_unused(Similarity, because, asdict(similarity), "--model.similarity")
        sources, unless = {*self.positive, *self.negative}, "unless --model.positive or --model.negative has"
        if not sources & {"synonyms", "antonyms"}:
            refuse_unused(WordSearch, f"{unless} synonyms or antonyms", {"dictionary": dictionary})
        if "neighbors" not in sources:
            refuse_unused(WordSearch, f"{unless} neighbors", {"neighbors": neighbors})
        self.prompt = WordChoices(self.vocabulary)
        self.clip = ClipSimilarity(clip or default_clip(self.backbone), self.offline)
        self.similarity = SemanticSimilarity(self.clip, similarity, self.offline)
        count = int(neighbors or (5 if task == "improve" else 60))
        self.sources = WordSources(
            self.vocabulary, self.positive, self.negative, dictionary, task == "improve", count, protected_words or (),
            self.offline,
        )  # fmt: skip
        self._spaces: dict[str, Space] = {}  # by prompt
        self._improved: list[Problem] = []  # since the last `score`
        self._known_losses: dict[str, dict[tuple[str, str], list[float]]] = {}  # by problem and texts

    @classmethod
    def search_length(cls, settings: Mapping[str, Any]) -> tuple[str, int]:
        """Return the budget; see `PromptMethod.search_length`."""
        return "budget", int(settings["budget"])

    # --- the batch

    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch, their words, and the candidates that an earlier run evaluated."""
        for key in {problem.key for problem in problems} - self._known_losses.keys():
            newest = self.data.folder.read(key)
            self._known_losses[key] = _losses(DPODiffResult.of(newest).candidates) if newest else {}
        super().set_rows(problems)
        self.prompt.set_spaces([self.space(problem.target) for problem in problems])
        self.text_features = self.clip.features_of([problem.target for problem in problems])  # (P, E)
        self.noise = self.draw_noise(problems, SEARCH, self.seeds)

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        super().evict(problem)
        self._known_losses.pop(problem.key, None)
        self._spaces.pop(problem.target, None)

    @property
    def identities(self) -> list[dict[str, Any]]:
        """The settings that are part of the keys of a prompt's problems, one dictionary per problem."""
        return [{"task": self.task}]

    def check(self, prompt: str) -> None:
        """Refuse a prompt without words to replace, or with a token that the text encoder has no embedding for."""
        self.vocabulary.token_lists([prompt])
        self.space(prompt)

    def space(self, prompt: str) -> Space:
        """Return the words that can replace those of a prompt; a UserError if there are none."""
        if prompt not in self._spaces:
            self._spaces[prompt] = filter_by_similarity(self.sources.space(prompt), self.similarity)
        return self._spaces[prompt]

    def result(self, row: int) -> DPODiffResult:
        """Return the result of a row so far."""
        return DPODiffResult.of(self.batch[row].record)

    # --- losses

    def loss(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Compute losses (B,): distances of images (B, 3, H, W) to text features (B, E), negative for an attack."""
        distance = self.distance(self.clip.features(images), text_features)
        return distance if self.task == "improve" else -distance

    def distance(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compute the distances (...) of features (..., E) of images and texts."""
        if self.objective == "spherical":
            return spherical_distance(image_features, text_features)
        return 1 - (image_features * text_features).sum(-1)

    def evaluate(self, texts: Sequence[tuple[str, str]], noise: Tensor, text_features: Tensor) -> Tensor:
        """Compute the losses (B, N) of B pairs of a prompt and a negative prompt.

        Args:
            texts: The pairs.
            noise: Standard normal, (B, N, C, h, w).
            text_features: Features of the users' prompts, (B, E).
        """
        if not texts:
            return noise.new_zeros(0, noise.shape[1])
        count = noise.shape[1]
        prompt_embeds = repeat(self.encode([prompt for prompt, _ in texts]), count)
        negative_prompt_embeds = repeat(self.encode([negative for _, negative in texts], negative=True), count)
        text_features = text_features.repeat_interleave(count, 0)

        def score(latents: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(self.backbone.decode(latents), text_features[indices]), {}

        losses, _ = self.sampler.sample_and_score(prompt_embeds, negative_prompt_embeds, noise.flatten(0, 1), score)
        return losses.view(len(texts), count)

    # --- candidates

    @torch.no_grad()
    def try_candidates(self, candidates: Sequence[tuple[int, Choice]], cost: float = 1) -> None:
        """Evaluate candidates, each a row and a choice, in one batch, and keep the best.

        If an earlier run evaluated all of them, its losses are used. If it was killed while it saved them, all are
        evaluated again, so that the calls are those of an uninterrupted search.
        """
        texts = [self.prompt.spaces[row].texts(choice) for row, choice in candidates]
        known = [self._known_losses[self.batch[row].record.key] for row, _ in candidates]
        all_known = all(pair in losses for pair, losses in zip(texts, known, strict=True))
        new = range(0 if all_known else len(candidates))
        rows = torch.tensor([candidates[i][0] for i in new], dtype=torch.long)
        with self.trainer.precision_plugin.forward_context():  # also before the first step, to be comparable
            losses = self.evaluate([texts[i] for i in new], self.noise[rows], self.text_features[rows]).tolist()
        for i, values in zip(new, losses, strict=True):
            known[i][texts[i]] = values
        for (row, choice), pair, values in zip(candidates, texts, known, strict=True):
            self.batch.add_cost(torch.tensor([row]), self.seeds * self.sampler.cost())
            self.spend(row, cost)
            self.record_candidate(row, choice, pair, values[pair])
        for row in {row for row, _ in candidates}:
            self.data.folder.save_or_warn(self.batch[row].record)

    def record_candidate(self, row: int, choice: Choice, texts: tuple[str, str], losses: list[float]) -> None:
        """Add an evaluated candidate to a problem's result, and make it the best if its mean loss is the lowest."""
        problem, (prompt, negative), result = self.batch[row].record, texts, self.result(row)
        candidate = Candidate(prompt=prompt, negative_prompt=negative, choice=list(choice), losses=losses,
                              budget=result.budget or 0.0)  # fmt: skip
        result.candidates.append(candidate)
        if problem.offer(prompt, sum(losses) / len(losses), self.prompt.tokens(prompt)):
            problem.negative_prompt, result.loss_after = negative, [abs(loss) for loss in losses]
            slots = self.prompt.spaces[row].slots
            result.words = [[slot.name, slot.words[i]] for slot, i in zip(slots, choice, strict=True)]
            self._improved.append(problem)

    def spend(self, row: int, generations: float) -> None:
        """Add to the generations that a problem spent."""
        result = self.result(row)
        result.budget = (result.budget or 0) + generations

    def score(self, rows: Tensor) -> list[Problem]:
        """Evaluate the users' prompts before the first step; later return the problems that improved."""
        new = [row for row in rows.tolist() if self.result(row).loss_before is None]
        if new:  # the user's own prompt costs nothing of the budget
            self.try_candidates([(row, (0,) * len(self.prompt.spaces[row].slots)) for row in new], cost=0)
        for row in new:
            problem, losses = self.batch[row].record, self.result(row).candidates[0]["losses"]
            self.result(row).loss_before = [abs(loss) for loss in losses]
            problem.initial_validation_loss = sum(losses) / len(losses)
        improved, self._improved = self._improved, []
        return improved

    def finish_done(self, rows: Tensor) -> None:
        """Finish the problems that spent their budget."""
        for row in rows.tolist():
            if (self.result(row).budget or 0) + 1 > self.budget + 1e-6:
                self.batch[row].stale = int(self.patience)
        super().finish_done(rows)

    # --- results

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the losses of the best prompts on the seeds of the search."""
        pairs = [(str(problem.prompt), problem.negative_prompt or "") for problem in problems]
        text_features = self.clip.features_of([problem.target for problem in problems])
        return self.evaluate(pairs, self.draw_noise(problems, SEARCH, self.seeds), text_features).mean(1)

    def images_before_and_after(self, problems: Sequence[Problem], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Generate images before and after the search; see `Refinement.images_before_and_after`."""
        count = noise.shape[1]
        originals, prompts, negatives = (
            [text for text in texts for _ in range(count)]
            for texts in zip(*((p.target, str(p.prompt), p.negative_prompt or "") for p in problems), strict=True)
        )
        before, after = (
            self.generate(originals, noise.flatten(0, 1)),
            self.generate(prompts, noise.flatten(0, 1), negatives),
        )
        return before.unflatten(0, noise.shape[:2]), after.unflatten(0, noise.shape[:2])

    def record_fresh_scores(self, problems: Sequence[Problem], before: Tensor, after: Tensor) -> None:
        """Record the distances of images and prompts on fresh seeds, and how similar the prompts are."""
        text_features = self.clip.features_of([problem.target for problem in problems]).unsqueeze(1)  # (P, 1, E)
        distances = [
            self.distance(self.clip.features_of_many(images, self.microbatch.size), text_features).tolist()
            for images in (before, after)
        ]
        for problem, *fresh in zip(problems, *distances, strict=True):
            result = DPODiffResult.of(problem)
            result.fresh_loss_before, result.fresh_loss_after = fresh
            result.similarity = float(self.similarity(problem.target, [str(problem.prompt)]))


def _losses(candidates: Sequence[Candidate]) -> dict[tuple[str, str], list[float]]:
    """Return the losses of candidates by their texts."""
    return {(one["prompt"], one["negative_prompt"]): one["losses"] for one in candidates}
