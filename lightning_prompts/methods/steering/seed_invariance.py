"""Seed-invariant embeddings: manipulating embeddings of Stable Diffusion prompts (arXiv 2308.12059, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import repeat
from lightning_prompts.embeddings import slerp
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds
from lightning_prompts.objectives.clip import ClipSimilarity, default_clip
from lightning_prompts.optimizers import AdamOnLion, build_optimizer, check_optimizer
from lightning_prompts.runs.record import Problem, SeedInvarianceResult
from lightning_prompts.sampling.figures import sheet
from lightning_prompts.sampling.seeding import SEARCH, check_seeds, noise_of
from lightning_prompts.setting_types import Positive
from lightning_prompts.unused import refuse_unused

LOSS_SCALE = (
    1e4  # the paper's; AdamOnLion's `eps` is relative to it, and smaller gradients would vanish in a float16 model
)


def _default_steps(towards: str | None) -> int:
    return 60 if towards is None else 100


class SeedInvariance(Steering):
    """Move an encoded prompt until every seed gives the image that the prompt gives with one seed, the target seed.

    The search has stages. Each compares clean latents predicted after a number of denoiser calls, and blends in other
    seeds: the noise moves on an arc from the target seed's to theirs.

    The paper compares latents after 1, 2 and 3 calls, with a gradient through the last one. This hardly changes the
    images. The default does: it compares the finished images by a CLIP and by their pixels, with a gradient through all
    calls.

    Args:
        target_seeds: Seeds, as in `predict`, whose images are the targets; each is a problem of its own.
        one_row: Repeat one row in place of all rows of the encoded prompt, as in the paper.
        towards: Another prompt: only the position of the encoded prompt on the arc to this one moves.
        compare: What to compare by cosine: `clip`, the features of the images in the CLIP that goes with the backbone,
            or `latents`.
        clip: Folder or hub id of another CLIP.
        pixels: Weight of the cosine of the images themselves against that of their features, from 0 to 1.
        stages: Denoiser calls after which each stage compares, at most as many stages as steps; None for one stage
            after all calls.
        grad_steps: The last of these calls that propagate a gradient; None for all.
        ramp: Share of a stage in which the noise moves from the target seed's to the new ones'; 1 in the paper.
        seeds_per_step: New seeds per step; 3 in the paper.
        optimizer: Optimizer of the parameters; the loss, one minus the cosine, is scaled by 10000. None: the paper's
            AdamOnLion with a learning rate of 0.01, or the paper's 0.1 on an arc.
        steps: Steps of the search. None: 60, or the paper's 100 on an arc, which lead from one end to the other.
        **kwargs: See `Steering`.
    """

    higher_is_better = True
    result_class = SeedInvarianceResult

    def __init__(
        self,
        *,
        target_seeds: list[int] | None = None,
        one_row: bool = False,
        towards: str | None = None,
        compare: Literal["clip", "latents"] = "clip",
        clip: str | None = None,
        pixels: float = 0.3,
        stages: list[Positive] | None = None,
        grad_steps: Positive | None = None,
        ramp: float = 0.3,
        seeds_per_step: Positive = 3,
        optimizer: OptimizerCallable | None = None,
        steps: Positive | None = None,
        **kwargs: Any,
    ) -> None:
        if target_seeds is not None:
            check_seeds("--model.target_seeds", target_seeds)
        for name, share in {"pixels": pixels, "ramp": ramp}.items():
            if not 0 <= share <= 1:
                raise UserError(f"--model.{name} must be between 0 and 1, got {share:g}.")
        if compare == "latents":
            refuse_unused(SeedInvariance, "with --model.compare latents", {"pixels": pixels, "clip": clip})
        arc = towards is not None
        if optimizer is None:
            optimizer = partial(AdamOnLion, lr=0.1 if arc else 0.01)
        check_optimizer(optimizer, dims=3)
        super().__init__(steps=steps or _default_steps(towards), **kwargs)
        calls = self.sampler.calls
        self.target_seeds, self.stages = target_seeds or [0], [int(stage) for stage in stages or [calls]]
        self.towards, self.seeds_per_step, self.pixels, self.ramp = towards, seeds_per_step, pixels, ramp
        self.grad_steps, self.optimizer = int(grad_steps or calls), optimizer
        self._check_stages(calls)
        if arc:
            self._check_arc(one_row)
        self.clip = None
        if compare == "clip":
            self.clip = ClipSimilarity(clip or default_clip(self.backbone), self.offline)
        self.prompt = PromptArc() if arc else PromptEmbeds(self.moving, one_row)
        self._targets: dict[str, Tensor] = {}  # images (3, H, W) by problem
        self._target_vectors: dict[str, dict[int, Tensor]] = {}  # (E,), by problem and denoiser calls

    def _check_stages(self, calls: int) -> None:
        """Refuse stages that need more denoiser calls, or more steps, than there are."""
        if max(self.stages) > calls:
            raise UserError(
                f"--model.stages must be at most the sampler's {calls} denoiser calls, got {self.stages}; change it or "
                "--model.sampler.num_inference_steps."
            )
        if len(self.stages) > self.steps:
            raise UserError(
                f"--model.steps must be at least the number of --model.stages, got {self.steps} and "
                f"{len(self.stages)}; raise it or shorten the stages."
            )

    def _check_arc(self, one_row: bool) -> None:
        """Refuse settings that have no place on the arc from a whole encoded prompt to another one."""
        if self.started:
            raise UserError("With --model.towards, the search starts at the prompt; leave out --model.init.")
        if self.unconditional:
            raise UserError("--model.towards does not move negative prompts; give --model.unconditional false.")
        because = "with --model.towards, which moves whole encoded prompts"
        refuse_unused(SeedInvariance, because, {"one_row": one_row})
        refuse_unused(Steering, because, {"pooled": self.pooled})

    @classmethod
    def search_length(cls, settings: Mapping[str, Any]) -> tuple[str, int]:
        """Return the steps; see `PromptMethod.search_length`."""
        return "steps", int(settings["steps"] or _default_steps(settings["towards"]))

    @property
    def identities(self) -> list[dict[str, Any]]:
        """The settings that are part of the keys of a prompt's problems, one dictionary per problem."""
        return [{**settings, "target_seed": seed} for settings in super().identities for seed in self.target_seeds]

    @torch.no_grad()
    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch, and compute the targets of new ones for each stage."""
        super().set_rows(problems)
        if isinstance(self.prompt, PromptArc):
            self.prompt.other = self.encode([str(self.towards)])[:, None].float()
        self.starts = self.target_noise(problems)  # (P, C, h, w)
        new = [row for row, problem in enumerate(problems) if problem.key not in self._target_vectors]

        def vectors(latents: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return latents.flatten(1).sum(1), {"vectors": self.compared(latents)}

        for row in new:  # one by one, since a resumed search has another batch
            embeds = self.sampler.split(self.prompt.initial[row : row + 1])
            for calls in set(self.stages):
                _, others = self.sampler.sample_and_score(*embeds, self.starts[row : row + 1], vectors, calls=calls)
                self._target_vectors.setdefault(problems[row].key, {})[calls] = others["vectors"][0]

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        super().evict(problem)
        self._target_vectors.pop(problem.key, None)
        self._targets.pop(problem.key, None)

    def compared(self, latents: Tensor) -> Tensor:
        """Return vectors (B, E) of clean latents (B, C, h, w) to compare by cosine."""
        if not self.clip:
            return latents.flatten(1)
        images = self.backbone.decode(latents)
        features, pixels = self.clip.features(images), F.normalize(images.flatten(1), dim=1)
        # The cosine of two such vectors is the weighted sum of both cosines.
        return torch.cat([math.sqrt(1 - self.pixels) * features, math.sqrt(self.pixels) * pixels], dim=1)

    def target_noise(self, problems: Sequence[Problem]) -> Tensor:
        """Return the noise (P, C, h, w) of the target seeds."""
        seeds = [int(SeedInvarianceResult.of(problem).target_seed or 0) for problem in problems]
        return noise_of(seeds, self.backbone.latent_shape).to(self.device)

    def targets(self, problems: Sequence[Problem]) -> Tensor:
        """Return the target images (P, 3, H, W), generated one at a time so that the batch changes no result."""
        for problem in problems:
            if problem.key not in self._targets:
                images = self.sampler.generate_from_embeds(
                    self.initial([problem]), self.target_noise([problem]).unsqueeze(1)
                )
                self._targets[problem.key] = images[0, 0]
        return torch.stack([self._targets[problem.key] for problem in problems])

    def values(self, images: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Compute the peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) to the targets; higher is better."""
        error = (images - self.targets(problems).to(images)).square().flatten(1).mean(1)
        return {"PSNR": 10 * torch.log10(4 / error.clamp(min=1e-10))}

    def metric(self, values: dict[str, Tensor]) -> Tensor:
        """Return the peak signal-to-noise ratio."""
        return values["PSNR"]

    def stage(self, step: int) -> tuple[int, float]:
        """Return a step's denoiser calls, and the position in [0, 1] of its noise on the arc from the target seed's."""
        stages, steps = len(self.stages), self.steps
        number = step * stages // steps
        first, end = (
            -(-number * steps // stages),
            -(-(number + 1) * steps // stages),
        )  # this stage has the steps [first, end)
        return self.stages[number], min(1.0, (step - first + 1) / max(1.0, self.ramp * (end - first)))

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take an optimizer step towards the targets on new seeds."""
        parts = [(some, self.distances(some, step)) for step, some in batch.by_step(rows)]
        losses = torch.cat([loss for _, loss in parts])
        self.step_active(losses, torch.cat([some for some, _ in parts]))
        self.log_step(batch, rows, loss=losses)

    def distances(self, rows: Tensor, step: int) -> Tensor:
        """Compute losses (Q,) of the problems `rows` (Q,) at a step."""
        calls, value = self.stage(step)
        count, problems = int(self.seeds_per_step), [self.batch[row].record for row in rows.tolist()]
        others, on_device = self.draw_noise(problems, step, count), rows.to(self.device, non_blocking=True)
        starts = self.starts[on_device].unsqueeze(1).expand_as(others)  # (Q, N, C, h, w)
        noise = slerp(starts.flatten(2), others.flatten(2), value).view_as(others).flatten(0, 1)
        targets = repeat(torch.stack([self._target_vectors[problem.key][calls] for problem in problems]), count)
        embeds = self.sampler.split(self.prompt(on_device), count)

        def distance(latents: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return LOSS_SCALE * (1 - F.cosine_similarity(self.compared(latents), targets[indices], dim=1)), {}

        losses, _ = self.sampler.sample_and_score(*embeds, noise, distance, min(self.grad_steps, calls), calls)
        self.batch.add_cost(rows, count * self.sampler.cost(calls, self.grad_steps))
        return losses.view(-1, count).mean(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, which treats each problem as if it were alone."""
        return build_optimizer(self.optimizer, self.batch.parameter)

    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return the target images beside other seeds' images of the prompt, above those of the best embeddings."""
        before, after = self.images_before_and_after(problems, self.draw_noise(problems, SEARCH, self.seeds))
        columns: list[tuple[Tensor, ...]] = []
        for p, target in enumerate(self.targets(problems)):
            columns += [(target,), *((before[p, n], after[p, n]) for n in range(self.seeds))]
        texts = [text for problem in problems for text in (problem.target, *[""] * self.seeds)]
        return sheet(columns, texts, 2 * (self.seeds + 1))
