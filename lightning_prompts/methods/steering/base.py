"""The base class of methods that change encoded prompts (arXiv 2308.12059)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prompts.backbones.prompt_embeds_files import base_prompts, pack_prompt_embeds, read_prompt_embeds
from lightning_prompts.errors import UserError
from lightning_prompts.methods.refinement import Refinement
from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import MethodResult, Problem, SteeringResult
from lightning_prompts.sampling.seeding import SEARCH
from lightning_prompts.setting_types import Positive


class Steering(Refinement):
    """Change the encoded prompts and not their words.

    Args:
        unconditional: Move `negative_prompt_embeds` too, which start as the encoded empty text.
        pooled: Move the pooled vector too, in families that have one.
        init: The initial embeddings in place of the encoded prompt: the folder of a run that found embeddings, or a
            file of encoded prompts. The ones of the same prompt are used, or the only ones.
        seeds: Images N per prompt that the search uses.
        steps: Steps of the search.
        **kwargs: See `PromptMethod`.
    """

    prompt: PromptEmbeds | PromptArc
    result_class: ClassVar[type[MethodResult]] = SteeringResult
    higher_is_better: bool  # whether a higher metric is better

    def __init__(
        self,
        *,
        unconditional: bool = False,
        pooled: bool = False,
        init: str | None = None,
        seeds: Positive = 4,
        steps: Positive = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unconditional:
            self.sampler.check_guided("negative prompts have no effect", "give --model.unconditional false")
        if pooled and not self.backbone.pooled_width:
            raise UserError(f"The model {self.backbone.name!r} has no pooled vector; give --model.pooled false.")
        self.unconditional, self.pooled, self.seeds, self.steps = unconditional, pooled, seeds, steps
        self.started = self._read_init(Path(init)) if init else {}  # encoded prompts (S, R, D) by text
        self.prompt = PromptEmbeds(self.moving)  # unless a subclass replaces it

    # --- the batch

    @property
    def identities(self) -> list[dict[str, Any]]:
        """The settings that are part of the keys of a prompt's problems, one dictionary per problem."""
        moved = {"pooled": True} if self.pooled else {}
        return [{"method": type(self).__name__, "unconditional": self.unconditional, **moved}]

    def check(self, prompt: str) -> None:
        """Refuse a prompt that the text encoder would truncate."""
        self.vocabulary.encode_text([prompt])

    def moving(self, embeds: Tensor) -> Tensor:
        """Return the rows (R,) of encoded prompts (..., R, D) that move."""
        return self.backbone.searchable_rows(embeds, self.pooled)

    @torch.no_grad()
    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch."""
        super().set_rows(problems)
        self.prompt.set_initial(self.initial(problems))
        self.noise = self.draw_noise(problems, SEARCH, self.seeds)
        for row, initial in zip(self.batch.rows, self.prompt.initial, strict=True):
            row.best = initial.clone() if row.best is None else row.best

    def initial(self, problems: Sequence[Problem]) -> Tensor:
        """Encode the prompts of P problems to (P, S, R, D), one at a time so that the batch changes no result."""
        prompt_embeds = torch.cat([self.encode([problem.target]) for problem in problems])
        if not self.unconditional:
            return prompt_embeds.unsqueeze(1).float()
        negative_prompt_embeds = self.encode([""], negative=True).expand_as(prompt_embeds)
        return torch.stack([prompt_embeds, negative_prompt_embeds], dim=1).float()

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the moving rows of the encoded prompts, or of those that `init` names."""
        return self.prompt.init_params(self.init_embeds(rows))

    def best_params(self, row: int) -> Tensor:
        """Return the moving rows of the best embeddings so far."""
        return self.prompt.init_params(self.best_embeds(row)[None])[0]

    def best_embeds(self, row: int) -> Tensor:
        """Return the best encoded prompt (S, R, D) of a row."""
        best = self.batch[row].best
        assert best is not None  # `set_rows` sets the initial one
        return best

    def init_embeds(self, rows: Tensor) -> Tensor:
        """Return the initial encoded prompts (Q, S, R, D) of the problems `rows` (Q,)."""
        initial = self.prompt.initial[rows.to(self.device)]
        if not self.started:
            return initial
        initial = initial.clone()
        only = next(iter(self.started.values())) if len(self.started) == 1 else None
        for embeds, row in zip(initial, rows.tolist(), strict=True):
            problem = self.batch[row].record
            given = self.started.get(problem.target, only)
            if given is None:
                raise UserError(
                    f"--model.init has no embeddings of the prompt {problem.target!r}; give another file or run."
                )
            common = min(len(given), len(embeds))  # one of them may lack the negative prompt
            embeds[:common] = given[:common]
        return initial

    def _read_init(self, init: Path) -> dict[str, Tensor]:
        """Read encoded prompts, by the text of the prompts."""
        file = RunFolder(init).prompt_embeds if init.is_dir() else init
        if not file.is_file():
            raise UserError(
                f"There are no embeddings in {init} to start from; give --model.init a run or a file of them."
            )
        by_key = read_prompt_embeds(file, self.backbone, self.encode([""]).shape[1:])
        prompts = base_prompts(file)
        return {prompts.get(key, key): embeds for key, embeds in by_key.items()}

    # --- scores

    @abstractmethod
    def values(self, images: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Measure images (B, 3, H, W) in [-1, 1] of B problems: values (B,) by name; may be empty."""

    @abstractmethod
    def metric(self, values: dict[str, Tensor]) -> Tensor:
        """Combine values by name to the metric that the search improves."""

    def loss(self, values: dict[str, Tensor]) -> Tensor:
        """Combine values by name to the loss."""
        metric = self.metric(values)
        return -metric if self.higher_is_better else metric

    def evaluate(
        self, embeds: Tensor, noise: Tensor, problems: Sequence[Problem], grad_steps: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute losses and values (Q, N) of images of encoded prompts (Q, S, R, D) from noise (Q, N, C, h, w)."""
        count = noise.shape[1]
        prompt_embeds, negative_prompt_embeds = self.sampler.split(embeds, count)

        def score(latents: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values = self.values(self.backbone.decode(latents), [problems[i // count] for i in indices.tolist()])
            return self.loss(values), values

        losses, values = self.sampler.sample_and_score(
            prompt_embeds, negative_prompt_embeds, noise.flatten(0, 1), score, grad_steps
        )
        return losses.view(len(embeds), count), {name: value.view(len(embeds), count) for name, value in values.items()}

    @torch.no_grad()
    def score(self, rows: Tensor) -> list[Problem]:
        """Score the embeddings of the problems `rows` (Q,) on the seeds of the search and keep the best.

        The first call scores the encoded prompt of the user, wherever the search starts.

        Returns:
            The problems whose embeddings improved.
        """
        improved: list[Problem] = []
        problems = [self.batch[row].record for row in rows.tolist()]
        results = [SteeringResult.of(problem) for problem in problems]
        first = torch.tensor([result.metric_before is None for result in results], device=self.device)
        on_device = rows.to(self.device)
        embeds = self.prompt(on_device).where(~first.view(-1, 1, 1, 1), self.prompt.initial[on_device])
        with self.trainer.precision_plugin.forward_context():  # also before the first step, to be comparable
            losses, values = self.evaluate(embeds, self.noise[rows], problems)
        self.batch.add_cost(rows, self.seeds * self.sampler.cost())
        metrics = self.metric(values)
        for i, (row, problem, result) in enumerate(zip(rows.tolist(), problems, results, strict=True)):
            loss, metric = float(losses[i].mean()), metrics[i].tolist()
            by_name = {name: value[i].tolist() for name, value in values.items()}
            if result.metric_before is None:
                result.metric_before, result.values_before, problem.initial_validation_loss = metric, by_name, loss
            if self.batch.offer(row, problem.target, loss, acceptable=self.acceptable(problem, by_name)):
                result.metric_after, result.values_after = metric, by_name
                self.batch[row].best = embeds[i].clone()
                self.data.folder.save_embeds(problem.key, self.file([problem], embeds[i : i + 1]))
                improved.append(problem)
        return improved

    def acceptable(self, problem: Problem, values: dict[str, list[float]]) -> bool:
        """Return whether embeddings with these values, by seed, may become a problem's best."""
        return True

    # --- results

    def file(self, problems: Sequence[Problem], embeds: Tensor) -> bytes:
        """Return the content of a safetensors file with encoded prompts (P, S, R, D)."""
        by_key = dict(zip((problem.key for problem in problems), embeds, strict=True))
        return pack_prompt_embeds(by_key, [problem.target for problem in problems], self.backbone)

    def best_embeds_of(self, problems: Sequence[Problem]) -> Tensor:
        """Return the best encoded prompts (P, S, R, D), from the batch or from disk."""
        shape, keys = self.encode([""]).shape[1:], [problem.key for problem in self.batch.records]
        return torch.stack([self._best_embeds(problem.key, keys, shape) for problem in problems]).to(self.device)

    def _best_embeds(self, key: str, keys: list[str], shape: torch.Size) -> Tensor:
        """Return the best encoded prompt (S, R, D) of a key, from the batch with these keys or from disk."""
        if key in keys:
            return self.best_embeds(keys.index(key))
        return read_prompt_embeds(self.data.folder.embeds_of(key), self.backbone, shape)[key].to(self.device)

    def images_before_and_after(self, problems: Sequence[Problem], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Generate images before and after the search; see `Refinement.images_before_and_after`."""
        before = self.sampler.generate_from_embeds(self.initial(problems), noise)
        return before, self.sampler.generate_from_embeds(self.best_embeds_of(problems), noise)

    def generate_best(self, problem: Problem, noise: Tensor, negative: str = "") -> Tensor:
        """Generate images (N, 3, H, W) of a problem's best embeddings; see `PromptMethod.generate_best`."""
        embeds = self.best_embeds_of([problem])
        if negative:
            embeds = torch.stack([embeds[:, 0], self.encode([negative], negative=True).to(embeds)], dim=1)
        return self.sampler.generate_from_embeds(embeds, noise[None])[0]

    @torch.no_grad()
    def record_fresh_scores(self, problems: Sequence[Problem], before: Tensor, after: Tensor) -> None:
        """Record the metric and the values of images on fresh seeds; nothing without a metric."""
        values_before, values_after = self.values_of(before, problems), self.values_of(after, problems)
        for p, problem in enumerate(problems if values_before else []):
            result = SteeringResult.of(problem)
            result.fresh_metric_before = self.metric(values_before)[p].tolist()
            result.fresh_metric_after = self.metric(values_after)[p].tolist()
            result.fresh_values_before = {name: value[p].tolist() for name, value in values_before.items()}
            result.fresh_values_after = {name: value[p].tolist() for name, value in values_after.items()}

    def write_files(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the encoded prompts."""
        atomic_write(folder.prompt_embeds, self.file(problems, self.best_embeds_of(problems)))

    def values_of(self, images: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Compute values (P, N) by name of images (P, N, 3, H, W)."""
        flat, count = images.flatten(0, 1), images.shape[1]

        def call(indices: Tensor) -> dict[str, Tensor]:
            return self.values(flat[indices].to(self.device), [problems[i // count] for i in indices.tolist()])

        values = self.microbatch.map(len(flat), call)
        return {name: value.view(images.shape[:2]) for name, value in values.items()}

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the metrics of the best embeddings on the seeds of the search."""
        _, values = self.evaluate(
            self.best_embeds_of(problems), self.draw_noise(problems, SEARCH, self.seeds), problems
        )
        return self.metric(values).mean(1)

    def on_train_start(self) -> None:
        """Restore the batch of a checkpoint, and write its embeddings to disk."""
        resumed = self._resumed is not None
        super().on_train_start()
        for row, problem in enumerate(self.batch.records if resumed else ()):
            if problem.prompt:
                self.data.folder.save_embeds(problem.key, self.file([problem], self.best_embeds(row)[None]))
