"""What all methods share: a frozen backbone, a prompt that trains, and waves of problems that are searched together."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, Conditioning, load_backbone
from lightning_prompts.callbacks import BestPrompt, NonFiniteGuard, PromptProgress, SampleGrid
from lightning_prompts.data.inversion import ImagesToPrompts, Step
from lightning_prompts.errors import UserError
from lightning_prompts.problems import Problem
from lightning_prompts.prompts import TokenEmbeddings
from lightning_prompts.ranges import NotNegative, Positive
from lightning_prompts.vocabulary import encode_text

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


class PromptMethod(pl.LightningModule, ABC):
    """A search for the prompts of P problems under a frozen backbone; nothing but the prompts trains.

    A wave of problems is optimised together; each of them leaves it when its score has stopped falling. Checkpoints hold the
    wave's prompts and optimiser state alone.

    Args:
        backbone: `emoji`, a folder or a hub id.
        dtype: Precision of the frozen weights.
        offline: Do not connect to the hub.
        revision: Branch, tag or commit on the hub.
        patience: A problem is finished after this many scorings without a better one.
        microbatch: Samples per call of the denoiser.
        score_every: Steps between scorings.
        sample_every: Steps between the pictures that TensorBoard shows during the search; 0 for none.
        sampling_steps: Denoising steps of the pictures that `fit`, `test` and `predict` draw.
        guidance_scale: Weight of the prompt when these are drawn.
    """

    strict_loading = False  # a checkpoint has no backbone
    prompt: TokenEmbeddings
    problems: list[Problem]

    def __init__(
        self,
        *,
        backbone: str = "emoji",
        dtype: Dtype = "float32",
        offline: bool = False,
        revision: str | None = None,
        patience: Positive = 1000,
        microbatch: Positive = 16,
        score_every: Positive = 1,
        sample_every: NotNegative = 40,
        sampling_steps: Positive = 25,
        guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.offline, self.patience, self.microbatch = offline, patience, microbatch
        self.score_every, self.sample_every = score_every, sample_every
        self.sampling_steps, self.guidance_scale = sampling_steps, guidance_scale
        self.backbone: Backbone = load_backbone(backbone, dtype, offline, revision)
        self.backbone.calls(sampling_steps)  # refuses more steps than the sampler has
        self.tower = self.backbone.towers[0]
        self.problems = []
        self.active = torch.empty(0, dtype=torch.bool)
        self.stale: list[int] = []  # scorings without a better one, a problem
        self._resumed: dict[str, Any] | None = None

    # --- the wave

    @property
    def data(self) -> ImagesToPrompts:
        """The data module."""
        data: ImagesToPrompts = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def on_train_start(self) -> None:
        """Goes on with the wave that a checkpoint holds."""
        if self._resumed:
            saved = [Problem(**record) for record in self._resumed["records"]]
            for problem in saved:
                problem.move_to(self.data.records[problem.key])
                if problem.status != "failed":  # what failed is tried again in the next wave
                    self.data.records[problem.key] = problem
            self.data.save()
            self.take(saved)
            self.active, self.stale = torch.tensor(self._resumed["active"]), list(self._resumed["stale"])
            self.data.loader.step = self._resumed["step"]
            self._resumed = None
        elif not self.problems:
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Begins a wave: first prompts and a fresh optimiser."""
        if self._resumed or self.active.any():
            return
        self.take([problem for problem in self.data.own() if problem.status == "open"])
        if self.problems:
            self.begin(self.initial_embeddings())
        self.data.save()
        self.active, self.stale = torch.ones(len(self.problems), dtype=torch.bool), [0] * len(self.problems)

    @abstractmethod
    def initial_embeddings(self) -> Tensor:
        """What the wave starts from, (P, M, D)."""

    def begin(self, embeddings: Tensor) -> None:
        """Puts the wave's problems there (P, M, D); what the optimiser knows of the points before the jump is forgotten."""
        self.prompt.begin(embeddings)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def on_train_epoch_end(self) -> None:
        """Ends the wave, and the run when no problem is open."""
        if self.trainer.should_stop:  # as by --trainer.max_time; what is open can go on later
            return
        self.data.loader.step = 0  # also of a wave that ended early
        self.trainer.should_stop = all(problem.status != "open" for problem in self.data.own())

    def take(self, problems: list[Problem]) -> None:
        """Makes problems the wave."""
        self.problems, self._begun = problems, time.perf_counter()

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> int | None:
        """Ends the wave when no problem is left in it."""
        return None if self.active.any() else -1

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """One step of the problems that are still active."""
        rows = self.active.nonzero().squeeze(1)
        self.search(batch, rows)
        elapsed, self._begun = time.perf_counter() - self._begun, time.perf_counter()
        for row in rows.tolist():
            self.problems[row].seconds += elapsed / len(rows)

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """What moves the embeddings; nothing where tokens are exchanged."""
        return None

    @abstractmethod
    def search(self, batch: Step, rows: Tensor) -> None:
        """Moves the prompts of the problems `rows` (Q,) by one optimiser step."""

    @abstractmethod
    def score(self) -> list[Problem]:
        """Scores what the active problems have come to and keeps what is best.

        Returns:
            The problems that now have a better prompt.
        """

    def step_active(self, optimizer: Any, loss: Tensor) -> None:
        """One step of a torch optimiser down the losses (Q,) of the active problems; the other rows stay where they are.

        So does, for this step, a problem whose gradient is not finite.
        """
        optimizer.zero_grad()
        before = self.prompt.embeddings.detach().clone()
        self.manual_backward(loss.sum())
        gradient = self.prompt.embeddings.grad
        assert gradient is not None
        sound, active = gradient.isfinite().flatten(1).all(1), self.active.to(self.device)
        for row in (active & ~sound).nonzero().squeeze(1).tolist():
            log.warning("The gradient of %s is not finite; it is left out of this step.", self.problems[row].target)
        gradient[~sound] = 0
        optimizer.step()
        with torch.no_grad():  # momentum and weight decay move rows without a gradient too
            moving = (active & sound).view(-1, 1, 1)
            self.prompt.embeddings.copy_(torch.where(moving, self.prompt.embeddings, before))

    def count(self, rows: Tensor, samples: int) -> None:
        """Adds denoiser samples to the problems' counters; a backward counts as one."""
        for row in rows.tolist():
            self.problems[row].unet_samples += samples

    def retire(self, last: bool) -> list[Problem]:
        """Takes finished problems out of the wave: those that no longer improve, or all after the last step."""
        finished = []
        for row in self.active.nonzero().squeeze(1).tolist():
            if last or self.stale[row] >= self.patience:
                self.active[row] = False
                self.problems[row].finish()
                finished.append(self.problems[row])
        return finished

    # --- results

    def configure_callbacks(self) -> list[pl.Callback]:
        """What every search needs around its steps."""
        return [NonFiniteGuard(), BestPrompt(self.score_every), SampleGrid(self.sample_every), PromptProgress()]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """What the denoiser is told for prompts that a person has pasted."""
        return self.backbone.encode(encode_text(self.tower.tokenizer, texts, self.tower.length).to(self.device))

    @torch.no_grad()
    def draw(self, texts: Sequence[str], noise: Tensor, negative: str = "") -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B texts from noise (B, C, h, w), led away from a negative text."""
        if negative and self.guidance_scale <= 1:
            raise UserError(
                f"With a guidance of {self.guidance_scale:g} a negative prompt does nothing; give --model.guidance_scale above 1."
            )
        away, parts = self.encode([negative]), []
        for rows in range(0, len(noise), self.microbatch):
            some = slice(rows, rows + self.microbatch)
            parts.append(self.draw_from(self.encode(texts[some]), away, noise[some], self.sampling_steps).cpu())
        return torch.cat(parts)

    def draw_from(self, told: Conditioning, away: Conditioning, noise: Tensor, steps: int) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B prompts from noise (B, C, h, w), led away from 1 or B others."""
        return self.backbone.decode(self.backbone.sample(told, away, noise, steps, self.guidance_scale))

    # --- checkpoints: the prompt and nothing of the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The prompts alone."""
        return {"prompt.embeddings": self.prompt.embeddings.detach()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the records that the rows belong to."""
        checkpoint["wave"] = {
            "records": [asdict(problem) for problem in self.problems],
            "active": self.active.tolist(),
            "stale": self.stale,
            "step": self.data.loader.step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's problems; refuses those whose pictures are not given now."""
        gone = [record for record in checkpoint["wave"]["records"] if record["key"] not in self.data.records]
        if gone:
            raise UserError(
                f"The checkpoint goes on with {len(gone)} pictures that are not among --data.images now; "
                "give the same pictures and settings, or another --run."
            )
        self._resumed = checkpoint["wave"]
        self.prompt.embeddings.data = torch.empty_like(checkpoint["state_dict"]["prompt.embeddings"])
