"""What all methods share: a frozen backbone, a prompt that trains, and waves of problems that are searched together."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import Backbone, Kind, load_backbone, repeat, save_memory
from lightning_prompts.callbacks import BestPrompt, NonFiniteGuard, PromptProgress, SampleGrid, checkpoints_of_all
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.data.addresses import draw_noise
from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.microbatch import Microbatch
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.problems import Problem
from lightning_prompts.prompts import PromptArc, PromptEmbeds, TokenEmbeddings, WordChoices
from lightning_prompts.ranges import NotNegative, Positive
from lightning_prompts.ranks import of_rank_zero, sharing
from lightning_prompts.run_folder import RunFolder
from lightning_prompts.terminal import say
from lightning_prompts.unused import refuse_unused
from lightning_prompts.waves import fitted, merged

log = logging.getLogger(__name__)

T = TypeVar("T")
ENDLESS = ("cpu",)  # devices that do not say when their memory is full
Dtype = Literal["float32", "bfloat16", "float16"]
MOST_STEPS = 10  # sampling steps of pictures that a search draws again and again, unless a user asks for more

TRAINER: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,  # waves of problems until none is open
    "enable_checkpointing": False,  # ours is atomic, and who wants it adds it
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10**9,  # scoring is the BestPrompt callback's
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""What a Trainer has to be told to search prompts."""


class PromptMethod(pl.LightningModule, ABC):
    """A search for the prompts of P problems under a frozen backbone; nothing but the prompts trains.

    A wave of problems is optimised together; each of them leaves it when its score has stopped falling, and the next one joins.
    Checkpoints hold the wave's prompts and optimiser state alone.

    Args:
        backbone: `emoji`, a folder, a short name such as `sdxl`, a hub id, or a safetensors file; in Python also what
            `load_backbone` has returned, whose settings of loading and memory are those it was loaded with.
        dtype: Precision of the frozen weights.
        offline: Do not connect to the hub.
        revision: Branch, tag or commit on the hub.
        vocabulary: Whose tokens are searched, the `clip` or the `t5` encoders'; None for the family's choice.
        scheduler: Class of another scheduler of diffusers; None for the model's own.
        image_size: Height and width, in pixels, of what is drawn; None for what the model was trained on.
        config: The model or folder whose configuration and tokenizers go with a safetensors file; None for the first of its family.
        variant: Which of a folder's or repository's weights are read, such as `fp16`; None for those without a variant or, where there
            are none, for the only one.
        clip_skip: How many of the CLIP text encoders' last layers are skipped when a prompt is encoded, as in diffusers' pipelines of
            Stable Diffusion 1 to 3 and SDXL; negative prompts are encoded with all layers. None for all layers.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        vae_tiling: Decode large pictures in tiles, which changes them a little.
        cpu_offload: Have the text encoders, the denoiser and the autoencoder on the device one at a time.
        together: P, problems that are searched at a time; when one is finished the next takes its place.
        patience: A problem is finished after this many scorings without a better one.
        microbatch: Samples per call of the denoiser, half as many whenever the device runs out of memory; None for as many as the
            memory of a GPU holds.
        score_every: Steps between scorings.
        sample_every: Steps between the pictures that TensorBoard shows during the search; 0 for none.
        sampling_steps: Denoising steps of the pictures that `fit`, `test` and `predict` draw; None for as many as the model is
            drawn with by default, at most 10 in methods whose search itself draws many pictures.
        guidance_scale: Weight of the prompt when these are drawn; None for the model's.
    """

    if TYPE_CHECKING:
        __getattr__: None  # type: ignore[assignment, misc]  # nn.Module's would give every misspelled name a type
    strict_loading = False  # a checkpoint has no backbone
    prompt: TokenEmbeddings | WordChoices | PromptEmbeds | PromptArc
    problems: list[Problem]
    data_class: type[ProblemData]
    done: list[int]  # steps that each has taken
    stale: list[int]  # scorings of each without a better one
    lowered: list[int]  # how often the steps of each have been halved
    decisive: frozenset[str] = frozenset()  # settings that other searches can go on without
    draws: ClassVar[bool] = False  # whether every step of the search draws pictures

    def __init__(
        self,
        *,
        backbone: str | Backbone = "emoji",
        dtype: Dtype = "float32",
        offline: bool = False,
        revision: str | None = None,
        vocabulary: Kind | None = None,
        scheduler: str | None = None,
        image_size: Positive | None = None,
        config: str | None = None,
        variant: str | None = None,
        clip_skip: Positive | None = None,
        gradient_checkpointing: bool = False,
        vae_tiling: bool = False,
        cpu_offload: bool = False,
        together: Positive = 16,
        patience: Positive = 1000,
        microbatch: Positive | None = 16,
        score_every: Positive = 1,
        sample_every: NotNegative = 40,
        sampling_steps: Positive | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.together = int(together)
        self.offline, self.patience, self.microbatch = offline, patience, Microbatch(microbatch)
        self.score_every, self.sample_every = score_every, sample_every
        if isinstance(backbone, str):
            size = image_size and int(image_size)
            skip = clip_skip and int(clip_skip)
            backbone = load_backbone(
                backbone, dtype, offline, revision, vocabulary, scheduler, size, config, variant, skip
            )
            save_memory(backbone, gradient_checkpointing, vae_tiling, cpu_offload)
        else:
            loading = {"dtype": dtype, "revision": revision, "vocabulary": vocabulary, "scheduler": scheduler, "image_size": image_size,
                       "config": config, "variant": variant, "clip_skip": clip_skip,
                       "gradient_checkpointing": gradient_checkpointing, "vae_tiling": vae_tiling, "cpu_offload": cpu_offload}  # fmt: skip
            refuse_unused(PromptMethod, "on a backbone that is loaded", loading)
        self.backbone: Backbone = backbone
        own = self.backbone.default_steps
        self.sampling_steps = int(sampling_steps or (min(own, MOST_STEPS) if self.draws else own))
        self.guidance_scale = self.backbone.default_guidance if guidance_scale is None else guidance_scale
        self.backbone.calls(self.sampling_steps)  # refuses more steps than the sampler has
        self.vocabulary = self.backbone.vocabulary
        self.problems, self.done, self.stale, self.lowered = [], [], [], []
        self.finished: list[Problem] = []  # not yet saved
        self.active = torch.empty(0, dtype=torch.bool)
        self.left_out = torch.empty(0, dtype=torch.long)  # steps of each since it was scored, without a finite gradient
        self.terms: dict[str, Tensor] = {}  # of the last loss, if it is a sum
        self.scorers: dict[str, Any] = {}  # what scores results, by name
        self.over = False  # nothing is left to search
        self._resumed: dict[str, Any] | None = None

    @property
    def drawing(self) -> dict[str, Any]:
        """How pictures are drawn, with the model's own values where no setting was given; recorded with the results."""
        return {"sampling_steps": self.sampling_steps, "guidance_scale": self.guidance_scale}

    @property
    def few(self) -> bool:
        """Whether pictures are drawn in so few calls of the denoiser that a gradient can go through all of them."""
        return self.backbone.calls(self.sampling_steps, 1) <= 4

    def clips(self) -> list[ClipSimilarity]:
        """Return the CLIPs that take part in the search, whose judgement of its results is not held out."""
        return [module for module in self.modules() if isinstance(module, ClipSimilarity)]

    # --- the wave

    @property
    def data(self) -> ProblemData:
        """The data module."""
        data: ProblemData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @property
    def parameter(self) -> torch.nn.Parameter:
        """What trains, (P, ...)."""
        (parameter,) = (value for value in self.prompt.parameters() if value.requires_grad)
        return parameter

    def setup(self, stage: str) -> None:
        """Divides the samples among the ranks that share them; refuses a microbatch that nothing would limit."""
        if self.microbatch.fitted and self.trainer.strategy.root_device.type in ENDLESS:
            raise UserError(
                "A CPU's memory has no end that a program is told of, so that no microbatch can be fitted to it; give "
                "--model.microbatch 16."
            )
        self.microbatch.ranks = sharing(self.trainer)
        if self.microbatch.ranks > 1:
            self.parameter.register_hook(of_rank_zero)

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's on the device, without waiting until that has done all else."""
        return tensor.to(self.device, non_blocking=True)

    def agreed(self, value: T) -> T:
        """What all ranks go on with of something that each has computed for itself; see `of_rank_zero`."""
        return value if self.microbatch.ranks == 1 else of_rank_zero(value)

    def on_train_start(self) -> None:
        """Goes on with the wave that a checkpoint holds."""
        if self._resumed:
            wave, self._resumed = self._resumed, None
            problems = [Problem(**record) for record in wave["records"]]
            self.data.go_on({p.key: p.target for p, active in zip(problems, wave["active"], strict=True) if active})
            self.active, self.done, self.stale = torch.tensor(wave["active"]).bool(), wave["done"], wave["stale"]
            self.lowered, self.left_out = wave["lowered"], torch.tensor(wave["left_out"]).to(self.device).long()
            if problems:
                self.take(problems)
            for problem in problems:
                self.data.folder.save(problem)

    def fill(self) -> bool:
        """Lets what is finished out of the wave, and new problems in, as many as it has room for.

        Returns:
            Whether there is anything to search.
        """
        kept, gone = self.active.nonzero().squeeze(1), [self.problems[row] for row in (~self.active).nonzero()]
        new = list[Problem]()
        while len(kept) + len(new) < self.together and (problem := next(self.data.arrivals, None)):
            (self.finished if problem.status == "failed" else new).append(problem)
        self.over = not len(kept) + len(new)
        if not self.over and (gone or new):
            self._change(kept, new)
            for problem in gone:
                self.release(problem)
        return not self.over

    def _change(self, kept: Tensor, new: list[Problem]) -> None:
        """Makes the problems `kept` (Q,) of the wave, as far as they have come, and new ones the wave."""
        before, states = self.parameter.data[kept.to(self.device)], self._states()
        rows, added = kept.tolist(), [0] * len(new)
        self.take([*(self.problems[row] for row in rows), *new])
        self.done, self.stale, self.lowered = (
            [several[row] for row in rows] + added for several in (self.done, self.stale, self.lowered)
        )
        self.active = torch.ones(len(self.problems), dtype=torch.bool)
        left_out = self.left_out.to(self.device)
        self.left_out = torch.cat([left_out[kept.to(self.device)], left_out.new_zeros(len(new))])
        joined = torch.arange(len(rows), len(self.problems))
        first = self.first(joined)
        self.parameter.grad = None
        self.parameter.data = torch.cat([fitted(before, first.shape[1:]), first])
        for state, name, value in states:
            shape = first.shape[1:] if value.shape[1:] == before.shape[1:] else value.shape[1:]
            state[name] = torch.cat([fitted(value[kept.to(value.device)], shape), value.new_zeros(len(new), *shape)])
        self.forget(joined)
        for problem in new:
            if not self.data.folder.has(problem.key):
                self.data.folder.save(problem)

    @abstractmethod
    def first(self, rows: Tensor) -> Tensor:
        """Where the search for the problems `rows` (Q,) of the wave starts: the values of what trains, (Q, ...)."""

    def take(self, problems: list[Problem]) -> None:
        """Makes problems the wave."""
        self.problems, self._begun = problems, time.perf_counter()

    def release(self, problem: Problem) -> None:
        """Forgets what is remembered of a problem that has left the wave."""
        self.data.release(problem)

    def _states(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """What the optimiser holds with a row a problem, and where."""
        return [
            (state, name, value)
            for optimizer in self.trainer.optimizers
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.dim()
        ]

    def forget(self, rows: Tensor) -> None:
        """Makes the optimiser forget the steps it has taken of the problems `rows` (Q,), which were elsewhere."""
        for _, _, value in self._states():
            value[rows.to(value.device)] = 0
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, BatchedLBFGS):
                mask = torch.zeros(len(self.problems), dtype=torch.bool)
                mask[rows] = True
                optimizer.reset_history(mask)

    @torch.no_grad()
    def jump(self, rows: Tensor, there: Tensor) -> None:
        """Puts the problems `rows` (Q,) elsewhere (Q, ...); what the optimiser knows of the points before is forgotten."""
        self.parameter[self.here(rows)] = there.to(self.parameter)
        self.forget(rows)

    def on_train_epoch_end(self) -> None:
        """Ends the run when no problem is open; what is open when it was told to stop can go on later."""
        self.trainer.should_stop = self.trainer.should_stop or self.over

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> int | None:
        """Has the wave filled again when no problem is left in it."""
        return None if self.active.any() else -1

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """One step of the problems that are still active."""
        rows = self.active.nonzero().squeeze(1)
        self.search(batch, rows)
        if self.microbatch.ranks > 1:
            self.parameter.data = of_rank_zero(self.parameter.data)
        elapsed, self._begun = time.perf_counter() - self._begun, time.perf_counter()
        for row in rows.tolist():
            self.done[row] += 1
            self.problems[row].seconds += elapsed / len(rows)

    def on_train_batch_end(self, outputs: Any, batch: Step, batch_idx: int) -> None:
        """Saves what is finished, where no callback scores it before."""
        self.save_finished()

    def save_finished(self) -> list[Problem]:
        """Saves what is finished."""
        finished, self.finished = self.finished, []
        for problem in finished:
            self.data.folder.save_or_warn(problem)
        return finished

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """What moves the embeddings; nothing where tokens are exchanged."""
        return None

    @abstractmethod
    def search(self, batch: Step, rows: Tensor) -> None:
        """Moves the prompts of the problems `rows` (Q,) by one optimiser step."""

    @abstractmethod
    def score(self, rows: Tensor) -> list[Problem]:
        """Scores what the problems `rows` (Q,) have come to and keeps what is best.

        Returns:
            The problems that now have a better prompt.
        """

    def due(self) -> Tensor:
        """The active problems that are scored now, (Q,): after every n-th step of each, and after its last one."""
        rows = self.active.nonzero().squeeze(1).tolist()
        every, last = int(self.score_every), int(self.data.steps)
        return torch.tensor(
            [row for row in rows if self.done[row] % every == 0 or self.done[row] >= last], dtype=torch.long
        )

    def step_active(self, optimizer: Any, loss: Tensor, rows: Tensor, clip: float | None = None) -> None:
        """One step of a torch optimiser down the losses (Q,) of the problems `rows` (Q,); the others stay where they are.

        So does, for this step, a problem whose gradient is not finite; `NonFiniteGuard` tells it. With `clip` each element of the gradient is cut to
        [-clip, clip].
        """
        parameter = self.parameter
        before = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        if loss.requires_grad:  # it does not where slots are left empty, in all problems
            self.manual_backward(loss.sum())
        gradient = parameter.grad
        sound = gradient.isfinite().flatten(1).all(1)
        gradient.masked_fill_(~sound.view(-1, *(1,) * (parameter.dim() - 1)), 0)
        if clip is not None:
            gradient.clamp_(-clip, clip)
        optimizer.step()
        share = torch.zeros(len(parameter))  # of the step that is taken
        share[rows] = 0.5 ** torch.tensor([float(self.lowered[row]) for row in rows.tolist()])
        self.left_out += ~sound
        share = self.here(share).to(parameter).where(sound, 0).view(-1, *(1,) * (parameter.dim() - 1))
        with torch.no_grad():  # momentum and weight decay move rows without a gradient too
            parameter.copy_(torch.where(share > 0, torch.lerp(before, parameter, share), before))

    def tell(self, batch: Step, rows: Tensor, **values: Tensor) -> None:
        """Logs values of a step after which one of the problems `rows` (Q,) is scored; a look makes the device wait."""
        if any((batch.steps[row] + 1) % self.score_every == 0 for row in rows.tolist()):
            told = {**values, **self.terms}
            self.log_dict({f"train/{name}": value.detach().mean() for name, value in told.items()})

    def count(self, rows: Tensor, samples: int) -> None:
        """Adds denoiser samples to the problems' counters; a backward counts as one."""
        for row in rows.tolist():
            self.problems[row].unet_samples += samples

    def retire(self, rows: Tensor) -> None:
        """Finishes those of the problems `rows` (Q,) that no longer improve or have taken all their steps."""
        for row in rows.tolist():
            if self.done[row] >= self.data.steps or self.stale[row] >= self.patience:
                self.end(row)

    def end(self, row: int) -> None:
        """Finishes a problem, which leaves the wave."""
        self.active[row] = False
        self.problems[row].finish()
        self.finished.append(self.problems[row])

    @abstractmethod
    def best(self, row: int) -> Tensor:
        """Where the search for a problem has found its best, (...), to go back there; where it starts if there is none."""

    def draw_noise(self, problems: Sequence[Problem], step: int, count: int) -> Tensor:
        """Noise (P, N, C, h, w) for pictures of P problems, at a step's address."""
        keys = [problem.key for problem in problems]
        return draw_noise(self.data.seed, keys, step, count, self.backbone.latent_shape, self.device)

    # --- results

    @abstractmethod
    def shown(self, problems: list[Problem]) -> Image.Image:
        """What some problems' best prompts draw so far, as one picture."""

    @abstractmethod
    def measure(self, problems: list[Problem], scores: Scores) -> None:
        """Scores problems that have a prompt and are finished, by what is drawn from it.

        Args:
            problems: The records.
            scores: What scores them.
        """

    @abstractmethod
    def present(self, problems: list[Problem], folder: RunFolder) -> None:
        """Writes what a person looks at into the run's folder.

        Args:
            problems: The records that have a prompt, the first `SHOWN` of the run.
            folder: The run's folder.
        """

    def export(self, problems: list[Problem], folder: RunFolder) -> None:
        """Writes what other tools read into the run's folder."""

    @abstractmethod
    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """The losses (P,) by which the best prompts of P problems were chosen, computed again."""

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """The validation losses of what was found."""
        found, losses = self.data.folder.found(), list[float]()
        given = 0
        while problems := list(islice(found, self.together)):
            given += len(problems)
            problems = self.data.unchanged(problems)
            if not problems:
                continue
            values = self.validation_losses(problems).tolist()
            losses += values
            if self.trainer.is_global_zero:
                for problem, loss in zip(problems, values, strict=True):
                    say(f"{abs(loss):.5f}  {problem.target}  {problem.shown}")
        if not losses and given:
            raise UserError(
                "No prompt of this run can be scored, since its images are missing or have changed; restore them."
            )
        if not losses:
            raise UserError("This run has no prompts yet; run `fit` first.")
        self.log("validation/loss", sum(losses) / len(losses), batch_size=len(losses))

    def configure_callbacks(self) -> list[pl.Callback]:
        """What every search needs around its steps."""
        return [NonFiniteGuard(), BestPrompt(), SampleGrid(self.sample_every), PromptProgress()]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """All is done by the `Results` callback."""

    def encode(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encoded prompts (P, R, D) of what a person has pasted; see `Backbone.encode_text`."""
        return self.backbone.encode_text(texts, negative)

    def encode_negative(self, texts: Sequence[str]) -> Tensor:
        """Encoded prompts (P, R, D) to lead away from."""
        return self.encode(texts, negative=True)

    @torch.no_grad()
    def draw(self, texts: Sequence[str], noise: Tensor, negative: str | Sequence[str] = "") -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B texts from noise (B, C, h, w), led away from a negative text or B of them."""
        if any([negative] if isinstance(negative, str) else negative):
            self.check_guided("a negative prompt does nothing")

        def call(some: Tensor) -> Tensor:
            told = self.encode([texts[i] for i in some.tolist()])
            away = self.encode_negative(
                [negative] if isinstance(negative, str) else [negative[i] for i in some.tolist()]
            )
            return self.draw_from(told, away, noise[some], self.sampling_steps).cpu()

        return self.microbatch.over(len(noise), call, noise.device)

    def draw_found(self, problem: Problem, noise: Tensor, negative: str = "") -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] of what was found for a problem, from noise (N, C, h, w).

        Args:
            problem: The record.
            noise: One a picture.
            negative: What to lead away from, instead of what was found for that.
        """
        return self.draw([str(problem.prompt)] * len(noise), noise, negative or problem.negative_prompt or "")

    @torch.no_grad()
    def draw_embeds(self, embeds: Tensor, noise: Tensor) -> Tensor:
        """Pictures (P, N, 3, H, W) of encoded prompts (P, S, R, D) from noise (P, N, C, h, w)."""
        (told, away), flat = self.sides(embeds, noise.shape[1]), noise.flatten(0, 1)

        def call(some: Tensor) -> Tensor:
            return self.draw_from(told[some], away[some], flat[some], self.sampling_steps).cpu()

        pictures = self.microbatch.over(len(flat), call, flat.device)
        return pictures.view(*noise.shape[:2], *pictures.shape[1:])

    def sides(self, embeds: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """What the denoiser is told, and led away from, by encoded prompts (Q, S, R, D), each repeated for so many pictures."""
        told = embeds[:, 0]
        away = embeds[:, 1] if embeds.shape[1] == 2 else self.encode_negative([""]).expand(len(embeds), -1, -1)
        return repeat(told, count), repeat(away, count)

    def check_guided(self, otherwise: str, instead: str = "leave it out") -> None:
        """Refuses what only guidance gives a meaning."""
        if self.backbone.guides_itself:
            raise UserError(
                f"The model {self.backbone.name!r} guides itself, so that {otherwise}; {instead}, or choose another model."
            )
        if not self.backbone.guided(self.guidance_scale):
            raise UserError(
                f"With a guidance of {self.guidance_scale:g} {otherwise}; give --model.guidance_scale above 1, or {instead}."
            )

    def draw_from(self, told: Tensor, away: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B prompts from noise (B, C, h, w), led away from 1 or B others."""
        return self.backbone.decode(self.backbone.sample(told, away, noise, steps, self.guidance_scale))

    def judged(
        self,
        told: Tensor,
        away: Tensor,
        noise: Tensor,
        judge: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
        grad_steps: int = 0,
        calls: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is said of B drawn latents; no more than a microbatch of them is held at once, with or without a gradient.

        Args:
            told: B encoded prompts, (B, R, D).
            away: B encoded prompts to lead away from, (B, R, D).
            noise: (B, C, h, w).
            judge: Gives values (b,) of the drawn latents (b, C, h, w) and their numbers (b,) among the B, and by name what else
                there is to tell of them, (b, ...).
            grad_steps: Last calls of the denoiser that pass a gradient on to both prompts, see `Backbone.sample`.
            calls: Calls after which the clean latents are predicted; None to draw to the end.

        Returns:
            Values (B,), with a gradient, and what else there is to tell, (B, ...).
        """
        sides, tracking = (told, away), grad_steps > 0 and torch.is_grad_enabled()
        leaves = [side.detach().requires_grad_(tracking) for side in sides]

        def call(some: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
            with torch.set_grad_enabled(tracking):
                parts = [leaf[some] for leaf in leaves]
                latents = self.backbone.sample(
                    parts[0], parts[1], noise[some], self.sampling_steps, self.guidance_scale, grad_steps, calls
                )
                value, more = judge(latents, some)
            # There is none for what is led away from without guidance.
            slopes = torch.autograd.grad(value.sum(), parts, allow_unused=True) if tracking else (None, None)
            return value.detach(), {name: told.detach() for name, told in more.items()}, list(slopes)

        found, more, slopes = self.microbatch.over(len(noise), call, noise.device)
        for side, slope in zip(sides, slopes, strict=True):
            if slope is not None:  # adds nothing but the gradient that was computed
                found = found + ((side - side.detach()) * slope).flatten(1).sum(1)
        return found, more

    # --- checkpoints: the prompt and nothing of the backbone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The prompts alone."""
        return {name: value.detach() for name, value in self.named_parameters() if value is self.parameter}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the records that the rows belong to."""
        checkpoint["wave"] = {
            "records": [asdict(problem) for problem in self.problems],
            "active": self.active.tolist(),
            "done": self.done,
            "stale": self.stale,
            "lowered": self.lowered,
            "left_out": self.left_out.tolist(),
            "parts": self.data.part[1],
            "microbatch": self.microbatch.size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's problems; refuses those whose pictures are not given now.

        When others than this many ranks have begun, what is open of all their problems is divided anew.
        """
        several = [checkpoint]
        if checkpoint["wave"]["parts"] != self.data.part[1]:
            several = checkpoints_of_all(self.data.folder.checkpoints)
        records = {record["key"]: Problem(**record) for one in several for record in one["wave"]["records"]}
        self.data.find(list(records.values()))
        if gone := [problem for problem in records.values() if problem.index < 0]:
            raise UserError(
                f"The checkpoint goes on with {len(gone)} {self.data.given[0]} that are not among {self.data.given[1]} now; give the "
                "same ones and the same settings, or another --run."
            )
        if len(several) > 1 or several[0] is not checkpoint:
            checkpoint |= merged(several, lambda record: self.data.still_open(records[record["key"]]))
        self._resumed = wave = checkpoint["wave"]
        wave["records"] = [asdict(Problem(**record)) for record in wave["records"]]
        for record in wave["records"]:
            here = records[record["key"]]
            record |= {name: getattr(here, name) for name in ("target", "paths", "stamps", "caption", "index")}
        ((name, saved),) = checkpoint["state_dict"].items()
        own = self.parameter.shape[1:]
        if [name] != list(self.state_dict()) or (0 not in own and saved.shape[1:] != own):
            raise UserError(
                f"The checkpoint has prompts {name!r} of the shape {tuple(saved.shape[1:])} and this search has "
                f"{next(iter(self.state_dict()))!r} of {tuple(own)}; give the settings that the run was begun with."
            )
        has_optimizer = any(checkpoint["optimizer_states"])  # Lightning saves the state {} where there is none
        if has_optimizer != (self.configure_optimizers() is not None):
            raise UserError(
                "The checkpoint has the state of another optimizer; give the settings that the run was begun with."
            )
        self.parameter.data = torch.empty_like(saved)
        if self.microbatch.fitted:  # as before, so that calls round alike
            self.microbatch.size = wave["microbatch"]


def by_step(batch: Step, rows: Tensor) -> list[tuple[int, Tensor]]:
    """The problems `rows` (Q,) by the number of steps that they have taken."""
    steps = torch.tensor(batch.steps)[rows]
    return [(int(step), rows[steps == step]) for step in steps.unique()]
