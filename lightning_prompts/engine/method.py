"""The base class of all methods: a frozen backbone, a prompt that trains, and a batch of problems searched together."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone, BackboneLike, BackboneSettings, as_backbone
from lightning_prompts.callbacks import BestPrompt, NonFiniteGuard, PromptProgress, SampleGrid
from lightning_prompts.distributed import broadcast, num_sample_ranks
from lightning_prompts.engine.batch import Batch
from lightning_prompts.engine.datamodule import ProblemData, Step
from lightning_prompts.engine.evaluation import Evaluation
from lightning_prompts.engine.resume import prepare_checkpoint, restore_batch
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import MethodResult, Problem
from lightning_prompts.sampling import Microbatch, SamplerSettings
from lightning_prompts.sampling.seeding import draw_noise
from lightning_prompts.setting_types import NotNegative, Positive
from lightning_prompts.typed_module import TypedModule

if TYPE_CHECKING:
    from pytorch_lightning.core.optimizer import LightningOptimizer

    from lightning_prompts.callbacks.scores import Scores
    from lightning_prompts.methods.dpo_diff.logits import WordChoices
    from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
    from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds

log = logging.getLogger(__name__)

MOST_STEPS = 10  # default limit of the denoising steps of images that a search generates repeatedly


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
        self.sampler = sampler.build(self.backbone, self.microbatch, MOST_STEPS if self.generates_images else None)
        self.vocabulary = self.backbone.vocabulary
        self.terms: dict[str, Tensor] = {}  # of the last loss, if it is a sum
        self.scorers: dict[str, Any] = {}  # what scores results, by name
        self.evaluation = Evaluation(self)
        self._resumed: dict[str, Any] | None = None  # the batch of a checkpoint

    @property
    def data(self) -> ProblemData:
        """The data module that feeds problems to this method."""
        return cast("ProblemData", self.trainer.datamodule)  # type: ignore[attr-defined]

    @cached_property
    def batch(self) -> Batch:
        """The batch of problems that are searched together."""
        return Batch(self.prompt, self.batch_size)

    # --- what a method implements

    @abstractmethod
    def init_params(self, rows: Tensor) -> Tensor:
        """Return the initial parameters (Q, ...) of the problems `rows` (Q,)."""

    @abstractmethod
    def step(self, batch: Step, rows: Tensor) -> None:
        """Take one search step for the problems `rows` (Q,)."""

    @abstractmethod
    def score(self, rows: Tensor) -> list[Problem]:
        """Score the current prompts of the problems `rows` (Q,), keep the best, and return the improved problems."""

    @abstractmethod
    def best_params(self, row: int) -> Tensor:
        """Return the parameters (...) of the best prompt of a row, or its initial ones, to continue from."""

    @abstractmethod
    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the losses (P,) by which the best prompts of P problems were chosen."""

    @abstractmethod
    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return one image of what the best prompts so far generate."""

    @abstractmethod
    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Score finished problems by the images of their prompts, and add the scores to their records."""

    @abstractmethod
    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write images for users into the run folder, of the first `MAX_SHOWN` problems that have a prompt."""

    def write_files(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write files for other tools into the run folder."""

    # --- what a method may change

    @classmethod
    def search_length(cls, settings: Mapping[str, Any]) -> tuple[str, int] | None:
        """Return the setting that limits the length of a search, which `--effort` scales, and its value, if any."""
        steps = settings.get("steps")
        return None if steps is None else ("steps", int(steps))

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return the optimizer; None for methods that exchange tokens."""
        return None

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callbacks that every search needs."""
        return [NonFiniteGuard(), BestPrompt(), SampleGrid(self.log_images_every_n_steps), PromptProgress()]

    def set_rows(self, problems: list[Problem]) -> None:
        """Prepare for the problems of the batch, one per row."""

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        self.data.evict(problem)

    def clips(self) -> list[ClipSimilarity]:
        """Return the CLIPs that take part in the search and so cannot be held-out scorers."""
        return [module for module in self.modules() if isinstance(module, ClipSimilarity)]

    def encode(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encode texts as a user pastes them, to (P, R, D); see `Backbone.encode_text`."""
        return self.backbone.encode_text(texts, negative)

    @property
    def sampling_settings(self) -> dict[str, Any]:
        """The sampling settings of images, with the model's defaults for unset ones; recorded with the results."""
        return {"num_inference_steps": self.sampler.num_inference_steps, "guidance_scale": self.sampler.guidance_scale}

    # --- the search, in the order of the calls

    def setup(self, stage: str) -> None:
        """Divide the samples of each call among the ranks."""
        self.microbatch.check_device(self.trainer.strategy.root_device)
        self.microbatch.ranks = num_sample_ranks(self.trainer)
        if self.microbatch.ranks > 1:
            self.batch.parameter.register_hook(broadcast)

    def on_train_start(self) -> None:
        """Restore the batch of a checkpoint."""
        self.batch.optimizers = self.trainer.optimizers
        if self._resumed:
            restore_batch(self._resumed, self)
            self._resumed = None

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

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> int | None:
        """End the epoch when no problem in the batch is active, so that the next one refills it."""
        return None if len(self.batch.active_rows()) else -1

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Take one step for the active problems."""
        rows = self.batch.active_rows()
        self.step(batch, rows)
        self.batch.parameter.data = self.microbatch.broadcast(self.batch.parameter.data)
        self.batch.count_step(rows)

    def rows_to_score(self) -> Tensor:
        """Return the active problems (Q,) to score now: after every n-th step of each and after its last one."""
        every, last = int(self.score_every_n_steps), int(self.steps)
        return self.batch.where(lambda row: row.active and (row.steps % every == 0 or row.steps >= last))

    def finish_done(self, rows: Tensor) -> None:
        """Finish those of the problems `rows` (Q,) that no longer improve or took all their steps."""
        for row in rows.tolist():
            if self.batch[row].steps >= self.steps or self.batch[row].stale >= self.patience:
                self.batch.finish(row)

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

    def on_train_epoch_end(self) -> None:
        """Stop the run when no problem is open; problems that are open after an early stop can be resumed."""
        self.trainer.should_stop = self.trainer.should_stop or self.batch.exhausted

    # --- what steps use

    def step_active(self, loss: Tensor, rows: Tensor, clip: float | None = None) -> None:
        """Step on the losses (Q,) of `rows` (Q,) with Lightning's optimizer and precision; see `Batch.step`."""
        optimizer = cast("LightningOptimizer", self.optimizers())
        self.batch.step(optimizer.step, loss, rows, self.manual_backward, clip)

    def log_step(self, batch: Step, rows: Tensor, **values: Tensor) -> None:
        """Log values of a step if one of `rows` (Q,) is scored after it, since reading them waits for the device."""
        if any((batch.steps[row] + 1) % self.score_every_n_steps == 0 for row in rows.tolist()):
            logged = {**values, **self.terms}
            self.log_dict({f"train/{name}": value.detach().mean() for name, value in logged.items()})

    def draw_noise(self, problems: Sequence[Problem], step: int, count: int) -> Tensor:
        """Draw noise (P, N, C, h, w) for N images of each of P problems, by the seed, key and step; see `seeding`."""
        keys = [problem.key for problem in problems]
        return draw_noise(self.data.seed, keys, step, count, self.backbone.latent_shape, self.device)

    @torch.no_grad()
    def generate(self, texts: Sequence[str], noise: Tensor, negative: str | Sequence[str] = "") -> Tensor:
        """Generate images (B, 3, H, W) of B texts from noise (B, C, h, w); see `Sampler.generate_from_texts`."""
        return self.sampler.generate_from_texts(texts, noise, negative, self.encode)

    def generate_best(self, problem: Problem, noise: Tensor, negative: str = "") -> Tensor:
        """Generate images (N, 3, H, W) of a problem's best prompt, with its own negative prompt if none is given."""
        return self.generate([str(problem.prompt)] * len(noise), noise, negative or problem.negative_prompt or "")

    # --- after the search

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Recompute the validation losses of the best prompts of records."""
        self.evaluation.validate(batch)

    def on_validation_epoch_end(self) -> None:
        """Print the losses of all ranks, and log their mean."""
        losses = self.evaluation.print_losses()
        self.log("validation/loss", sum(losses) / len(losses), batch_size=len(losses))

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Generate images of the best prompts of records, score them, and save the records."""
        self.evaluation.test(batch)

    def predict_step(self, batch: list[Problem | str], batch_idx: int) -> Tensor:
        """Generate images (B, S, 3, H, W) of B records or texts and S seeds; see `PredictSettings`."""
        return self.evaluation.predict(batch)

    def on_test_epoch_end(self) -> None:
        """Wait for all ranks, and raise an error in a batch of any."""
        self.evaluation.meet()

    on_predict_epoch_end = on_test_epoch_end

    # --- checkpoints: the prompt and nothing of the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the prompts only, since the backbone is frozen."""
        return {name: value.detach() for name, value in self.named_parameters() if value is self.batch.parameter}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rows of the batch, the number of parts and the microbatch to a checkpoint."""
        checkpoint["batch"] = {**self.batch.save(), "parts": self.data.part[1], "microbatch": self.microbatch.size}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt a checkpoint to this search before Lightning restores it; see `prepare_checkpoint`."""
        self._resumed = prepare_checkpoint(checkpoint, self)
