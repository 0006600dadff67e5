"""Seed-invariant embeddings: manipulating embeddings of Stable Diffusion prompts (arXiv 2308.12059, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import repeat
from lightning_prompts.callbacks.results import check_seeds, noise_of
from lightning_prompts.embeddings import slerp
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.method import by_step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds
from lightning_prompts.objectives.clip import ClipSimilarity, clip_of
from lightning_prompts.optimizers import AdamOnLion
from lightning_prompts.runs.record import Problem, SeedInvarianceResult
from lightning_prompts.sampling.figures import sheet
from lightning_prompts.sampling.seeding import SEARCH
from lightning_prompts.types import Positive, Rate
from lightning_prompts.unused import refuse_unused


class SeedInvariance(Steering):
    """Moves an encoded prompt until every seed draws the picture that the prompt draws from one seed, the target's.

    The search goes through stages. In each it compares what is predicted after some calls of the denoiser, and brings other seeds
    in gradually: the noise goes on an arc from the target's to theirs, all the way.

    The paper compares latents after 1, 2 and 3 calls, with a gradient through the last one. That hardly changes the pictures; what
    changes them is the default: the finished pictures by a CLIP and by their pixels, with a gradient through all calls.

    Args:
        target_seeds: Seeds, as those of `predict`, whose pictures are wanted; each is a problem of its own.
        embedding: What trains: all `rows` of the encoded prompt, `one_row` that is repeated, or the place on the `arc` to another
            prompt.
        towards: The text at the other end of the arc.
        compare: What is compared, by the cosine: `clip`, the features of the pictures by the CLIP that goes with the backbone, or
            the `latents`.
        clip: Folder or hub id of another CLIP.
        pixels: Weight, in [0, 1], of the cosine of the pictures themselves against that of their features.
        stages: Calls of the denoiser after which each stage compares, at most as many stages as steps; None for a stage after all
            calls.
        grad_steps: How many of the last of these calls pass a gradient on; None for all.
        ramp: Share of a stage in which the noise goes from the target's to the new seeds'; 1 in the paper.
        seeds_per_step: New seeds that a step looks at; 3 in the paper.
        weight: Scale of the loss, one minus the cosine.
        lr: Step size of AdamOnLion. None: 0.01, or the paper's 0.1 on an arc.
        eps: Added to the root of its second moment.
        steps: Steps of the search. None: 60, or the paper's 100 on an arc, which lead from one end to the other.
        **kwargs: See `Steering`.
    """

    higher_is_better = True
    result_class = SeedInvarianceResult

    def __init__(
        self,
        *,
        target_seeds: list[int] | None = None,
        embedding: Literal["rows", "one_row", "arc"] = "rows",
        towards: str | None = None,
        compare: Literal["clip", "latents"] = "clip",
        clip: str | None = None,
        pixels: float = 0.3,
        stages: list[Positive] | None = None,
        grad_steps: Positive | None = None,
        ramp: float = 0.3,
        seeds_per_step: Positive = 3,
        weight: float = 1e4,
        lr: Rate | None = None,
        eps: float = 1e-3,
        steps: Positive | None = None,
        **kwargs: Any,
    ) -> None:
        if target_seeds is not None:
            check_seeds("--model.target_seeds", target_seeds)
        if compare == "latents":
            refuse_unused(SeedInvariance, "with --model.compare latents", {"pixels": pixels, "clip": clip})
        arc = embedding == "arc"
        super().__init__(steps=steps or (100 if arc else 60), **kwargs)
        calls = self.sampler.calls
        self.target_seeds, self.stages = target_seeds or [0], [int(stage) for stage in stages or [calls]]
        self.towards, self.seeds_per_step, self.weight, self.lr, self.eps = (
            towards,
            seeds_per_step,
            weight,
            float(lr or (0.1 if arc else 0.01)),
            eps,
        )
        self.pixels = pixels
        self.grad_steps, self.ramp = int(grad_steps or calls), ramp
        if max(self.stages) > calls:
            raise UserError(
                f"The stages {self.stages} go beyond the sampler's {calls} calls; change --model.stages or --model.sampling_steps."
            )
        if len(self.stages) > self.steps:
            raise UserError(
                f"Each of the {len(self.stages)} stages takes a step at least, and there are {self.steps} steps; raise --model.steps or "
                "shorten --model.stages."
            )
        if not 0 <= pixels <= 1:
            raise UserError(f"The weight of the pixels is a share from 0 to 1, not {pixels:g}; change --model.pixels.")
        if not 0 <= ramp <= 1:
            raise UserError(f"The ramp is a share of a stage from 0 to 1, not {ramp:g}; change --model.ramp.")
        self.clip = None
        if compare == "clip":
            self.clip = ClipSimilarity(clip or clip_of(self.backbone), self.offline)
        if arc != (towards is not None):
            raise UserError(
                "An arc leads to another prompt; give --model.embedding arc and --model.towards, or neither."
            )
        if arc and self.started:
            raise UserError("An arc begins at the prompt; leave out --model.start, or give --model.embedding rows.")
        if arc and self.unconditional:
            raise UserError("An arc moves what the denoiser is told alone; give --model.unconditional false.")
        if arc:
            refuse_unused(
                Steering,
                "with --model.embedding arc, which leads through whole encoded prompts",
                {"pooled": self.pooled},
            )
        self.prompt = PromptArc() if arc else PromptEmbeds(self.moving, one_row=embedding == "one_row")
        self._pictures: dict[str, Tensor] = {}
        self._wanted: dict[str, dict[int, Tensor]] = {}  # vectors (E,) by problem and stage

    @property
    def identities(self) -> list[dict[str, Any]]:
        """What makes two problems of one prompt: of each problem its settings."""
        return [{**settings, "target_seed": seed} for settings in super().identities for seed in self.target_seeds]

    @torch.no_grad()
    def set_rows(self, problems: list[Problem]) -> None:
        """Makes problems the wave, and finds what the targets of new ones look like after the calls of each stage."""
        super().set_rows(problems)
        if isinstance(self.prompt, PromptArc):
            self.prompt.other = self.encode([str(self.towards)])[:, None].float()
        self.starts = self.target_noise(problems)  # (P, C, h, w)
        new = [row for row, problem in enumerate(problems) if problem.key not in self._wanted]

        def look(latents: Tensor, some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return latents.flatten(1).sum(1), {"seen": self.compared(latents)}

        for row in new:  # one by one: a search that goes on finds them in another batch
            embeds = self.sampler.split(self.prompt.initial[row : row + 1])
            for calls in set(self.stages):
                _, found = self.sampler.sample_and_score(*embeds, self.starts[row : row + 1], look, calls=calls)
                self._wanted.setdefault(problems[row].key, {})[calls] = found["seen"][0]

    def evict(self, problem: Problem) -> None:
        """Forgets what is remembered of a problem that has left the wave."""
        super().evict(problem)
        self._wanted.pop(problem.key, None)
        self._pictures.pop(problem.key, None)

    def compared(self, latents: Tensor) -> Tensor:
        """What is compared of clean latents (B, C, h, w): vectors (B, E)."""
        if not self.clip:
            return latents.flatten(1)
        pictures = self.backbone.decode(latents)
        features, pixels = self.clip.features(pictures), F.normalize(pictures.flatten(1), dim=1)
        # The cosine of two such vectors is the weighted sum of both cosines.
        return torch.cat([math.sqrt(1 - self.pixels) * features, math.sqrt(self.pixels) * pixels], dim=1)

    def target_noise(self, problems: Sequence[Problem]) -> Tensor:
        """Noise (P, C, h, w) of the seeds whose pictures are wanted."""
        seeds = [int(SeedInvarianceResult.of(problem).target_seed or 0) for problem in problems]
        return noise_of(seeds, self.backbone.latent_shape).to(self.device)

    def pictures(self, problems: Sequence[Problem]) -> Tensor:
        """The wanted pictures (P, 3, H, W), each drawn once, and alone, so that it does not depend on the batch."""
        for problem in problems:
            if problem.key not in self._pictures:
                drawn = self.sampler.draw_embeds(self.initial([problem]), self.target_noise([problem]).unsqueeze(1))
                self._pictures[problem.key] = drawn[0, 0]
        return torch.stack([self._pictures[problem.key] for problem in problems])

    def values(self, pictures: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Peak signal-to-noise ratio (B,), in dB, of pictures (B, 3, H, W) and the wanted ones; higher is nearer."""
        error = (pictures - self.pictures(problems).to(pictures)).square().flatten(1).mean(1)
        return {"PSNR": 10 * torch.log10(4 / error.clamp(min=1e-10))}

    def metric(self, values: dict[str, Tensor]) -> Tensor:
        """This ratio."""
        return values["PSNR"]

    def stage(self, step: int) -> tuple[int, float]:
        """Calls of the denoiser that a step looks at, and how far its noise is on the way from the target's: 0 to 1, included."""
        stages, steps = len(self.stages), self.steps
        number = step * stages // steps
        begun, end = (
            -(-of * steps // stages) for of in (number, number + 1)
        )  # the steps [begun, end) are this stage's
        return self.stages[number], min(1.0, (step - begun + 1) / max(1.0, self.ramp * (end - begun)))

    def step(self, batch: Step, rows: Tensor) -> None:
        """One step towards the target's latents on new seeds."""
        parts = [(some, self.distances(some, step)) for step, some in by_step(batch, rows)]
        losses = torch.cat([loss for _, loss in parts])
        self.step_active(losses, torch.cat([some for some, _ in parts]))
        self.log_step(batch, rows, loss=losses)

    def distances(self, rows: Tensor, step: int) -> Tensor:
        """Losses (Q,) of the problems `rows` (Q,) at a step."""
        calls, value = self.stage(step)
        count, problems = int(self.seeds_per_step), [self.batch[row].record for row in rows.tolist()]
        others, on_device = self.draw_noise(problems, step, count), self.to_device(rows)  # (Q, N, C, h, w)
        starts = self.starts[on_device].unsqueeze(1).expand_as(others)
        noise = slerp(starts.flatten(2), others.flatten(2), value).view_as(others).flatten(0, 1)
        wanted = repeat(torch.stack([self._wanted[problem.key][calls] for problem in problems]), count)
        embeds = self.sampler.split(self.prompt(on_device), count)

        def far(latents: Tensor, some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.weight * (1 - F.cosine_similarity(self.compared(latents), wanted[some], dim=1)), {}

        losses, _ = self.sampler.sample_and_score(*embeds, noise, far, min(self.grad_steps, calls), calls)
        self.add_cost(rows, count * self.sampler.cost(calls, self.grad_steps))
        return losses.view(-1, count).mean(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The paper's."""
        return AdamOnLion([self.parameter], lr=self.lr, eps=self.eps)

    def preview(self, problems: list[Problem]) -> Image.Image:
        """The wanted pictures; beside each what the prompt draws from other seeds, above what the found embeddings draw from them."""
        before, after = self.both(problems, self.draw_noise(problems, SEARCH, self.seeds))
        columns: list[tuple[Tensor, ...]] = []
        for p, wanted in enumerate(self.pictures(problems)):
            columns += [(wanted,), *((before[p, n], after[p, n]) for n in range(self.seeds))]
        texts = [text for problem in problems for text in (problem.target, *[""] * self.seeds)]
        return sheet(columns, texts, 2 * (self.seeds + 1))
