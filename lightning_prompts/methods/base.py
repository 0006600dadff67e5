"""What the inverters share: a frozen backbone, a prompt that trains, and the score that decides what is best."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, load_backbone
from lightning_prompts.data.addresses import (
    START,
    VALIDATION,
    draw_noise,
    generator,
    validation_timesteps,
)
from lightning_prompts.data.inversion import ImagesToPrompts, Step
from lightning_prompts.errors import UserError
from lightning_prompts.objectives import Denoising
from lightning_prompts.problems import Problem
from lightning_prompts.prompts import TokenEmbeddings
from lightning_prompts.vocabulary import Metric, contains_blocked, encode_text, fill_template, round_trip

Dtype = Literal["float32", "bfloat16", "float16"]


class PromptMethod(pl.LightningModule, ABC):
    """An inverter: P pictures, one prompt each, of which only the token embeddings train.

    A wave of problems is optimised together; each of them leaves it when its score has stopped falling. Checkpoints hold the
    wave's prompts and optimiser state alone.

    Args:
        backbone: `emoji`, a folder or a hub id.
        dtype: Precision of the frozen weights.
        offline: Do not connect to the hub.
        revision: Branch, tag or commit on the hub.
        tokens: M, length of the prompt in tokens.
        template: Fixed words around the prompt, with `{}` where it goes.
        blocked: Words, or parts of words, that must not appear.
        words: The only words that may be used.
        patience: A problem is finished after this many scorings without a better one.
        microbatch: Samples per call of the denoiser.
        metric: Distance by which embeddings are replaced with tokens.
    """

    strict_loading = False  # a checkpoint has no backbone
    problems: list[Problem]
    latents: Tensor

    def __init__(
        self,
        backbone: str = "emoji",
        dtype: Dtype = "float32",
        offline: bool = False,
        revision: str | None = None,
        tokens: int = 8,
        template: str = "{}",
        blocked: Sequence[str] = (),
        words: Sequence[str] | None = None,
        patience: int = 1000,
        microbatch: int = 16,
        metric: Metric = "euclidean",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.template, self.blocked, self.patience = template, tuple(blocked), patience
        self.backbone: Backbone = load_backbone(backbone, dtype, offline, revision)
        self.tower = self.backbone.towers[0]
        words = None if words is None else tuple(words)
        self.prompt = TokenEmbeddings(self.tower, template, tokens, self.blocked, words, metric)
        self.denoising = Denoising(microbatch)
        self.problems = []
        self.register_buffer("latents", torch.empty(0), persistent=False)
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
            known = self.data.records
            gone = [key for key in self._resumed["keys"] if key not in known]
            if gone:
                raise UserError(
                    f"The checkpoint goes on with {len(gone)} pictures that are not among --data.images now; "
                    "give the same pictures and settings, or another --run."
                )
            self._take([known[key] for key in self._resumed["keys"]])
            self.active, self.stale = torch.tensor(self._resumed["active"]), list(self._resumed["stale"])
            self._resumed = None
        elif not self.problems:
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Begins a wave: random allowed tokens, a fresh optimiser, the initial prompts' scores."""
        if self._resumed or self.active.any():
            return
        self._take([problem for problem in self.data.records.values() if problem.status == "open"])
        if not self.problems:
            return
        keys, tokens = [problem.key for problem in self.problems], len(self.prompt.positions)
        allowed = self.prompt.allowed.nonzero().squeeze(1).cpu()
        draws = [generator(self.data.seed, key, START, 0) for key in keys]
        start = [allowed[torch.randint(len(allowed), (tokens,), generator=g)] for g in draws]
        self.prompt.begin(torch.stack(start).to(self.device))
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.active, self.stale = torch.ones(len(keys), dtype=torch.bool), [0] * len(keys)

    def _take(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.latents = self.data.latents(self.backbone, problems).to(self.device)
        self._begun = time.perf_counter()

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

    @abstractmethod
    def search(self, batch: Step, rows: Tensor) -> None:
        """Moves the prompts of the problems `rows` (Q,) by one optimiser step."""

    # --- losses

    def noise(self, rows: Tensor, step: int, samples: int) -> Tensor:
        """This step's noise of some problems, (Q, N, C, h, w); every closure of a step gets the same."""
        keys = [self.problems[row].key for row in rows.tolist()]
        return draw_noise(self.data.seed, keys, step, samples, self.latents.shape[2:], self.device)

    def targets(self, rows: Tensor, step: int, samples: int) -> Tensor:
        """Latents of some problems, (Q, N, C, h, w); several pictures of one subject take turns."""
        pictures = self.latents.shape[1]
        which = (torch.arange(samples, device=self.device) + max(step, 0) * samples) % pictures
        return self.latents[rows][:, which]

    def denoising_loss(self, rows: Tensor, ids: Tensor, embeddings: Tensor, batch: Step) -> Tensor:
        """Denoising losses (Q,) of embedded prompts (Q, L, D) at this step's timesteps and noise."""
        timesteps = batch.timesteps.to(self.device)[rows]
        samples = timesteps.shape[1]
        conditioning = self.backbone.encode(ids, embeddings)
        latents, noise = self.targets(rows, batch.step, samples), self.noise(rows, batch.step, samples)
        self.count(rows, 2 * samples)
        return self.denoising(self.backbone, conditioning, latents, timesteps, noise)

    @torch.no_grad()
    def validation_loss(self, rows: Tensor, texts: Sequence[str]) -> Tensor:
        """The one definition of best: losses (Q,) of prompts as a person would paste them, on noise that never trains."""
        samples = self.data.validation_samples
        ids = encode_text(self.tower.tokenizer, texts, self.tower.length).to(self.device)
        timesteps = validation_timesteps(samples, *self.data.timesteps).to(self.device).expand(len(rows), samples)
        latents, noise = self.targets(rows, VALIDATION, samples), self.noise(rows, VALIDATION, samples)
        self.count(rows, samples)
        return self.denoising(self.backbone, self.backbone.encode(ids), latents, timesteps, noise)

    def count(self, rows: Tensor, samples: int) -> None:
        """Adds denoiser samples to the problems' counters; a backward counts as one."""
        for row in rows.tolist():
            self.problems[row].unet_samples += samples

    # --- results

    @torch.no_grad()
    def score(self) -> list[Problem]:
        """Scores the active problems' nearest tokens and keeps what is best.

        Returns:
            The problems that now have a better prompt.
        """
        rows = self.active.nonzero().squeeze(1)
        token_ids = self.prompt.project()[rows.to(self.device)]
        texts, survives = round_trip(self.tower.tokenizer, token_ids.cpu())
        filled = [fill_template(self.template, text) for text in texts]
        fits = [
            bool(ok) and not contains_blocked(text, self.blocked) for ok, text in zip(survives, filled, strict=True)
        ]
        losses = self.validation_loss(rows, filled).tolist()
        better = []
        for row, text, ids, ok, loss in zip(rows.tolist(), filled, token_ids.tolist(), fits, losses, strict=True):
            problem = self.problems[row]
            if problem.initial_validation_loss is None:
                problem.initial_validation_loss = loss
            self.stale[row] += 1
            if ok and loss < float("inf" if problem.validation_loss is None else problem.validation_loss):
                problem.prompt, problem.token_ids, problem.validation_loss = text, ids, loss
                self.stale[row] = 0
                better.append(problem)
        return better

    def retire(self, last: bool) -> list[Problem]:
        """Takes finished problems out of the wave: those that no longer improve, or all after the last step."""
        finished = []
        for row in self.active.nonzero().squeeze(1).tolist():
            if last or self.stale[row] > self.patience:
                self.active[row] = False
                self.problems[row].finish()
                finished.append(self.problems[row])
        return finished

    # --- checkpoints: the prompt and nothing of the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The prompts alone."""
        return {"prompt.embeddings": self.prompt.embeddings.detach()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which problems the rows belong to."""
        checkpoint["wave"] = {
            "keys": [problem.key for problem in self.problems],
            "active": self.active.tolist(),
            "stale": self.stale,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's problems."""
        self._resumed = checkpoint["wave"]
        self.prompt.embeddings.data = torch.empty_like(checkpoint["state_dict"]["prompt.embeddings"])
