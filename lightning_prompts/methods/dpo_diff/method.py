"""DPO-Diff: on discrete prompt optimization for diffusion models (arXiv 2407.01606)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Adafactor, Muon

from lightning_prompts.backbones import repeat
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.base import WordSearch
from lightning_prompts.methods.dpo_diff.evolution import cross, mutate, uniform
from lightning_prompts.methods.dpo_diff.schedule import plan_steps
from lightning_prompts.methods.dpo_diff.space import Choice
from lightning_prompts.optimizers import build_optimizer, check_optimizer, describe_optimizer
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import Positive
from lightning_prompts.unused import default_of, refuse_unused

TRIES = 50  # draws per candidate, before a step continues with fewer
CLIP = 0.025  # largest magnitude of a gradient's element, as in the released code
Solver = Literal["gradient", "evolution", "hybrid", "random"]


class DPODiff(WordSearch):
    """Search words that make a prompt's images match it better, or words that break it.

    The shortcut text gradient (section 3.3) moves logits over the words of each slot. Candidates are drawn from the
    logits, then recombined and mutated (section 3.4), and scored by their images on a few seeds. The loss is the
    spherical distance in CLIP between the images and the user's prompt.

    Args:
        solver: `gradient` learns logits and draws from them; `evolution` recombines and mutates; `hybrid` starts the
            evolution with draws from learned logits; `random` draws uniformly.
        gradient_share: Share of the budget for gradients, with `gradient` and `hybrid`.
        schedule: Denoiser calls before the gradient: `step-a-b` starts at a and adds one every b steps, `rand-a-b` is
            random in [a, b), `fix-a` is a. None: linear from 30% to 50% of the sampler's calls, which is the paper's
            `step-15-2` at its 50 calls and 20 steps, or `fix-0` with few-step models.
        grad_steps: Denoiser calls that propagate a gradient; all of them, with `fix-0`, give the full gradient. None:
            all with few-step models and no schedule, else 1.
        init_keep_prob: Initial probability that a draw from the logits leaves a slot as it is. None: the first word's
            logit is 1, as in the paper.
        temperature: Temperature of the Gumbel-softmax at the first and at the last step, with a geometric line between
            them.
        optimizer: Optimizer of the logits, which moves each element by itself; RMSprop with momentum is that of the
            released code.
        population: Candidates per evaluation.
        elites: Candidates that have children.
        mutation: Probability that a mutant's word is drawn again.
        **kwargs: See `WordSearch`.
    """

    def __init__(
        self,
        *,
        solver: Solver = "hybrid",
        gradient_share: float = 0.1,
        schedule: str | None = None,
        grad_steps: Positive | None = None,
        init_keep_prob: float | None = 0.5,
        temperature: tuple[float, float] = (1.0, 1.0),
        optimizer: OptimizerCallable = lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5),
        population: Positive = 4,
        elites: Positive = 4,
        mutation: float = 0.1,
        **kwargs: Any,
    ) -> None:
        example = check_optimizer(optimizer)
        if isinstance(example, Adafactor | Muon):  # padding of the logits would change their steps
            raise UserError(
                f"--model.optimizer {type(example).__name__} scales the steps of all logits together, but each needs "
                "its own; give another, such as RMSprop."
            )
        super().__init__(**kwargs)
        if solver in ("evolution", "random"):
            learning = {"gradient_share": gradient_share, "schedule": schedule, "grad_steps": grad_steps,
                        "temperature": tuple(temperature)}  # fmt: skip
            refuse_unused(DPODiff, f"with --model.solver {solver}", learning)
            if describe_optimizer(example) != describe_optimizer(check_optimizer(default_of(DPODiff, "optimizer"))):
                raise UserError(f"--model.optimizer has no effect with --model.solver {solver}; leave it out.")
        if solver in ("gradient", "random"):
            refuse_unused(DPODiff, f"with --model.solver {solver}", {"elites": elites, "mutation": mutation})
        if solver == "random":
            refuse_unused(DPODiff, "with --model.solver random", {"init_keep_prob": init_keep_prob})
        few = self.sampler.is_few_step
        self.solver, self.schedule = solver, schedule or ("fix-0" if few else None)
        self.grad_steps = int(grad_steps or (self.sampler.calls if few and schedule is None else 1))
        self.gradient_share = gradient_share if solver in ("gradient", "hybrid") else 0.0
        self.init_keep_prob, self.temperature, self.optimizer = init_keep_prob, temperature, optimizer
        self.population, self.elites, self.mutation = population, elites, mutation
        self._check()
        self._plans: dict[int, list[int]] = {}  # by seed
        self.plan(0)  # refuses schedules

    def _check(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.gradient_share <= 1:
            raise UserError(f"--model.gradient_share must be between 0 and 1, got {self.gradient_share:g}.")
        if not 0 <= self.mutation <= 1:
            raise UserError(f"--model.mutation must be between 0 and 1, got {self.mutation:g}.")
        if self.init_keep_prob is not None and not 0 < self.init_keep_prob < 1:
            raise UserError(f"--model.init_keep_prob must be above 0 and below 1, got {self.init_keep_prob:g}.")
        if min(self.temperature) <= 0:
            raise UserError(f"--model.temperature must be positive, got {list(self.temperature)}.")
        if self.solver in ("evolution", "hybrid") and self.budget < self.population:
            raise UserError(
                f"--model.budget must be at least --model.population, got {self.budget} and {self.population}; raise "
                "it or lower the population."
            )

    def plan(self, seed: int) -> list[int]:
        """Return the denoiser calls before the gradient, for each step that the share of the budget pays for."""
        if seed not in self._plans:
            share = self.gradient_share * self.budget
            self._plans[seed] = plan_steps(self.schedule, self.sampler.calls, self.grad_steps, share, seed)
        return self._plans[seed]

    @property
    def steps(self) -> int:  # type: ignore[override]
        """The most steps that a search takes: each learns, or evaluates at least one candidate."""
        return len(self.plan(self.data.seed)) + int(self.budget)

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the logits of the users' prompts."""
        return self.prompt.init_logits(self.init_keep_prob)[rows].to(self.device)

    def best_params(self, row: int) -> Tensor:
        """Return the logits of the user's prompt, since no logits belong to the best one."""
        return self.init_params(torch.tensor([row]))[0]

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take a gradient step, or evaluate a population."""
        first, losses, learning = len(self.plan(self.data.seed)), list[Tensor](), list[Tensor]()
        for step, some in batch.by_step(rows):
            if step < first:
                losses.append(self.shortcut(some, step))
                learning.append(some)
        if losses:
            self.descend(torch.cat(losses), torch.cat(learning))
            self.log_step(batch, rows, loss=torch.cat(losses))
        trying = [row for row in rows.tolist() if batch.steps[row] >= first]
        candidates = [
            (row, choice)
            for row in trying
            for choice in self.microbatch.broadcast(self.propose(row, batch.steps[row], first))
        ]
        self.try_candidates(candidates)
        for row in set(trying) - {row for row, _ in candidates}:  # all candidates are known
            self.batch[row].stale = int(self.patience)

    # --- the shortcut text gradient

    def shortcut(self, rows: Tensor, step: int) -> Tensor:
        """Compute losses (Q,) of relaxed prompts on images predicted after some denoiser calls (section 3.3)."""
        plan, (first, last) = self.plan(self.data.seed), self.temperature
        calls, progress = plan[step] + self.grad_steps, step / max(1, len(plan) - 1)
        positive, negative = self.prompt(rows, self.gumbel(rows, step), first ** (1 - progress) * last**progress)
        prompt_embeds = self.backbone.encode(positive.ids, positive.embeddings, positive.texts)
        negative_prompt_embeds = self.backbone.encode(negative.ids, negative.embeddings, negative.texts, negative=True)
        cost = self.sampler.cost(calls, self.grad_steps)
        self.batch.add_cost(rows, cost * self.seeds)
        for row in rows.tolist():
            self.spend(row, cost / self.sampler.cost())
        return self.shortcut_loss(rows, prompt_embeds, negative_prompt_embeds, calls)

    def shortcut_loss(self, rows: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, calls: int) -> Tensor:
        """Compute losses (Q,) at the clean images predicted after `calls` denoiser calls."""
        text_features = self.text_features[rows].repeat_interleave(self.seeds, 0)

        def score(latents: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(self.backbone.decode(latents), text_features[indices]), {}

        losses, _ = self.sampler.sample_and_score(
            repeat(prompt_embeds, self.seeds), repeat(negative_prompt_embeds, self.seeds),
            self.noise[rows].flatten(0, 1),
            score, self.grad_steps, calls,
        )  # fmt: skip
        return losses.view(len(rows), self.seeds).mean(1)

    def descend(self, loss: Tensor, rows: Tensor) -> None:
        """Step the logits of the problems `rows` (Q,) on their losses (Q,)."""
        self.step_active(loss, rows, clip=CLIP)
        with torch.no_grad():
            # The first word of a slot may start outside of the released code's range [0, 3], and may then stay there.
            initial = self.prompt.init_logits(self.init_keep_prob)
            most = initial[:, :, :1].clamp(min=3)
            self.prompt.logits.copy_(self.prompt.logits.maximum(initial.clamp(max=0)).minimum(most))

    def gumbel(self, rows: Tensor, step: int, tries: int = 0) -> Tensor:
        """Draw Gumbel noise (Q, S, W), a function of the seed, the problem and the step, not of the other problems."""
        noise = torch.zeros(len(rows), *self.prompt.logits.shape[1:])
        for q, row in enumerate(rows.tolist()):
            draw = generator(self.data.seed, f"{self.batch[row].record.key}/gumbel", step, tries)
            for s, slot in enumerate(self.prompt.spaces[row].slots):
                uniform_noise = torch.rand(len(slot.words), generator=draw).clamp(1e-7, 1 - 1e-7)
                noise[q, s, : len(slot.words)] = -(-uniform_noise.log()).log()
        return noise.to(self.device)

    # --- candidates

    def propose(self, row: int, step: int, first: int) -> list[Choice]:
        """Return new candidates of a problem, up to a population and to what is left of the budget.

        Args:
            row: The problem's row.
            step: The step.
            first: The first step that evaluates candidates.
        """
        problem, space, result = self.batch[row].record, self.prompt.spaces[row], self.result(row)
        count = min(int(self.population), int(self.budget - (result.budget or 0) + 1e-6))
        known = {(candidate["prompt"], candidate["negative_prompt"]) for candidate in result.candidates}
        ranked = sorted(result.candidates, key=lambda candidate: sum(candidate["losses"]))
        parents: list[Choice] = [tuple(candidate["choice"]) for candidate in ranked[: self.elites]]
        breeding = self.solver in ("evolution", "hybrid") and step > first and len(parents) > 1
        chosen: dict[tuple[str, str], Choice] = {}
        for begin in range(0, TRIES * count, max(1, count)):
            drawn: list[Choice] = []
            for attempt in range(begin, begin + count):
                draw = generator(self.data.seed, f"{problem.key}/candidates", step, attempt)
                if breeding and attempt % 2 == 0:
                    drawn.append(mutate(parents, space, self.mutation, draw))
                elif breeding:
                    drawn.append(cross(parents, draw))
                elif self.solver == "random":
                    drawn.append(uniform(space, draw))
                else:
                    drawn.append(self.draw_choice(row, step, attempt, mode=step == first and attempt == 0))
            new = {texts: choice for choice in drawn if (texts := space.texts(choice)) not in known}
            known |= new.keys()
            chosen |= self.similar_enough(problem, new)
            if len(chosen) >= count:
                break
        return list(chosen.values())[:count]

    def draw_choice(self, row: int, step: int, attempt: int, mode: bool = False) -> Choice:
        """Draw from the softmax of a problem's logits, or return its mode."""
        rows = torch.tensor([row])
        noise = self.gumbel(rows, step, attempt) * (not mode)
        return tuple(self.prompt.perturbed(rows, noise)[0].argmax(1)[: len(self.prompt.spaces[row].slots)].tolist())

    def similar_enough(self, problem: Problem, choices: dict[tuple[str, str], Choice]) -> dict[tuple[str, str], Choice]:
        """Return the candidates that keep the meaning."""
        similar = self.similarity.reaches(problem.target, [prompt for prompt, _ in choices])
        return {texts: choice for (texts, choice), ok in zip(choices.items(), similar, strict=True) if ok}

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return the optimizer, which treats each problem as if it were alone."""
        return build_optimizer(self.optimizer, self.prompt.logits)
