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
from lightning_prompts.types import Positive, Rate
from lightning_prompts.unused import refuse_unused

TRIES = 50  # draws for each candidate that is wanted, before a step makes do with fewer
SHOWN = 12  # problems in the grid
Choice = tuple[int, ...]
Solver = Literal["gradient", "evolution", "hybrid", "random"]


class DPODiff(PromptMethod):
    """Searches words for a prompt by the pictures that it draws: a negative prompt or better words, or words that break it.

    Logits over the words of each slot are moved by the shortcut text gradient (section 3.3), and candidates are drawn from them,
    recombined and mutated (section 3.4); each is judged by what it draws from a few seeds. The loss is the spherical distance, in
    CLIP, between the pictures and the person's own prompt.

    Args:
        task: `improve` lowers the loss; `attack` raises it and keeps the meaning.
        solver: `gradient` learns logits and draws from them; `evolution` recombines and mutates; `hybrid` begins the evolution with
            draws from learned logits; `random` draws at random.
        positive: Where other words for the prompt's come from. None: nothing to improve, the text encoder's neighbours to attack.
        negative: Where words of the negative prompt come from. None: the library to improve, nothing to attack.
        dictionary: Where synonyms and antonyms come from: `wordnet`, a folder with its files, a JSON file in DPO-Diff's layout, or
            a language model: a folder, a hub id, or the URL of an endpoint that speaks OpenAI's protocol.
        neighbours: How many of the text encoder's neighbours a word has. None: 5 to improve; 60 to attack, of which those that do
            not keep the meaning are left out.
        keep: Words of the prompt that stay as they are.
        objective: `spherical`, half the squared angle between picture and prompt, or `cosine`, one minus its cosine.
        budget: Generations that a search may spend; a generation draws all seeds' pictures of a candidate.
        gradient_share: Part of the budget for gradients, with `gradient` and `hybrid`.
        seeds: Pictures that a candidate is judged by.
        schedule: Calls of the denoiser before the gradient: `step-a-b` begins at a and goes one on every b steps, `rand-a-b` is
            random in [a, b), `fix-a` is a. None: on a line from 30% to 50% of the sampler's calls, which is the paper's `step-15-2`
            with its 50 calls and 20 steps, or `fix-0` with models that draw in few calls.
        grad_steps: Calls that pass a gradient on; as many as there are, with `fix-0`, are the full gradient. None: all, without a
            schedule, of those models that draw in few, else 1.
        unchanged: Chance that a draw from the logits leaves a slot as it is, at the beginning. None: the first word's logit is 1,
            as in the paper.
        temperature: Of the Gumbel-softmax, at the first step and, on a geometric line, at the last.
        lr: Step size of RMSprop.
        population: Candidates that are evaluated together.
        select: Candidates that have children.
        mutation: Chance that a mutant's word is drawn anew.
        threshold: Least cosine, in the sentence encoder, of the found prompt and the person's; -1 for any.
        sentence_encoder: Folder or hub id of a sentence-transformers model; None for the text tower of the CLIP that judges.
        clip: Folder or hub id of the CLIP that judges; None for the one that goes with the backbone.
        **kwargs: See `PromptMethod`.
    """

    prompt: WordChoices
    data_class = Prompts
    result_class = DPODiffResult
    decisive = frozenset({"sampling_steps"})  # the search itself draws
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
        """Refuses settings that make no search."""
        if not -1 <= self.threshold <= 1:
            raise UserError(f"The threshold {self.threshold:g} is no cosine; give --model.threshold in [-1, 1].")
        if not 0 <= self.gradient_share <= 1:
            raise UserError(f"The share {self.gradient_share:g} is no part; give --model.gradient_share in [0, 1].")
        if not 0 <= self.mutation <= 1:
            raise UserError(f"The chance {self.mutation:g} is none; give --model.mutation in [0, 1].")
        if self.unchanged is not None and not 0 < self.unchanged < 1:
            raise UserError(f"The chance {self.unchanged:g} is none; give --model.unchanged in (0, 1).")
        if min(self.temperature) <= 0:
            raise UserError(f"Temperatures are positive, not {list(self.temperature)}; change --model.temperature.")
        if self.solver in ("evolution", "hybrid") and self.budget < self.population:
            raise UserError(
                f"A budget of {self.budget} generations does not evaluate a population of {self.population}; raise --model.budget "
                "or lower --model.population."
            )

    # --- the wave

    def plan(self, seed: int) -> list[int]:
        """Calls of the denoiser before those that pass a gradient on, a step; as many steps as the gradient's share pays for."""
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
                    "--model.sampling_steps."
                )
            spent += (number + 2 * self.grad_steps) / calls
            if spent > share + 1e-6:
                break
            before.append(number)
        return before

    @property
    def steps(self) -> int:
        """Steps that a search takes at most: each learns or evaluates a candidate."""
        return len(self.plan(self.data.seed)) + int(self.budget)

    def set_rows(self, problems: list[Problem]) -> None:
        """Makes problems the wave, with the words that can be chosen for them, and remembers what an earlier process has paid for."""
        for key in {problem.key for problem in problems} - self._paid.keys():
            newest = self.data.folder.read(key)
            self._paid[key] = _losses(DPODiffResult.of(newest).candidates) if newest else {}
        super().set_rows(problems)
        self.prompt.show([self.space(problem.target) for problem in problems])
        self.wanted = self.clip.features_of([problem.target for problem in problems])  # (P, E)
        self.noise = self.draw_noise(problems, SEARCH, self.seeds)

    def evict(self, problem: Problem) -> None:
        """Forgets what is remembered of a problem that has left the wave."""
        super().evict(problem)
        self._paid.pop(problem.key, None)
        self._spaces.pop(problem.target, None)

    @property
    def identities(self) -> list[dict[str, Any]]:
        """What makes two problems of one prompt: of each problem its settings."""
        return [{"task": self.task}]

    def check(self, prompt: str) -> None:
        """Refuses prompts without words to choose, and those with a token that the text encoder has no embedding for."""
        self.vocabulary.token_lists([prompt])
        self.space(prompt)

    def space(self, prompt: str) -> Space:
        """The words that can be chosen for a prompt; a UserError where there are none."""
        if prompt not in self._spaces:
            self._spaces[prompt] = keeping(self.sources.space(prompt), self.meaning, self.threshold)
        return self._spaces[prompt]

    def result(self, row: int) -> DPODiffResult:
        """Return the result of a row so far."""
        return DPODiffResult.of(self.batch[row].record)

    def init_params(self, rows: Tensor) -> Tensor:
        """The persons' prompts."""
        return self.prompt.start(self.unchanged)[rows].to(self.device)

    def best_params(self, row: int) -> Tensor:
        """The person's prompt, as logits do not say what has been found."""
        return self.prompt.start(self.unchanged)[row].to(self.device)

    def step(self, batch: Step, rows: Tensor) -> None:
        """One step of the gradient, or the evaluation of a population."""
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
        """Losses (Q,) of the mixtures of words that the problems `rows` (Q,) draw at a step, at predicted clean pictures."""
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
        """Moves the logits of the problems `rows` (Q,) down the gradient of their losses (Q,)."""
        self.step_active(loss, rows, clip=0.025)
        with torch.no_grad():
            # What stands in a slot may begin outside the range [0, 3] of the released code, and is let stay where it began.
            begun = self.prompt.start(self.unchanged)
            most = begun[:, :, :1].clamp(min=3)
            self.prompt.logits.copy_(self.prompt.logits.maximum(begun.clamp(max=0)).minimum(most))

    def shortcut_loss(self, rows: Tensor, told: Tensor, away: Tensor, calls: int) -> Tensor:
        """What is minimised, (Q,), at the clean pictures that are predicted after so many calls of the denoiser."""
        noise, wanted = self.noise[rows].flatten(0, 1), self.wanted[rows].repeat_interleave(self.seeds, 0)
        losses, _ = self.sampler.sample_and_score(
            repeat(told, self.seeds), repeat(away, self.seeds), noise,
            lambda latents, some: (self.loss(self.backbone.decode(latents), wanted[some]), {}), self.grad_steps, calls,
        )  # fmt: skip
        return losses.view(len(rows), self.seeds).mean(1)

    def loss(self, pictures: Tensor, wanted: Tensor) -> Tensor:
        """What is minimised, (B,): the distances of pictures (B, 3, H, W) from features (B, E); those of an attack negative."""
        distance = self.distance(self.clip.features(pictures), wanted)
        return distance if self.task == "improve" else -distance

    def distance(self, features: Tensor, wanted: Tensor) -> Tensor:
        """How far features (..., E) of pictures are from those of texts, (...)."""
        return (
            spherical_distance(features, wanted) if self.objective == "spherical" else 1 - (features * wanted).sum(-1)
        )

    def gumbel(self, rows: Tensor, step: int, tries: int = 0) -> Tensor:
        """Standard Gumbel noise (Q, S, W) at a step's address, the same for a word whatever the other problems' words are."""
        noise = torch.zeros(len(rows), *self.prompt.logits.shape[1:])
        for q, row in enumerate(rows.tolist()):
            draw = generator(self.data.seed, f"{self.batch[row].record.key}/gumbel", step, tries)
            for s, slot in enumerate(self.prompt.spaces[row].slots):
                uniform = torch.rand(len(slot.words), generator=draw).clamp(1e-7, 1 - 1e-7)
                noise[q, s, : len(slot.words)] = -(-uniform.log()).log()
        return noise.to(self.device)

    # --- candidates

    def propose(self, row: int, step: int, first: int) -> list[Choice]:
        """Candidates that a problem has not evaluated yet, as many as a population has and the budget still pays for."""
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
        """A draw from the softmax of a problem's logits, or its mode."""
        rows = torch.tensor([row])
        noise = self.gumbel(rows, step, attempt) * (not mode)
        return tuple(self.prompt.perturbed(rows, noise)[0].argmax(1)[: len(self.prompt.spaces[row].slots)].tolist())

    def child(self, parents: Sequence[Choice], space: Space, draw: torch.Generator, mutant: bool) -> Choice:
        """A mutant of one parent, each word drawn anew with a small chance, or a uniform crossover of two."""
        one, other = (parents[i] for i in torch.randperm(len(parents), generator=draw)[:2].tolist())
        if mutant:
            other = uniform(space, draw)
        chance = self.mutation if mutant else 0.5
        changed = (torch.rand(len(one), generator=draw) < chance).tolist()
        return tuple(b if change else a for a, b, change in zip(one, other, changed, strict=True))

    def allowed(self, problem: Problem, choices: dict[tuple[str, str], Choice]) -> dict[tuple[str, str], Choice]:
        """The candidates that keep the meaning."""
        kept = self.meaning.kept(problem.target, [prompt for prompt, _ in choices], self.threshold)
        return {texts: choice for (texts, choice), keeps in zip(choices.items(), kept, strict=True) if keeps}

    @torch.no_grad()
    def try_candidates(self, wanted: Sequence[tuple[int, Choice]], cost: float = 1) -> None:
        """Draws and judges candidates of problems, all in one batch, and keeps what is best.

        None is drawn again if an earlier process has judged them all. If it was killed while it wrote that down, all are drawn, so
        that the calls are those of a search that was not interrupted.
        """
        texts = [self.prompt.spaces[row].texts(choice) for row, choice in wanted]
        paid = [self._paid[self.batch[row].record.key] for row, _ in wanted]
        judged = all(pair in losses for pair, losses in zip(texts, paid, strict=True))
        new = range(0 if judged else len(wanted))
        rows = torch.tensor([wanted[i][0] for i in new], dtype=torch.long)
        with self.trainer.precision_plugin.forward_context():  # also before the first step, so that all compare
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
        """Adds an evaluated candidate to a problem, as its best if it is."""
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
        """Losses (B, N) of B pairs of a prompt and a negative prompt, drawn from noise (B, N, C, h, w)."""
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
        """Adds to what a problem's search has cost."""
        result = self.result(row)
        result.budget = (result.budget or 0) + generations

    # --- results

    def score(self, rows: Tensor) -> list[Problem]:
        """Judges the persons' prompts before the first step; afterwards says which problems have got better."""
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
        """Takes out of the wave what has spent its budget."""
        for row in rows.tolist():
            if (self.result(row).budget or 0) + 1 > self.budget + 1e-6:
                self.batch[row].stale = int(self.patience)
        super().finish_done(rows)

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """The losses of the found prompts, drawn again from the seeds of the search."""
        pairs = [(str(problem.prompt), problem.negative_prompt or "") for problem in problems]
        wanted = self.clip.features_of([problem.target for problem in problems])
        return self.evaluate(pairs, self.draw_noise(problems, SEARCH, self.seeds), wanted).mean(1)

    def preview(self, problems: list[Problem]) -> Image.Image:
        """What the persons' prompts draw above what the found ones draw, from the seeds of the search."""
        drawn = self.both(problems, self.draw_noise(problems, SEARCH, self.seeds))
        return before_and_after(*drawn, [problem.shown for problem in problems])

    def both(self, problems: Sequence[Problem], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (P, N, 3, H, W) of the persons' prompts, and of the found ones, from noise (P, N, C, h, w)."""
        count = noise.shape[1]
        originals, prompts, negatives = (
            [text for text in texts for _ in range(count)]
            for texts in zip(*((p.target, str(p.prompt), p.negative_prompt or "") for p in problems), strict=True)
        )
        drawn = self.draw(originals, noise.flatten(0, 1)), self.draw(prompts, noise.flatten(0, 1), negatives)
        return drawn[0].unflatten(0, noise.shape[:2]), drawn[1].unflatten(0, noise.shape[:2])

    @torch.no_grad()
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Judges the found prompts on fresh seeds, also by the held-out CLIP."""
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
        """What the found prompts draw below what the persons' draw."""
        atomic_write(folder.grid, to_png(self.preview(problems[:SHOWN])))

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """RMSprop with momentum, as in the released code."""
        return torch.optim.RMSprop([self.prompt.logits], lr=self.lr, alpha=0.99, eps=1e-8, momentum=0.5)


def _losses(candidates: Sequence[Candidate]) -> dict[tuple[str, str], list[float]]:
    """By texts."""
    return {(one["prompt"], one["negative_prompt"]): one["losses"] for one in candidates}


def calls_before_gradient(schedule: str, step: int, draw: torch.Generator) -> int:
    """Calls of the denoiser before those that pass a gradient on, at a step of the search.

    Args:
        schedule: `step-a-b`, `rand-a-b` with a < b, or `fix-a`.
        step: Number of the step, from 0.
        draw: Decides `rand-a-b`.

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
    raise UserError(f"The schedule {schedule!r} is unknown; give --model.schedule step-15-2, rand-15-25 or fix-20.")


def linear_plan(calls: int, grad_steps: int, share: float) -> list[int]:
    """Plan calls of the denoiser before those that pass a gradient on: from 30% to 50% of a sampler's calls, on a line.

    Args:
        calls: Calls of the sampler.
        grad_steps: Calls that pass a gradient on, which cost twice.
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
    """A choice in which every word of a slot has the same chance."""
    return tuple(int(torch.randint(len(slot.words), (), generator=draw)) for slot in space.slots)
