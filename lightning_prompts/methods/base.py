"""What the inverters share: a frozen backbone, a prompt that trains, and the score that decides what is best."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, Conditioning, load_backbone
from lightning_prompts.callbacks import BestPrompt, NonFiniteGuard, PromptProgress, SampleGrid
from lightning_prompts.data.addresses import (
    START,
    VALIDATION,
    draw_noise,
    validation_timesteps,
)
from lightning_prompts.data.inversion import ImagesToPrompts, Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.start import best_words, earlier, random_tokens
from lightning_prompts.objectives import ClipSimilarity, Denoising
from lightning_prompts.objectives.clip import clip_of
from lightning_prompts.problems import Problem
from lightning_prompts.prompts import TokenEmbeddings
from lightning_prompts.vocabulary import Metric, contains_blocked, encode_text, fill_template, round_trip

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


class Found(NamedTuple):
    """A prompt that was found, by its tokens or, where it is no text, by its embeddings (M, D)."""

    prompt: str
    token_ids: list[int] | None
    embedding: list[list[float]] | None
    sound: bool = True  # what is read again is what was written down, and allowed


@dataclass(frozen=True, eq=False)
class Samples:
    """What Q problems are denoised from: latents (Q, N, C, h, w), timesteps (Q, N) and noise (Q, N, C, h, w).

    With pictures to lead away from, their latents (Q, N, C, h, w) are seen at the same timesteps through the same noise.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    negative: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Samples:
        """Selects problems, as rows of a tensor."""
        negative = None if self.negative is None else self.negative[rows]
        return Samples(self.latents[rows], self.timesteps[rows], self.noise[rows], negative)


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
        score_every: Steps between scorings.
        sample_every: Steps between the pictures that TensorBoard shows during the search; 0 for none.
        sampling_steps: Denoising steps of the pictures that `fit`, `test` and `predict` draw.
        guidance_scale: Weight of the prompt when these are drawn.
        metric: Distance by which embeddings are replaced with tokens.
        start: What the search starts from: `random` tokens, the best `clip_words`, or the folder of a run, whatever its method,
            that has prompts for these pictures.
        denoising_weight: Weight of the denoising loss in what is minimised.
        negative_weight: Weight of the denoising loss of `--data.negative_images` against that of the target's.
        clip_weight: Weight of one minus the CLIP's cosine of prompt and pictures in what is minimised.
        clip: Folder or hub id of this CLIP; None for the one that goes with the backbone.
    """

    strict_loading = False  # a checkpoint has no backbone
    problems: list[Problem]
    latents: Tensor

    def __init__(
        self,
        *,
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
        score_every: int = 1,
        sample_every: int = 40,
        sampling_steps: int = 25,
        guidance_scale: float = 3.0,
        metric: Metric = "euclidean",
        start: str = "random",
        denoising_weight: float = 1.0,
        negative_weight: float = 1.0,
        clip_weight: float = 0.0,
        clip: str | None = None,
    ) -> None:
        super().__init__()
        if not denoising_weight and not clip_weight:
            raise UserError("There is nothing to minimise; raise --model.denoising_weight or --model.clip_weight.")
        self.automatic_optimization = False
        self.start, self.denoising_weight, self.negative_weight = start, denoising_weight, negative_weight
        self.offline = offline
        self.template, self.blocked, self.patience = template, tuple(blocked), patience
        self.score_every, self.sample_every = score_every, sample_every
        self.sampling_steps, self.guidance_scale = sampling_steps, guidance_scale
        self.backbone: Backbone = load_backbone(backbone, dtype, offline, revision)
        self.tower = self.backbone.towers[0]
        words = None if words is None else tuple(words)
        self.prompt = TokenEmbeddings(self.tower, template, tokens, self.blocked, words, metric)
        self.denoising = Denoising(microbatch)
        self.clip_weight = clip_weight
        self._clip_name, self._clip = clip or clip_of(self.backbone.name), cast("ClipSimilarity | None", None)
        self._features: dict[str, Tensor] = {}
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
            saved = [Problem(**record) for record in self._resumed["records"]]
            gone = [problem for problem in saved if problem.key not in self.data.records]
            if gone:
                raise UserError(
                    f"The checkpoint goes on with {len(gone)} pictures that are not among --data.images now; "
                    "give the same pictures and settings, or another --run."
                )
            self.data.records.update({problem.key: problem for problem in saved})
            self._take(saved)
            self.active, self.stale = torch.tensor(self._resumed["active"]), list(self._resumed["stale"])
            self._resumed = None
        elif not self.problems:
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Begins a wave: random allowed tokens, a fresh optimiser, the initial prompts' scores."""
        if self._resumed or self.active.any():
            return
        self._take([problem for problem in self.data.own() if problem.status == "open"])
        if self.problems:
            self.begin(self.initial_embeddings())
        self.data.save()
        self.active, self.stale = torch.ones(len(self.problems), dtype=torch.bool), [0] * len(self.problems)

    def random_tokens(self, step: int) -> Tensor:
        """Allowed tokens (P, M) for the wave, drawn at a step's address."""
        return random_tokens(self.prompt, self.problems, self.data.seed, step)

    def initial_embeddings(self) -> Tensor:
        """What the wave starts from, (P, M, D); a shorter prompt of another run is filled up with random tokens."""
        if self.start == "clip_words":
            return self.prompt.table[self.clip_words()].float()
        embeddings = self.prompt.table[self.random_tokens(START)].float()
        if self.start != "random":
            for row, record in enumerate(earlier(self.start, self.problems)):
                found = self.embedded(record)[: embeddings.shape[1]]
                embeddings[row, : len(found)] = found
        return embeddings

    def clip_words(self, beams: int = 1) -> Tensor:
        """The words (P, M) that the CLIP finds most similar to each of the wave's pictures."""
        return best_words(self.clip, self.prompt, self.features(torch.arange(len(self.problems))), beams)

    def embedded(self, record: Problem) -> Tensor:
        """The embeddings (M, D) of what was found for a problem."""
        if record.embedding is not None:
            return torch.tensor(record.embedding, device=self.device)
        return self.prompt.table[torch.tensor(record.token_ids, device=self.device)].float()

    def begin(self, embeddings: Tensor) -> None:
        """Puts the wave's problems there (P, M, D); what the optimiser knows of the points before the jump is forgotten."""
        self.prompt.begin(embeddings)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def on_train_epoch_end(self) -> None:
        """Ends the run when no problem is open."""
        self.trainer.should_stop = all(problem.status != "open" for problem in self.data.own())

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

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """What moves the embeddings; nothing where tokens are exchanged."""
        return None

    @abstractmethod
    def search(self, batch: Step, rows: Tensor) -> None:
        """Moves the prompts of the problems `rows` (Q,) by one optimiser step."""

    # --- losses

    def samples(self, rows: Tensor, batch: Step) -> Samples:
        """Latents, timesteps and noise of a step of the problems `rows` (Q,); several pictures of one subject take turns."""
        timesteps = batch.timesteps.to(self.device)[rows]
        keys, count = [self.problems[row].key for row in rows.tolist()], timesteps.shape[1]
        turns = torch.arange(count, device=self.device) + max(batch.step, 0) * count
        noise = draw_noise(self.data.seed, keys, batch.step, count, self.latents.shape[2:], self.device)
        latents = self.latents[rows][:, turns % self.latents.shape[1]]
        others = self.data.negative_latents(self.backbone)
        negative = None if others is None else others.to(self.device)[turns % len(others)].expand_as(latents)
        return Samples(latents, timesteps, noise, negative)

    def loss(self, rows: Tensor, ids: Tensor, embeddings: Tensor, samples: Samples) -> Tensor:
        """What is minimised, (Q,): the weighted objectives of prompts (Q, L) with embeddings (Q, L, D) on a step's samples."""
        terms = {}
        if self.denoising_weight:
            told = self.backbone.encode(ids, embeddings)
            terms["denoising"] = self.denoising_weight * self.denoising_loss(rows, told, samples)
        if self.clip_weight:
            terms["clip"] = self.clip_weight * self.clip(ids, embeddings, self.features(rows))
        if len(terms) > 1 and torch.is_grad_enabled():
            self.log_dict({f"train/{name}": term.detach().mean() for name, term in terms.items()})
        return torch.stack(list(terms.values())).sum(0)

    def denoising_loss(self, rows: Tensor, conditioning: Conditioning, samples: Samples) -> Tensor:
        """Denoising losses (Q,) of Q prompts, less those of the pictures to lead away from."""
        passes = samples.timesteps.shape[1] * (2 if torch.is_grad_enabled() else 1)
        self.count(rows, passes)
        loss: Tensor = self.denoising(self.backbone, conditioning, samples.latents, samples.timesteps, samples.noise)
        if samples.negative is None:
            return loss
        self.count(rows, passes)
        other: Tensor = self.denoising(self.backbone, conditioning, samples.negative, samples.timesteps, samples.noise)
        return loss - self.negative_weight * other

    @property
    def clip(self) -> ClipSimilarity:
        """The CLIP that searches, loaded when it is first needed."""
        if self._clip is None:
            clip = ClipSimilarity(self._clip_name, self.offline)
            read, known = clip.clip.config.text_config.vocab_size, len(self.prompt.table)
            if read != known:
                raise UserError(
                    f"The CLIP {self._clip_name!r} reads {read} tokens and the model's text encoder {known}; name the CLIP that "
                    "this text encoder was taken from as --model.clip."
                )
            self._clip = clip.to(self.device)
        return self._clip

    def features(self, rows: Tensor) -> Tensor:
        """Mean features (Q, E) of the pictures of the problems `rows` (Q,) in this CLIP."""
        return torch.stack([self.features_of(self.problems[row]) for row in rows.tolist()])

    def features_of(self, problem: Problem) -> Tensor:
        """Mean features (E,) of a problem's pictures in this CLIP, computed once."""
        if problem.key not in self._features:
            (pictures,) = self.data.pictures([problem])
            self._features[problem.key] = self.clip.features(pictures.to(self.device)).mean(0)
        return self._features[problem.key]

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """What the denoiser is told for prompts that a person has pasted."""
        return self.backbone.encode(encode_text(self.tower.tokenizer, texts, self.tower.length).to(self.device))

    @torch.no_grad()
    def validation_loss(self, rows: Tensor, conditioning: Conditioning) -> Tensor:
        """The one definition of best: losses (Q,) of prompts as a person would paste them, on noise that never trains."""
        timesteps = validation_timesteps(self.data.validation_samples, *self.data.timesteps)
        samples = self.samples(rows, Step(VALIDATION, timesteps.expand(len(self.problems), -1)))
        return self.denoising_loss(rows, conditioning, samples)

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

    # --- results

    def configure_callbacks(self) -> list[pl.Callback]:
        """What every inversion needs around its steps."""
        return [NonFiniteGuard(), BestPrompt(self.score_every), SampleGrid(self.sample_every), PromptProgress()]

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """The validation loss of the decoded prompts."""
        found = [problem for problem in self.data.records.values() if problem.prompt]
        if not found:
            raise UserError("This run has no prompts yet; run `fit` first.")
        self._take(found)
        losses = self.validation_loss(torch.arange(len(found)), self.encode([str(problem.prompt) for problem in found]))
        for problem, loss in zip(found, losses.tolist(), strict=True):
            print(f"{loss:.5f}  {problem.target}  {problem.prompt}")
        self.log("validation/loss", losses.mean(), batch_size=len(found))

    def test_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    @torch.no_grad()
    def draw(self, texts: Sequence[str], noise: Tensor, negative: str = "") -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B texts from noise (B, C, h, w), led away from a negative text."""
        if negative and self.guidance_scale <= 1:
            raise UserError(
                f"With a guidance of {self.guidance_scale:g} a negative prompt does nothing; give --model.guidance_scale above 1."
            )
        told, away = self.encode(texts), self.encode([negative])
        parts = []
        for rows in torch.arange(len(noise)).split(self.denoising.microbatch):
            part = self.backbone.sample(
                told[rows.to(self.device)], away, noise[rows], self.sampling_steps, self.guidance_scale
            )
            parts.append(self.backbone.decode(part).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def score(self) -> list[Problem]:
        """Scores the active problems' nearest tokens and keeps what is best.

        Returns:
            The problems that now have a better prompt.
        """
        rows = self.active.nonzero().squeeze(1)
        found, told = self.found(rows)
        losses, better = self.validation_loss(rows, told).tolist(), []
        for row, candidate, loss in zip(rows.tolist(), found, losses, strict=True):
            problem = self.problems[row]
            if problem.initial_validation_loss is None:
                problem.initial_validation_loss = loss
            self.stale[row] += 1
            best = float("inf") if problem.validation_loss is None else problem.validation_loss
            if candidate.sound and loss < best:
                problem.keep(candidate.prompt, loss, candidate.token_ids, candidate.embedding)
                self.stale[row] = 0
                better.append(problem)
        return better

    def found(self, rows: Tensor) -> tuple[list[Found], Conditioning]:
        """What the search has come to for the problems `rows` (Q,), written down and read again: the nearest tokens' text."""
        found = self.written(self.prompt.project()[rows.to(self.device)].cpu())
        return found, self.encode([candidate.prompt for candidate in found])

    def written(self, token_ids: Tensor) -> list[Found]:
        """Prompts of tokens (Q, M) as text in the template, and whether they are sound."""
        texts, survives = round_trip(self.tower.tokenizer, token_ids)
        texts = [fill_template(self.template, text) for text in texts]
        sound = [
            ok and not contains_blocked(text, self.blocked) for ok, text in zip(survives.tolist(), texts, strict=True)
        ]
        return [Found(text, ids, None, ok) for text, ids, ok in zip(texts, token_ids.tolist(), sound, strict=True)]

    def retire(self, last: bool) -> list[Problem]:
        """Takes finished problems out of the wave: those that no longer improve, or all after the last step."""
        finished = []
        for row in self.active.nonzero().squeeze(1).tolist():
            if last or self.stale[row] >= self.patience:
                self.active[row] = False
                self.problems[row].finish()
                finished.append(self.problems[row])
        return finished

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
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's problems."""
        self._resumed = checkpoint["wave"]
        self.prompt.embeddings.data = torch.empty_like(checkpoint["state_dict"]["prompt.embeddings"])
