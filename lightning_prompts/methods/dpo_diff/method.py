"""DPO-Diff: on discrete prompt optimization for diffusion models (arXiv 2407.01606)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.data.prompts import Prompts
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.method import PromptMethod, by_step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.logits import WordChoices
from lightning_prompts.methods.dpo_diff.similarity import Meaning, keeping
from lightning_prompts.methods.dpo_diff.sources import Source, Sources
from lightning_prompts.methods.dpo_diff.space import Space
from lightning_prompts.objectives.clip import ClipSimilarity, clip_of
from lightning_prompts.objectives.spherical import spherical_distance
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Candidate, DPODiffResult, Problem
from lightning_prompts.sampling.figures import before_and_after, to_png
from lightning_prompts.sampling.seeding import FRESH, FRESH_SEEDS, SEARCH, generator
from lightning_prompts.setting_types import Positive, Rate
from lightning_prompts.unused import refuse_unused

TRIES = 50  # draws for each candidate that is wanted, before a step makes do with fewer
SHOWN = 12  # problems in the grid
Choice = tuple[int, ...]
Solver = Literal["gradient", "evolution", "hybrid", "random"]


class DPODiff(PromptMethod):
    """Search words that make a prompt's images match it better, or words that break it.

    The shortcut text gradient (section 3.3) moves logits over the words of each slot. Candidates are drawn from the logits, then
    recombined and mutated (section 3.4), and scored by their images on a few seeds. The loss is the spherical distance in CLIP
    between the images and the user's prompt.

    Args:
        task: `improve` lowers the loss; `attack` raises it and keeps the meaning.
        solver: `gradient` learns logits and draws from them; `evolution` recombines and mutates; `hybrid` starts the evolution with
            draws from learned logits; `random` draws uniformly.
        positive: Sources of other words for those of the prompt. None: none to improve, the text encoder's neighbors to attack.
        negative: Sources of words for the negative prompt. None: the library to improve, none to attack.
        dictionary: Source of synonyms and antonyms: `wordnet`, a folder with its files, a JSON file in DPO-Diff's layout, or a language
            model: a folder, a hub id, or the URL of an endpoint with OpenAI's protocol.
        neighbours: Neighbors per word in the text encoder. None: 5 to improve; 60 to attack, minus those that change the meaning.
        keep: Words of the prompt that must not change.
        objective: `spherical`, half the squared angle between image and prompt, or `cosine`, one minus its cosine.
        budget: Generations that a search may spend; a generation generates the images of a candidate on all seeds.
        gradient_share: Share of the budget for gradients, with `gradient` and `hybrid`.
        seeds: Images per candidate.
        schedule: Denoiser calls before the gradient: `step-a-b` starts at a and adds one every b steps, `rand-a-b` is random in
            [a, b), `fix-a` is a. None: on a line from 30% to 50% of the sampler's calls, which is the paper's `step-15-2` at its 50
            calls and 20 steps, or `fix-0` with few-step models.
        grad_steps: Denoiser calls that propagate a gradient; all of them, with `fix-0`, give the full gradient. None: all with few-step
            models and no schedule, else 1.
        unchanged: Initial probability that a draw from the logits leaves a slot as it is. None: the first word's logit is 1, as in the
            paper.
        temperature: Temperature of the Gumbel-softmax at the first and at the last step, with a geometric line between them.
        lr: Learning rate of RMSprop.
        population: Candidates per evaluation.
        select: Candidates that have children.
        mutation: Probability that a mutant's word is drawn again.
        threshold: Minimum cosine, in the sentence encoder, of the new prompt and the user's; -1 for any.
        sentence_encoder: Folder or hub id of a sentence-transformers model; None for the text encoder of the CLIP that scores.
        clip: Folder or hub id of the CLIP that scores; None for the one that goes with the backbone.
        **kwargs: See `PromptMethod`.
    """

    prompt: WordChoices
    data_class = Prompts
    result_class = DPODiffResult
    decisive = frozenset({"sampler.num_inference_steps"})  # the search itself draws
    draws = True

    def __init__(
        self,
        *,
        task: Literal["improve", "attack"] = "improve",
        solver: Solver = "hybrid",
        positive: list[Source] | None = None,
        negative: list[Source] | None = None,
        dictionary: str = "wordnet",
        neighbours: Positive | None = None,
        keep: list[str] | None = None,
        objective: Literal["spherical", "cosine"] = "spherical",
        budget: Positive = 40,
        gradient_share: float = 0.1,
        seeds: Positive = 3,
        schedule: str | None = None,
        grad_steps: Positive | None = None,
        unchanged: float | None = 0.5,
        temperature: tuple[float, float] = (1.0, 1.0),
        lr: Rate = 0.1,
        population: Positive = 4,
        select: Positive = 4,
        mutation: float = 0.1,
        threshold: float = 0.9,
        sentence_encoder: str | None = None,
        clip: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.task, self.solver, self.dictionary, self.objective = task, solver, dictionary, objective
        self.positive: list[Source] = positive or []
        self.negative: list[Source] = negative or []
        if positive is None and task == "attack":
            self.positive = ["neighbours"]
        if negative is None and task == "improve":
            self.negative = ["library"]
        if self.negative:
            self.sampler.check_guided(
                "a negative prompt does nothing",
                "search other words for the prompt with --model.negative [] --model.positive [synonyms]",
            )
        if solver in ("evolution", "random"):
            learning = {"gradient_share": gradient_share, "schedule": schedule, "grad_steps": grad_steps, "lr": lr,
                        "temperature": tuple(temperature)}  # fmt: skip
            refuse_unused(DPODiff, f"with --model.solver {solver}", learning)
        if solver in ("gradient", "random"):
            refuse_unused(DPODiff, f"with --model.solver {solver}", {"select": select, "mutation": mutation})
        if solver == "random":
            refuse_unused(DPODiff, "with --model.solver random", {"unchanged": unchanged})
        if not self.positive:
            wording = {"keep": keep, "threshold": threshold, "sentence_encoder": sentence_encoder}
            refuse_unused(DPODiff, "where the prompt's words stay, without --model.positive", wording)
        sources = {*self.positive, *self.negative}
        if not sources & {"synonyms", "antonyms"}:
            refuse_unused(
                DPODiff,
                "unless --model.positive or --model.negative has synonyms or antonyms",
                {"dictionary": dictionary},
            )
        if "neighbours" not in sources:
            refuse_unused(
                DPODiff, "unless --model.positive or --model.negative has neighbours", {"neighbours": neighbours}
            )
        self.budget, self.seeds = budget, seeds
        few = self.sampler.is_few_step
        self.schedule = schedule or ("fix-0" if few else None)
        self.grad_steps = int(grad_steps or (self.sampler.calls if few and schedule is None else 1))
        self.gradient_share = gradient_share if solver in ("gradient", "hybrid") else 0.0
        self.unchanged, self.temperature, self.lr = unchanged, temperature, float(lr)
        self.population, self.select, self.mutation, self.threshold = population, select, mutation, threshold
        self._check()
        self.prompt = WordChoices(self.vocabulary)
        self.clip = ClipSimilarity(clip or clip_of(self.backbone), self.offline)
        self.meaning = Meaning(self.clip, sentence_encoder, self.offline)
        neighbours = neighbours or (5 if task == "improve" else 60)
        self.sources = Sources(
            self.vocabulary, self.positive, self.negative, dictionary, task == "improve", int(neighbours), keep or (), self.offline
        )  # fmt: skip
        self._spaces: dict[str, Space] = {}
        self._plans: dict[int, list[int]] = {}
        self._better: list[Problem] = []
        self._paid: dict[str, dict[tuple[str, str], list[float]]] = {}  # by problem and texts
        self.plan(0)  # refuses schedules

    def _check(self) -> None:
        """Refuse values out of range."""
        if not -1 <= self.threshold <= 1:
            raise UserError(f"--model.threshold must be between -1 and 1, got {self.threshold:g}.")
        if not 0 <= self.gradient_share <= 1:
            raise UserError(f"--model.gradient_share must be between 0 and 1, got {self.gradient_share:g}.")
        if not 0 <= self.mutation <= 1:
            raise UserError(f"--model.mutation must be between 0 and 1, got {self.mutation:g}.")
        if self.unchanged is not None and not 0 < self.unchanged < 1:
            raise UserError(f"--model.unchanged must be above 0 and below 1, got {self.unchanged:g}.")
        if min(self.temperature) <= 0:
            raise UserError(f"--model.temperature must be positive, got {list(self.temperature)}.")
        if self.solver in ("evolution", "hybrid") and self.budget < self.population:
            raise UserError(
                f"--model.budget must be at least --model.population, got {self.budget} and {self.population}; raise it or lower the "
                "population."
            )

    # --- the batch

    def plan(self, seed: int) -> list[int]:
        """Return the denoiser calls before the gradient, for each step that the share of the budget pays for."""
        if seed not in self._plans:
            self._plans[seed] = self._planned(seed)
        return self._plans[seed]

    def _planned(self, seed: int) -> list[int]:
        before: list[int] = []
        spent, share, calls = 0.0, self.gradient_share * self.budget, self.sampler.calls
        if self.schedule is None:
            return linear_plan(calls, self.grad_steps, share)
        while share:
            number = calls_before_gradient(self.schedule, len(before), generator(seed, "schedule", len(before), 0))
            if number + self.grad_steps > calls:
                raise UserError(
                    f"The schedule {self.schedule!r} goes beyond the sampler's {calls} calls; change --model.schedule or "
                    "--model.sampler.num_inference_steps."
                )
            spent += (number + 2 * self.grad_steps) / calls
            if spent > share + 1e-6:
                break
            before.append(number)
        return before

    @property
    def steps(self) -> int:
        """The most steps that a search takes: each learns, or evaluates at least one candidate."""
        return len(self.plan(self.data.seed)) + int(self.budget)

    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch, their words, and the candidates that an earlier run evaluated."""
        for key in {problem.key for problem in problems} - self._paid.keys():
            newest = self.data.folder.read(key)
            self._paid[key] = _losses(DPODiffResult.of(newest).candidates) if newest else {}
        super().set_rows(problems)
        self.prompt.show([self.space(problem.target) for problem in problems])
        self.wanted = self.clip.features_of([problem.target for problem in problems])  # (P, E)
        self.noise = self.draw_noise(problems, SEARCH, self.seeds)

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        super().evict(problem)
        self._paid.pop(problem.key, None)
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
            self._spaces[prompt] = keeping(self.sources.space(prompt), self.meaning, self.threshold)
        return self._spaces[prompt]

    def result(self, row: int) -> DPODiffResult:
        """Return the result of a row so far."""
        return DPODiffResult.of(self.batch[row].record)

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the logits of the users' prompts."""
        return self.prompt.start(self.unchanged)[rows].to(self.device)

    def best_params(self, row: int) -> Tensor:
        """Return the logits of the user's prompt, since no logits belong to the best one."""
        return self.prompt.start(self.unchanged)[row].to(self.device)

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take a gradient step, or evaluate a population."""
        first, losses, learning = len(self.plan(self.data.seed)), list[Tensor](), list[Tensor]()
        for step, some in by_step(batch, rows):
            if step < first:
                losses.append(self.shortcut(some, step))
                learning.append(some)
        if losses:
            self.descend(torch.cat(losses), torch.cat(learning))
            self.log_step(batch, rows, loss=torch.cat(losses))
        trying = [row for row in rows.tolist() if batch.steps[row] >= first]
        wanted = [
            (row, choice) for row in trying for choice in self.broadcast(self.propose(row, batch.steps[row], first))
        ]
        self.try_candidates(wanted)
        for row in set(trying) - {row for row, _ in wanted}:  # nothing new is left
            self.batch[row].stale = int(self.patience)

    # --- the shortcut text gradient

    def shortcut(self, rows: Tensor, step: int) -> Tensor:
        """Compute losses (Q,) of relaxed prompts, at clean images predicted after a part of the denoiser calls (section 3.3)."""
        plan, (warm, cold) = self.plan(self.data.seed), self.temperature
        before, done = plan[step], step / max(1, len(plan) - 1)
        sides = self.prompt(rows, self.gumbel(rows, step), warm ** (1 - done) * cold**done)
        told, away = (
            self.backbone.encode(side.ids, side.embeddings, side.texts, negative)
            for side, negative in zip(sides, (False, True), strict=True)
        )
        calls = before + self.grad_steps
        cost = self.sampler.cost(calls, self.grad_steps)
        self.add_cost(rows, cost * self.seeds)
        for row in rows.tolist():
            self.spend(row, cost / self.sampler.cost())
        return self.shortcut_loss(rows, told, away, calls)

    def descend(self, loss: Tensor, rows: Tensor) -> None:
        """Step the logits of the problems `rows` (Q,) on their losses (Q,)."""
        self.step_active(loss, rows, clip=0.025)
        with torch.no_grad():
            # The first word of a slot may start outside of the released code's range [0, 3], and may then stay there.
            begun = self.prompt.start(self.unchanged)
            most = begun[:, :, :1].clamp(min=3)
            self.prompt.logits.copy_(self.prompt.logits.maximum(begun.clamp(max=0)).minimum(most))

    def shortcut_loss(self, rows: Tensor, told: Tensor, away: Tensor, calls: int) -> Tensor:
        """Compute losses (Q,) at the clean images predicted after `calls` denoiser calls."""
        noise, wanted = self.noise[rows].flatten(0, 1), self.wanted[rows].repeat_interleave(self.seeds, 0)
        losses, _ = self.sampler.sample_and_score(
            repeat(told, self.seeds), repeat(away, self.seeds), noise,
            lambda latents, some: (self.loss(self.backbone.decode(latents), wanted[some]), {}), self.grad_steps, calls,
        )  # fmt: skip
        return losses.view(len(rows), self.seeds).mean(1)

    def loss(self, pictures: Tensor, wanted: Tensor) -> Tensor:
        """Compute losses (B,): the distances of images (B, 3, H, W) from features (B, E), negative for an attack."""
        distance = self.distance(self.clip.features(pictures), wanted)
        return distance if self.task == "improve" else -distance

    def distance(self, features: Tensor, wanted: Tensor) -> Tensor:
        """Compute the distances (...) of features (..., E) of images and texts."""
        return (
            spherical_distance(features, wanted) if self.objective == "spherical" else 1 - (features * wanted).sum(-1)
        )

    def gumbel(self, rows: Tensor, step: int, tries: int = 0) -> Tensor:
        """Draw Gumbel noise (Q, S, W), a function of the seed, the problem and the step, whatever the other problems' words are."""
        noise = torch.zeros(len(rows), *self.prompt.logits.shape[1:])
        for q, row in enumerate(rows.tolist()):
            draw = generator(self.data.seed, f"{self.batch[row].record.key}/gumbel", step, tries)
            for s, slot in enumerate(self.prompt.spaces[row].slots):
                uniform = torch.rand(len(slot.words), generator=draw).clamp(1e-7, 1 - 1e-7)
                noise[q, s, : len(slot.words)] = -(-uniform.log()).log()
        return noise.to(self.device)

    # --- candidates

    def propose(self, row: int, step: int, first: int) -> list[Choice]:
        """Return new candidates of a problem, up to a population and to what is left of the budget."""
        problem, space = self.batch[row].record, self.prompt.spaces[row]
        result = DPODiffResult.of(problem)
        count = min(int(self.population), int(self.budget - (result.budget or 0) + 1e-6))
        known = {(candidate["prompt"], candidate["negative_prompt"]) for candidate in result.candidates}
        ranked = sorted(result.candidates, key=lambda candidate: sum(candidate["losses"]))
        parents: list[Choice] = [tuple(candidate["choice"]) for candidate in ranked[: self.select]]
        breeding = self.solver in ("evolution", "hybrid") and step > first and len(parents) > 1
        chosen: dict[tuple[str, str], Choice] = {}
        for begin in range(0, TRIES * count, max(1, count)):
            drawn: list[Choice] = []
            for attempt in range(begin, begin + count):
                draw = generator(self.data.seed, f"{problem.key}/candidates", step, attempt)
                if breeding:
                    drawn.append(self.child(parents, space, draw, mutant=attempt % 2 == 0))
                elif self.solver == "random":
                    drawn.append(uniform(space, draw))
                else:
                    drawn.append(self.learned(row, step, attempt, mode=step == first and attempt == 0))
            new = {texts: choice for choice in drawn if (texts := space.texts(choice)) not in known}
            known |= new.keys()
            chosen |= self.allowed(problem, new)
            if len(chosen) >= count:
                break
        return list(chosen.values())[:count]

    def learned(self, row: int, step: int, attempt: int, mode: bool = False) -> Choice:
        """Draw from the softmax of a problem's logits, or return its mode."""
        rows = torch.tensor([row])
        noise = self.gumbel(rows, step, attempt) * (not mode)
        return tuple(self.prompt.perturbed(rows, noise)[0].argmax(1)[: len(self.prompt.spaces[row].slots)].tolist())

    def child(self, parents: Sequence[Choice], space: Space, draw: torch.Generator, mutant: bool) -> Choice:
        """Mutate one parent, each word with a small probability, or cross two parents uniformly."""
        one, other = (parents[i] for i in torch.randperm(len(parents), generator=draw)[:2].tolist())
        if mutant:
            other = uniform(space, draw)
        chance = self.mutation if mutant else 0.5
        changed = (torch.rand(len(one), generator=draw) < chance).tolist()
        return tuple(b if change else a for a, b, change in zip(one, other, changed, strict=True))

    def allowed(self, problem: Problem, choices: dict[tuple[str, str], Choice]) -> dict[tuple[str, str], Choice]:
        """Return the candidates that keep the meaning."""
        kept = self.meaning.kept(problem.target, [prompt for prompt, _ in choices], self.threshold)
        return {texts: choice for (texts, choice), keeps in zip(choices.items(), kept, strict=True) if keeps}

    @torch.no_grad()
    def try_candidates(self, wanted: Sequence[tuple[int, Choice]], cost: float = 1) -> None:
        """Evaluate candidates of several problems in one batch, and keep the best.

        If an earlier run evaluated all of them, its losses are used. If it was killed while it saved them, all are evaluated again,
        so that the calls are those of an uninterrupted search.
        """
        texts = [self.prompt.spaces[row].texts(choice) for row, choice in wanted]
        paid = [self._paid[self.batch[row].record.key] for row, _ in wanted]
        judged = all(pair in losses for pair, losses in zip(texts, paid, strict=True))
        new = range(0 if judged else len(wanted))
        rows = torch.tensor([wanted[i][0] for i in new], dtype=torch.long)
        with self.trainer.precision_plugin.forward_context():  # also before the first step, to be comparable
            losses = self.evaluate([texts[i] for i in new], self.noise[rows], self.wanted[rows]).tolist()
        for i, values in zip(new, losses, strict=True):
            paid[i][texts[i]] = values
        for (row, choice), pair, known in zip(wanted, texts, paid, strict=True):
            self.add_cost(torch.tensor([row]), self.seeds * self.sampler.cost())
            self.spend(row, cost)
            self.keep(row, choice, pair, known[pair])
        for row in {row for row, _ in wanted}:
            self.data.folder.save_or_warn(self.batch[row].record)

    def keep(self, row: int, choice: Choice, texts: tuple[str, str], losses: list[float]) -> None:
        """Add an evaluated candidate to a problem's result, and make it the best if it is."""
        problem, (prompt, negative), mean = self.batch[row].record, texts, sum(losses) / len(losses)
        result = DPODiffResult.of(problem)
        spent = result.budget or 0.0
        result.candidates.append(
            Candidate(prompt=prompt, negative_prompt=negative, choice=list(choice), losses=losses, budget=spent)
        )
        if problem.offer(prompt, mean, self.prompt.tokens(prompt)):
            problem.negative_prompt, result.loss_after = negative, [abs(loss) for loss in losses]
            result.words = [
                [slot.name, slot.words[i]] for slot, i in zip(self.prompt.spaces[row].slots, choice, strict=True)
            ]
            self._better.append(problem)

    def evaluate(self, texts: Sequence[tuple[str, str]], noise: Tensor, wanted: Tensor) -> Tensor:
        """Compute losses (B, N) of B pairs of a prompt and a negative prompt, on noise (B, N, C, h, w)."""
        if not texts:
            return noise.new_zeros(0, noise.shape[1])
        count = noise.shape[1]
        told = repeat(self.encode([text for text, _ in texts]), count)
        away = repeat(self.encode([negative for _, negative in texts], negative=True), count)
        wanted = wanted.repeat_interleave(count, 0)
        losses, _ = self.sampler.sample_and_score(
            told, away, noise.flatten(0, 1), lambda latents, some: (self.loss(self.backbone.decode(latents), wanted[some]), {})
        )  # fmt: skip
        return losses.view(len(texts), count)

    def spend(self, row: int, generations: float) -> None:
        """Add to the generations that a problem spent."""
        result = self.result(row)
        result.budget = (result.budget or 0) + generations

    # --- results

    def score(self, rows: Tensor) -> list[Problem]:
        """Evaluate the users' prompts before the first step; later return the problems that improved."""
        new = [row for row in rows.tolist() if self.result(row).loss_before is None]
        if new:  # the persons' own prompts are free
            self.try_candidates([(row, (0,) * len(self.prompt.spaces[row].slots)) for row in new], cost=0)
        for row in new:
            problem, losses = self.batch[row].record, self.result(row).candidates[0]["losses"]
            self.result(row).loss_before = [abs(loss) for loss in losses]
            problem.initial_validation_loss = sum(losses) / len(losses)
        better, self._better = self._better, []
        return better

    def finish_done(self, rows: Tensor) -> None:
        """Finish the problems that spent their budget."""
        for row in rows.tolist():
            if (self.result(row).budget or 0) + 1 > self.budget + 1e-6:
                self.batch[row].stale = int(self.patience)
        super().finish_done(rows)

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the losses of the best prompts on the seeds of the search."""
        pairs = [(str(problem.prompt), problem.negative_prompt or "") for problem in problems]
        wanted = self.clip.features_of([problem.target for problem in problems])
        return self.evaluate(pairs, self.draw_noise(problems, SEARCH, self.seeds), wanted).mean(1)

    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return the images of the users' prompts above those of the best ones, from the seeds of the search."""
        drawn = self.both(problems, self.draw_noise(problems, SEARCH, self.seeds))
        return before_and_after(*drawn, [problem.shown for problem in problems])

    def both(self, problems: Sequence[Problem], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw images (P, N, 3, H, W) of the users' prompts and of the best ones from noise (P, N, C, h, w)."""
        count = noise.shape[1]
        originals, prompts, negatives = (
            [text for text in texts for _ in range(count)]
            for texts in zip(*((p.target, str(p.prompt), p.negative_prompt or "") for p in problems), strict=True)
        )
        drawn = self.draw(originals, noise.flatten(0, 1)), self.draw(prompts, noise.flatten(0, 1), negatives)
        return drawn[0].unflatten(0, noise.shape[:2]), drawn[1].unflatten(0, noise.shape[:2])

    @torch.no_grad()
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score the best prompts on fresh seeds, also by the held-out CLIP."""
        drawn = self.both(problems, self.draw_noise(problems, FRESH, FRESH_SEEDS))
        scores.compare(self, problems, *drawn)
        wanted = self.clip.features_of([problem.target for problem in problems]).unsqueeze(1)  # (P, 1, E)
        before, after = (
            self.distance(self.clip.features_of_many(pictures, self.microbatch.size), wanted) for pictures in drawn
        )
        for p, problem in enumerate(problems):
            result = DPODiffResult.of(problem)
            result.fresh_loss_before, result.fresh_loss_after = before[p].tolist(), after[p].tolist()
            result.similarity = float(self.meaning(problem.target, [str(problem.prompt)]))

    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the grid."""
        atomic_write(folder.grid, to_png(self.preview(problems[:SHOWN])))

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return RMSprop with momentum, as in the released code."""
        return torch.optim.RMSprop([self.prompt.logits], lr=self.lr, alpha=0.99, eps=1e-8, momentum=0.5)


def _losses(candidates: Sequence[Candidate]) -> dict[tuple[str, str], list[float]]:
    """Return the losses of candidates by their texts."""
    return {(one["prompt"], one["negative_prompt"]): one["losses"] for one in candidates}


def calls_before_gradient(schedule: str, step: int, draw: torch.Generator) -> int:
    """Return the denoiser calls before the gradient at a step.

    Args:
        schedule: `step-a-b`, `rand-a-b` with a < b, or `fix-a`.
        step: Index of the step.
        draw: Generator for `rand-a-b`.

    Raises:
        UserError: The schedule is none of these.
    """
    match = re.fullmatch(r"(step|rand|fix)-(\d+)(?:-(\d+))?", schedule)
    kind, first, second = match.groups() if match else ("", "0", None)
    if kind == "fix" and second is None:
        return int(first)
    if kind == "step" and second and int(second) > 0:
        return int(first) + step // int(second)
    if kind == "rand" and second and int(first) < int(second):
        return int(torch.randint(int(first), int(second), (), generator=draw))
    raise UserError(f"--model.schedule must be like step-15-2, rand-15-25 or fix-20, got {schedule!r}.")


def linear_plan(calls: int, grad_steps: int, share: float) -> list[int]:
    """Plan the denoiser calls before the gradient: from 30% to 50% of a sampler's calls, on a line.

    Args:
        calls: Calls of the sampler.
        grad_steps: Denoiser calls that propagate a gradient, which cost twice.
        share: Generations that the steps may cost together; a generation is `calls` calls.

    Returns:
        floor(calls * (0.3 + 0.2 * i / n)) for each of the n steps that the share pays for.

    Raises:
        UserError: So many calls with a gradient do not fit behind them.
    """
    plan: list[int] = []
    while True:
        count = len(plan) + 1
        longer = [calls * (3 * count + 2 * i) // (10 * count) for i in range(count)]
        if sum(number + 2 * grad_steps for number in longer) > (share + 1e-6) * calls:
            break
        plan = longer
    if plan and plan[-1] + grad_steps > calls:
        raise UserError(
            f"{grad_steps} calls with a gradient after {plan[-1]} others go beyond the sampler's {calls} calls; lower "
            "--model.grad_steps, or give --model.schedule fix-0."
        )
    return plan


def uniform(space: Space, draw: torch.Generator) -> Choice:
    """Draw a word of each slot uniformly."""
    return tuple(int(torch.randint(len(slot.words), (), generator=draw)) for slot in space.slots)
