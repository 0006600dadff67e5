"""The base class of all methods: a frozen backbone, a prompt that trains, and a batch of problems searched together."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone, BackboneLike, BackboneSettings, as_backbone
from lightning_prompts.callbacks import BestPrompt, NonFiniteGuard, PromptProgress, SampleGrid
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.distributed import broadcast, num_sample_ranks
from lightning_prompts.engine.batch import Batch, merge
from lightning_prompts.engine.checkpoint import checkpoints_of_all
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import MethodResult, Problem
from lightning_prompts.sampling import Microbatch, Sampler, SamplerSettings
from lightning_prompts.sampling.seeding import draw_noise
from lightning_prompts.setting_types import NotNegative, Positive
from lightning_prompts.terminal import say
from lightning_prompts.typed_module import TypedModule

if TYPE_CHECKING:
    from pytorch_lightning.core.optimizer import LightningOptimizer

    from lightning_prompts.methods.dpo_diff.logits import WordChoices
    from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
    from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds

log = logging.getLogger(__name__)

T = TypeVar("T")
NO_OOM_DEVICES = ("cpu",)  # devices that do not report when their memory is full
MOST_STEPS = 10  # default limit of the denoising steps of images that a search generates repeatedly

TRAINER: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,  # until no problem is open
    "enable_checkpointing": False,  # PromptCheckpoint, which is atomic, takes its place
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10**9,  # scoring is the BestPrompt callback's
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""Trainer settings that every search needs."""


class PromptMethod(TypedModule, pl.LightningModule, ABC):
    """Search prompts for problems with a frozen backbone; only the prompts train.

    Up to `batch_size` problems are searched at a time. A problem leaves the batch when its score no longer improves,
    and the next one takes its place. Checkpoints hold the prompts and the optimizer state only.

    A method implements `init_params`, `best_params`, `step` and `score`.

    Args:
        backbone: Settings of the frozen model; in Python also the model's name, a diffusers pipeline, or the result of
            `load_backbone`.
        sampler: Settings of the images that `fit`, `test` and `predict` generate.
        batch_size: Batch size P, the number of problems searched at a time.
        patience: Scorings without improvement after which a problem is finished.
        microbatch: Samples per denoiser call, halved whenever the device runs out of memory; None for as many as the
            memory of a GPU holds.
        score_every_n_steps: Steps between scorings.
        log_images_every_n_steps: Steps between the images that TensorBoard shows during the search; 0 for none.
    """

    strict_loading = False  # checkpoints do not contain the backbone
    prompt: TokenEmbeddings | WordChoices | PromptEmbeds | PromptArc
    data_class: type[ProblemData]
    result_class: ClassVar[type[MethodResult]] = MethodResult
    decisive: frozenset[str] = frozenset()  # settings that a resumed search must share, beside those of all methods
    steps: int  # steps of a search, unless `patience` ends it earlier
    generates_images: ClassVar[bool] = False  # whether every step generates images

    def __init__(
        self,
        *,
        backbone: BackboneLike = BackboneSettings(),
        sampler: SamplerSettings = SamplerSettings(),
        batch_size: Positive = 16,
        patience: Positive = 1000,
        microbatch: Positive | None = 16,
        score_every_n_steps: Positive = 1,
        log_images_every_n_steps: NotNegative = 40,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batch_size = int(batch_size)
        self.patience, self.microbatch = patience, Microbatch(microbatch)
        self.score_every_n_steps, self.log_images_every_n_steps = score_every_n_steps, log_images_every_n_steps
        if isinstance(backbone, str):
            backbone = BackboneSettings(backbone)
        self.backbone: Backbone = backbone.load() if isinstance(backbone, BackboneSettings) else as_backbone(backbone)
        self.offline = self.backbone.offline
        own = self.backbone.default_steps
        steps = int(sampler.num_inference_steps or (min(own, MOST_STEPS) if self.generates_images else own))
        guidance = self.backbone.default_guidance if sampler.guidance_scale is None else sampler.guidance_scale
        self.sampler = Sampler(self.backbone, steps, guidance, self.microbatch)
        self.vocabulary = self.backbone.vocabulary
        self.terms: dict[str, Tensor] = {}  # of the last loss, if it is a sum
        self.scorers: dict[str, Any] = {}  # what scores results, by name
        self._resumed: dict[str, Any] | None = None  # the batch of a checkpoint
        self._begun = time.perf_counter()

    @classmethod
    def search_length(cls, settings: Mapping[str, Any]) -> tuple[str, int] | None:
        """Return the setting that limits the length of a search, which `--effort` scales, and its value.

        Args:
            settings: All settings of the method.

        Returns:
            `steps` unless a method overrides it; None without a value for it.
        """
        steps = settings.get("steps")
        return None if steps is None else ("steps", int(steps))

    @property
    def sampling_settings(self) -> dict[str, Any]:
        """The sampling settings of images, with the model's defaults for unset ones; recorded with the results."""
        return {"num_inference_steps": self.sampler.num_inference_steps, "guidance_scale": self.sampler.guidance_scale}

    def clips(self) -> list[ClipSimilarity]:
        """Return the CLIPs that take part in the search and so cannot be held-out scorers."""
        return [module for module in self.modules() if isinstance(module, ClipSimilarity)]

    # --- the batch

    @property
    def data(self) -> ProblemData:
        """Return the data module of the Trainer."""
        data: ProblemData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @cached_property
    def batch(self) -> Batch:
        """The batch of problems that are searched together."""
        return Batch(self.prompt, self.batch_size)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The trainable parameter (P, ...)."""
        return self.batch.parameter

    def setup(self, stage: str) -> None:
        """Divide the samples among the ranks; refuse a fitted microbatch on a device that reports no full memory."""
        if self.microbatch.fitted and self.trainer.strategy.root_device.type in NO_OOM_DEVICES:
            raise UserError(
                "--model.microbatch null needs a GPU, since a CPU does not report when its memory is full; give "
                "--model.microbatch 16."
            )
        self.microbatch.ranks = num_sample_ranks(self.trainer)
        if self.microbatch.ranks > 1:
            self.parameter.register_hook(broadcast)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the host to the device without waiting for the device."""
        return tensor.to(self.device, non_blocking=True)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all ranks that share the samples; see `broadcast`."""
        return value if self.microbatch.ranks == 1 else broadcast(value)

    def on_train_start(self) -> None:
        """Restore the batch of a checkpoint."""
        self.batch.optimizers = self.trainer.optimizers
        if self._resumed:
            saved, self._resumed = self._resumed, None
            self.batch.load(saved)
            self.data.resume({row.record.key: row.record.target for row in self.batch.rows if row.active})
            if len(self.batch):
                self.set_rows(self.batch.records)
            for problem in self.batch.records:
                self.data.folder.save(problem)

    def on_train_epoch_start(self) -> None:
        """Fill the batch before the first step, and after an epoch that ended because no problem was left in it."""
        self.refill()

    def refill(self) -> None:
        """Evict finished problems and add new ones, up to the batch size."""
        added, evicted = self.batch.refill(self.data.arrivals, self.set_rows, self.init_params)
        for problem in added:
            if not self.data.folder.has(problem.key):
                self.data.folder.save(problem)
        for problem in evicted:
            self.evict(problem)

    @abstractmethod
    def init_params(self, rows: Tensor) -> Tensor:
        """Return the initial parameters (Q, ...) of the problems `rows` (Q,)."""

    def set_rows(self, problems: list[Problem]) -> None:
        """Prepare for the problems of the batch, one per row."""
        self._begun = time.perf_counter()

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        self.data.evict(problem)

    def on_train_epoch_end(self) -> None:
        """Stop the run when no problem is open; problems that are open after an early stop can be resumed."""
        self.trainer.should_stop = self.trainer.should_stop or self.batch.exhausted

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> int | None:
        """End the epoch when no problem in the batch is active, so that the next one refills it."""
        return None if len(self.batch.active_rows()) else -1

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Take one step for the active problems."""
        rows = self.batch.active_rows()
        self.step(batch, rows)
        if self.microbatch.ranks > 1:
            self.parameter.data = broadcast(self.parameter.data)
        elapsed, self._begun = time.perf_counter() - self._begun, time.perf_counter()
        for row in rows.tolist():
            self.batch[row].steps += 1
            self.batch[row].record.seconds += elapsed / len(rows)

    def on_train_batch_end(self, outputs: Any, batch: Step, batch_idx: int) -> None:
        """Save what is finished, unless a callback has done so after scoring it, and refill the batch."""
        self.save_finished()
        if not self.trainer.should_stop:  # else what joined would never be searched
            self.refill()

    def save_finished(self) -> list[Problem]:
        """Save the records of finished problems and return them."""
        finished, self.batch.finished = self.batch.finished, []
        for problem in finished:
            self.data.folder.save_or_warn(problem)
        return finished

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return the optimizer; None for methods that exchange tokens."""
        return None

    @abstractmethod
    def step(self, batch: Step, rows: Tensor) -> None:
        """Take one search step for the problems `rows` (Q,)."""

    @abstractmethod
    def score(self, rows: Tensor) -> list[Problem]:
        """Score the current prompts of the problems `rows` (Q,) and keep the best.

        Returns:
            The problems whose prompt improved.
        """

    def rows_to_score(self) -> Tensor:
        """Return the active problems (Q,) to score now: after every n-th step of each and after its last one."""
        every, last = int(self.score_every_n_steps), int(self.steps)
        return self.batch.where(lambda row: row.active and (row.steps % every == 0 or row.steps >= last))

    def step_active(self, loss: Tensor, rows: Tensor, clip: float | None = None) -> None:
        """Step the optimizer on the losses (Q,) of the problems `rows` (Q,); see `Batch.step`."""
        optimizer = cast("LightningOptimizer", self.optimizers())
        self.batch.step(optimizer.step, loss, rows, self.manual_backward, clip)

    def log_step(self, batch: Step, rows: Tensor, **values: Tensor) -> None:
        """Log values of a step before a score of one of `rows` (Q,), since reading them synchronizes the device."""
        if any((batch.steps[row] + 1) % self.score_every_n_steps == 0 for row in rows.tolist()):
            logged = {**values, **self.terms}
            self.log_dict({f"train/{name}": value.detach().mean() for name, value in logged.items()})

    def add_cost(self, rows: Tensor, samples: int) -> None:
        """Add denoiser samples to the counters of the problems `rows` (Q,); a backward pass counts as one."""
        for row in rows.tolist():
            self.batch[row].record.unet_samples += samples

    def finish_done(self, rows: Tensor) -> None:
        """Finish those of the problems `rows` (Q,) that no longer improve or took all their steps."""
        for row in rows.tolist():
            if self.batch[row].steps >= self.steps or self.batch[row].stale >= self.patience:
                self.finish(row)

    def finish(self, row: int) -> None:
        """Finish a problem, which leaves the batch at the next refill."""
        self.batch.finish(row)

    @abstractmethod
    def best_params(self, row: int) -> Tensor:
        """Return the parameters (...) of the best prompt of a row, or its initial ones, to continue from."""

    def draw_noise(self, problems: Sequence[Problem], step: int, count: int) -> Tensor:
        """Draw noise (P, N, C, h, w) for N images of P problems, a function of the seed, the problem and the step."""
        keys = [problem.key for problem in problems]
        return draw_noise(self.data.seed, keys, step, count, self.backbone.latent_shape, self.device)

    # --- results

    @abstractmethod
    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return one image of what the best prompts so far generate."""

    @abstractmethod
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score finished problems that have a prompt by the images that it generates.

        Args:
            problems: The records.
            scores: The scores to compute.
        """

    @abstractmethod
    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write images for users into the run folder.

        Args:
            problems: The first `MAX_SHOWN` records of the run that have a prompt.
            folder: The run folder.
        """

    def write_files(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write files for other tools into the run folder."""

    @abstractmethod
    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the losses (P,) by which the best prompts of P problems were chosen."""

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Print and log the validation losses of the best prompts."""
        found, losses = self.data.folder.with_prompt(), list[float]()
        given = 0
        while problems := list(islice(found, self.batch_size)):
            given += len(problems)
            problems = self.data.unchanged(problems)
            if not problems:
                continue
            values = self.validation_losses(problems).tolist()
            losses += values
            if self.trainer.is_global_zero:
                for problem, loss in zip(problems, values, strict=True):
                    say(f"{abs(loss):.5f}  {problem.target}  {problem.display_prompt}")
        if not losses and given:
            raise UserError(
                "No prompt of this run can be scored, since its images are missing or have changed; restore them."
            )
        if not losses:
            raise UserError("This run has no prompts yet; run `fit` first.")
        self.log("validation/loss", sum(losses) / len(losses), batch_size=len(losses))

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callbacks that every search needs."""
        return [NonFiniteGuard(), BestPrompt(), SampleGrid(self.log_images_every_n_steps), PromptProgress()]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Do nothing; the `Results` callback does the work."""

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """Do nothing; the `Results` callback does the work."""

    def encode(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encode texts as a user pastes them, to (P, R, D); see `Backbone.encode_text`."""
        return self.backbone.encode_text(texts, negative)

    @torch.no_grad()
    def generate(self, texts: Sequence[str], noise: Tensor, negative: str | Sequence[str] = "") -> Tensor:
        """Generate images (B, 3, H, W) in [-1, 1] of B texts.

        Args:
            texts: The prompts.
            noise: Standard normal, (B, C, h, w).
            negative: A negative prompt for all images, or one per image.
        """
        if any([negative] if isinstance(negative, str) else negative):
            self.sampler.check_guided("a negative prompt does nothing")

        def encode(indices: Tensor) -> tuple[Tensor, Tensor]:
            some = indices.tolist()
            negatives = [negative] if isinstance(negative, str) else [negative[i] for i in some]
            return self.encode([texts[i] for i in some]), self.encode(negatives, negative=True)

        return self.sampler.generate(noise, encode)

    def generate_best(self, problem: Problem, noise: Tensor, negative: str = "") -> Tensor:
        """Generate images (N, 3, H, W) in [-1, 1] of a problem's best prompt.

        Args:
            problem: The record.
            noise: Standard normal, (N, C, h, w).
            negative: A negative prompt, in place of the problem's own.
        """
        return self.generate([str(problem.prompt)] * len(noise), noise, negative or problem.negative_prompt or "")

    # --- checkpoints: the prompt and nothing of the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the prompts only."""
        return {name: value.detach() for name, value in self.named_parameters() if value is self.parameter}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the batch to the checkpoint."""
        checkpoint["batch"] = {**self.batch.save(), "parts": self.data.part[1], "microbatch": self.microbatch.size}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch of a checkpoint; if the number of ranks has changed, redistribute the open problems.

        Raises:
            UserError: The inputs or the settings are not those of the checkpoint.
        """
        several = [checkpoint]
        if checkpoint["batch"]["parts"] != self.data.part[1]:
            several = checkpoints_of_all(self.data.folder.checkpoints)
        records = {record["key"]: Problem(**record) for one in several for record in one["batch"]["records"]}
        self.data.find(list(records.values()))
        if gone := [problem for problem in records.values() if problem.index < 0]:
            raise UserError(
                f"The checkpoint has {len(gone)} {self.data.given[0]} that are not among {self.data.given[1]}; give "
                "the same ones and the same settings, or another --run."
            )
        if len(several) > 1 or several[0] is not checkpoint:
            checkpoint |= merge(several, lambda record: self.data.still_open(records[record["key"]]))
        self._resumed = saved = checkpoint["batch"]
        saved["records"] = [asdict(Problem(**record)) for record in saved["records"]]
        for record in saved["records"]:
            try:
                self.result_class.read(record["result"])
            except ValueError as error:
                raise UserError(
                    f"The checkpoint has results that are not those of {type(self).__name__}; give the settings that "
                    "the run was begun with."
                ) from error
            here = records[record["key"]]
            record |= {name: getattr(here, name) for name in ("target", "paths", "stamps", "caption", "index")}
        ((name, prompts),) = checkpoint["state_dict"].items()
        own = self.parameter.shape[1:]
        if [name] != list(self.state_dict()) or (0 not in own and prompts.shape[1:] != own):
            raise UserError(
                f"The checkpoint has prompts {name!r} of the shape {tuple(prompts.shape[1:])} and this search has "
                f"{next(iter(self.state_dict()))!r} of {tuple(own)}; give the settings that the run was begun with."
            )
        has_optimizer = any(checkpoint["optimizer_states"])  # Lightning saves the state {} where there is none
        if has_optimizer != (self.configure_optimizers() is not None):
            raise UserError(
                "The checkpoint has the state of another optimizer; give the settings that the run was begun with."
            )
        self.parameter.data = torch.empty_like(prompts)
        if self.microbatch.fitted:  # as before, so that calls round alike
            self.microbatch.size = saved["microbatch"]


def by_step(batch: Step, rows: Tensor) -> list[tuple[int, Tensor]]:
    """Group the problems `rows` (Q,) by the number of steps that they have taken."""
    steps = torch.tensor(batch.steps)[rows]
    return [(int(step), rows[steps == step]) for step in steps.unique()]
