"""The base class of methods that find a prompt for images: the losses, and the one definition of best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.backbones.vocabulary import contains_blocked, fill_template, round_trip
from lightning_prompts.callbacks.board import log_images
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.data.inversion import ImagesToPrompts
from lightning_prompts.engine.batch import Row
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.method import MOST_STEPS, PromptMethod
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.init import (
    best_words,
    earlier,
    given,
    prompt_features,
    random_tokens,
    reads_tokens,
    word_features,
)
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity, Denoising
from lightning_prompts.objectives.clip import clip_of
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import InversionResult, Problem
from lightning_prompts.sampling import Sampler
from lightning_prompts.sampling.attention_maps import word_picture
from lightning_prompts.sampling.figures import grid, regenerate, to_image, to_png
from lightning_prompts.sampling.seeding import START, TRIAL, VALIDATION, draw_noise, picture_turns, validation_timesteps
from lightning_prompts.setting_types import Positive
from lightning_prompts.unused import refuse_unused

log = logging.getLogger(__name__)

REGENERATIONS = 4
SHOWN = 24  # problems in the grid and the word maps


class Found(NamedTuple):
    """A decoded prompt: its text and tokens or, for methods that find no text, its embeddings (M, D)."""

    prompt: str
    token_ids: list[int] | None
    embedding: list[list[float]] | None
    sound: bool = True  # whether its text encodes to the same tokens and has no blocked word


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a step of Q problems: latents (Q, N, C, h, w), timesteps (Q, N) and noise (Q, N, C, h, w).

    Latents (Q, N, C, h, w) of negative images, if there are any, get the same timesteps and noise.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    negative: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Samples:
        """Select problems, as rows of a tensor."""
        negative = None if self.negative is None else self.negative[rows]
        return Samples(self.latents[rows], self.timesteps[rows], self.noise[rows], negative)


class Inverter(PromptMethod):
    """Find, for each target image, the prompt that makes the model generate it.

    Args:
        tokens: Length M of the prompt, in tokens.
        template: Fixed words around the prompt, with `{}` in its place.
        blocked: Words, or parts of words, that the prompt must not have.
        words: The only words that the prompt may have.
        start: The initial prompt: `random` tokens, the best `clip_words`, the folder of a run of any method that has prompts for these
            images, an embedding file in any common layout, or a text.
        allow_pickle: Read this file even if it is a pickle; only tensors are loaded.
        denoising_weight: Weight of the denoising loss.
        negative_weight: Weight of the denoising loss of `--data.negative_images`, relative to that of the target.
        clip_weight: Weight of one minus the cosine of prompt and images in CLIP. Methods that move embeddings need a CLIP with the
            searched vocabulary; GCG's candidates can be compared by any CLIP, which reads their text.
        clip: Folder or hub id of this CLIP; None for the one that goes with the backbone.
        trial_weight: Weight, in the validation loss, of one minus the cosine in CLIP of the target and images that the prompt
            generates; 0 for none.
        trial_pictures: Images to generate at each scoring.
        trial_steps: Denoising steps of these images; None for the model's default, at most 10.
        **kwargs: See `PromptMethod`.
    """

    prompt: TokenEmbeddings
    data_class = ImagesToPrompts
    result_class = InversionResult
    moves_embeddings: ClassVar[bool] = True  # whether it needs the gradient of the whole loss, the CLIP's term included
    latents: list[Tensor]  # of the images of each problem, (I, C, h, w)

    def __init__(
        self,
        *,
        tokens: Positive = 8,
        template: str = "{}",
        blocked: Sequence[str] = (),
        words: Sequence[str] | None = None,
        start: str = "random",
        allow_pickle: bool = False,
        denoising_weight: float = 1.0,
        negative_weight: float = 0.2,
        clip_weight: float = 0.0,
        clip: str | None = None,
        trial_weight: float = 0.0,
        trial_pictures: Positive = 2,
        trial_steps: Positive | None = None,
        **kwargs: Any,
    ) -> None:
        if not denoising_weight and not clip_weight:
            raise UserError("Both loss weights are 0; set --model.denoising_weight or --model.clip_weight above 0.")
        if contains_blocked(template.replace("{}", " "), tuple(blocked)):
            raise UserError(f"--model.template has a blocked word, got {template!r}; change it or --model.blocked.")
        super().__init__(**kwargs)
        if clip_weight and self.vocabulary.towers[0].kind != "clip":
            self._check_clip_weight(clip or clip_of(self.backbone), denoising_weight)
        self.template, self.blocked, self.start = template, tuple(blocked), start
        words = None if words is None else tuple(words)
        self.prompt = TokenEmbeddings(self.vocabulary, template, int(tokens), self.blocked, words)
        self.given = given(start, self.backbone, int(tokens), allow_pickle)
        self.denoising = Denoising(self.microbatch)
        self.denoising_weight, self.negative_weight, self.clip_weight = denoising_weight, negative_weight, clip_weight
        self._clip_name, self._clip = clip or clip_of(self.backbone), cast("ClipSimilarity | None", None)
        self._features: dict[str, Tensor] = {}
        self._words: Tensor | None = None  # features of the allowed tokens alone in this CLIP
        if not trial_weight:
            trials = {"trial_pictures": trial_pictures, "trial_steps": trial_steps}
            refuse_unused(Inverter, "with --model.trial_weight 0", trials)
        self.trial_weight, self.trial_pictures = trial_weight, trial_pictures
        self.trial_steps = int(trial_steps or min(self.backbone.default_steps, MOST_STEPS))
        if trial_weight:
            self.trial_sampler = Sampler(self.backbone, self.trial_steps, self.sampler.guidance_scale, self.microbatch)
        self.latents = []

    @property
    def data(self) -> ImagesToPrompts:
        """The data module."""
        return cast("ImagesToPrompts", super().data)

    @property
    def drawing(self) -> dict[str, Any]:
        """How images are drawn, including those of scoring; see `PromptMethod.drawing`."""
        return {**super().drawing, **({"trial_steps": self.trial_steps} if self.trial_weight else {})}

    # --- initial prompts

    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch and encode their images."""
        super().set_rows(problems)
        self.latents = [latents.to(self.device) for latents in self.data.latents(self.backbone, problems)]

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        super().evict(problem)
        self._features.pop(problem.key, None)

    def random_tokens(self, rows: Tensor, step: int | Sequence[int]) -> Tensor:
        """Draw allowed tokens (Q, M) for the problems `rows` (Q,), a function of the seed, the problem and the step."""
        keys = [self.batch[row].record.key for row in rows.tolist()]
        return random_tokens(self.prompt, keys, self.data.seed, step)

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the initial embeddings (Q, M, D); random tokens complete a shorter prompt of another run."""
        problems = [self.batch[row].record for row in rows.tolist()]
        if self.given is not None:
            return self.given.to(self.device).repeat(len(rows), 1, 1)
        if self.start == "clip_words" and problems:
            return self.prompt.table[self.clip_words(rows)].float()
        embeddings = self.prompt.table[self.random_tokens(rows, START)].float()
        if self.start not in ("random", "clip_words"):
            for place, record in enumerate(earlier(self.start, problems)):
                found = self.embedded(record)[: embeddings.shape[1]]
                embeddings[place, : len(found)] = found
        return embeddings

    def best_params(self, row: int) -> Tensor:
        """Return the embeddings (M, D) of the best prompt so far."""
        problem = self.batch[row].record
        return self.embedded(problem) if problem.prompt else self.init_params(torch.tensor([row]))[0]

    def clip_words(self, rows: Tensor, beams: int = 1) -> Tensor:
        """Return the tokens (Q, M) that are most similar to the images of the problems `rows` (Q,) in CLIP."""
        clip, features = self.clip, self.features(rows)
        if self._words is None:
            self._words = word_features(clip, self.prompt, self.clip_reads_text)
        return best_words(clip, self.prompt, features, beams, words=self._words)

    def embedded(self, record: Problem) -> Tensor:
        """Return the embeddings (M, D) of a problem's best prompt."""
        if record.embedding is not None:
            return torch.tensor(record.embedding, device=self.device)
        return self.prompt.table[torch.tensor(record.token_ids, device=self.device)].float()

    # --- losses

    def samples(self, rows: Tensor, batch: Step) -> Samples:
        """Return the samples of a step of the problems `rows` (Q,); several images of a problem take turns."""
        timesteps = self.to_device(batch.timesteps[rows])
        keys, count = [self.batch[row].record.key for row in rows.tolist()], timesteps.shape[1]
        steps = [batch.steps[row] for row in rows.tolist()]
        noise = draw_noise(self.data.seed, keys, steps, count, self.backbone.latent_shape, self.device)

        def turns(pictures: Sequence[Tensor]) -> Tensor:
            """Return the images (Q, N, C, h, w) of each problem's step, out of its (I, C, h, w)."""
            seen = [
                some[self.to_device(picture_turns(max(step, 0), count, len(some)))]
                for some, step in zip(pictures, steps, strict=True)
            ]
            return torch.stack(seen)

        latents = turns([self.latents[row] for row in rows.tolist()])
        others = self.data.negative_latents(self.backbone)
        negative = None if others is None else turns([others.to(self.device)] * len(steps))
        return Samples(latents, timesteps, noise, negative)

    def loss(
        self,
        rows: Tensor,
        ids: Tensor,
        embeddings: Tensor,
        samples: Samples,
        texts: Sequence[str] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Compute the weighted sum (Q,) of the objectives on the samples of a step.

        Args:
            rows: Rows of the problems, (Q,).
            ids: Token ids of their prompts, (Q, L).
            embeddings: Embeddings in place of the tokens', (Q, L, D).
            samples: The step's samples.
            texts: Q texts for the text encoders that are not searched; None for the text of the tokens.
            chunk: Prompts per call of the text encoders; None for all.
        """
        chunk = chunk or max(len(ids), 1)
        terms, parts = {}, [slice(begun, begun + chunk) for begun in range(0, max(len(ids), 1), chunk)]
        if self.denoising_weight:
            if texts is None and self.backbone.others:
                texts = self.prompt.texts(ids[:, self.prompt.positions])
            encoded = [self.backbone.encode(ids[part], embeddings[part], texts=texts and texts[part]) for part in parts]
            terms["denoising"] = self.denoising_weight * self.denoising_loss(rows, torch.cat(encoded), samples)
        if self.clip_weight:
            distances = [self.clip_loss(rows[part], ids[part], embeddings[part]) for part in parts]
            terms["clip"] = self.clip_weight * torch.cat(distances)
        if torch.is_grad_enabled():
            self.terms = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return torch.stack(list(terms.values())).sum(0)

    def clip_loss(self, rows: Tensor, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Compute one minus the cosine (Q,) of prompts (Q, L) and images in CLIP; without a gradient if the CLIP reads text."""
        clip, features = self.clip, self.features(rows)
        if self.clip_differentiable:
            return cast("Tensor", clip(ids, self.vocabulary.of_width(embeddings, clip.width), features))
        token_ids = ids[:, self.prompt.positions]
        return 1 - (prompt_features(clip, self.prompt, token_ids, self.clip_reads_text) * features).sum(1)

    def denoising_loss(self, rows: Tensor, told: Tensor, samples: Samples) -> Tensor:
        """Compute the denoising losses (Q,) of encoded prompts (Q, R, D), minus the weighted ones of the negative images."""
        passes = samples.timesteps.shape[1] * (2 if torch.is_grad_enabled() else 1)
        self.add_cost(rows, passes)
        loss: Tensor = self.denoising(self.backbone, told, samples.latents, samples.timesteps, samples.noise)
        if samples.negative is None:
            return loss
        self.add_cost(rows, passes)
        other: Tensor = self.denoising(self.backbone, told, samples.negative, samples.timesteps, samples.noise)
        return loss - self.negative_weight * other

    @property
    def uses_clip(self) -> bool:
        """Whether the search uses a CLIP: in the loss, in the choice of the best prompt, or for the initial one."""
        return bool(self.clip_weight or self.trial_weight) or self.start == "clip_words"

    def setup(self, stage: str) -> None:
        """See `PromptMethod.setup`; load the CLIP of the search before it starts, so that errors come early."""
        super().setup(stage)
        if stage == "fit":
            self.clips()

    def clips(self) -> list[ClipSimilarity]:
        """See `PromptMethod.clips`."""
        return [self.clip] if self.uses_clip else []

    @property
    def clip(self) -> ClipSimilarity:
        """The CLIP of the search, loaded on first use."""
        if self._clip is None:
            clip = ClipSimilarity(self._clip_name, self.offline)
            self.clip_reads_text = not reads_tokens(clip, self.prompt)
            self.clip_differentiable = not self.clip_reads_text and clip.width in self.vocabulary.widths
            if self.clip_weight and not self.clip_differentiable:
                self._check_clip_weight(self._clip_name, self.denoising_weight)
                log.info(
                    "The CLIP %r has no embeddings for the searched tokens: its loss compares candidates, and only the denoising loss "
                    "has a gradient that proposes them.",
                    self._clip_name,
                )
            self._clip = clip.to(self.device)
        return self._clip

    def _check_clip_weight(self, name: str, denoising_weight: float) -> None:
        """Refuse a weight of the CLIP's loss whose gradient is needed where it has none."""
        if not self.moves_embeddings and denoising_weight:
            return
        kind, instead = self.vocabulary.towers[0].kind, ""
        if kind != "clip" and any(tower.kind == "clip" for tower in self.backbone.towers):
            instead = ", or search the CLIP encoder's tokens with --model.backbone.vocabulary clip"
        if self.moves_embeddings:
            instead = f"give --model.clip_weight 0{instead}"
        else:
            instead = f"give --model.denoising_weight above 0{instead}"
        if kind == "clip":
            instead += ", or name the CLIP that this text encoder was taken from as --model.clip"
        raise UserError(
            f"{type(self).__name__} needs the gradient of the CLIP loss, and the CLIP {name!r} does not have the token embeddings of "
            f"the model's {'T5' if kind == 't5' else 'CLIP'} text encoder; {instead}."
        )

    def features(self, rows: Tensor) -> Tensor:
        """Return the mean image features (Q, E) of the problems `rows` (Q,) in the search's CLIP."""
        return torch.stack([self.features_of(self.batch[row].record) for row in rows.tolist()])

    def features_of(self, problem: Problem) -> Tensor:
        """Return the mean image features (E,) of a problem in the search's CLIP, computed once."""
        if problem.key not in self._features:
            (pictures,) = self.data.pictures([problem])
            self._features[problem.key] = self.clip.features(pictures).mean(0)
        return self._features[problem.key]

    @torch.no_grad()
    def evaluate(self, rows: Tensor, told: Tensor) -> Tensor:
        """Compute the validation losses (Q,) of encoded texts (Q, R, D), on noise that no gradient sees: what is lowest is best."""
        timesteps = validation_timesteps(self.data.validation_samples, *self.data.timesteps)
        everyone = len(self.batch.records)
        samples = self.samples(rows, Step([VALIDATION] * everyone, timesteps.expand(everyone, -1)))
        loss = self.denoising_loss(rows, told, samples)
        return loss + self.trial_weight * self.trial_loss(rows, told) if self.trial_weight else loss

    def trial_loss(self, rows: Tensor, told: Tensor) -> Tensor:
        """Compute one minus the cosine (Q,) in CLIP, in [0, 2], of the targets and a few images that Q prompts generate."""
        count, keys = self.trial_pictures, [self.batch[row].record.key for row in rows.tolist()]
        noise = draw_noise(self.data.seed, keys, TRIAL, count, self.backbone.latent_shape, self.device).flatten(0, 1)
        told, away = repeat(told, count), self.encode([""], negative=True)

        def call(some: Tensor) -> Tensor:
            return self.clip.features(self.trial_sampler.sample(told[some], away, noise[some]))

        features = self.microbatch.map(len(noise), call, self.device)
        self.add_cost(rows, count * self.trial_sampler.cost())
        return 1 - (features.view(len(rows), count, -1).mean(1) * self.features(rows)).sum(1)

    # --- results

    @torch.no_grad()
    def score(self, rows: Tensor) -> list[Problem]:
        """Score the decoded prompts of the problems `rows` (Q,) and keep the best.

        Returns:
            The problems whose prompt improved.
        """
        found, told = self.decode(rows)
        losses, better = self.broadcast(self.evaluate(rows, told)).tolist(), []
        for row, candidate, loss in zip(rows.tolist(), found, losses, strict=True):
            problem = self.batch[row].record
            if problem.initial_validation_loss is None:
                problem.initial_validation_loss = loss
            if self.batch.offer(row, candidate.prompt, loss, candidate.token_ids, candidate.embedding, candidate.sound):
                better.append(problem)
        return better

    def decode(self, rows: Tensor) -> tuple[list[Found], Tensor]:
        """Decode the problems `rows` (Q,) to the text of the nearest tokens, and encode this text again, to (Q, R, D)."""
        found = self.written(self.prompt.project()[rows.to(self.device)].cpu())
        return found, self.encode([candidate.prompt for candidate in found])

    def written(self, token_ids: Tensor) -> list[Found]:
        """Decode tokens (Q, M) to prompts in the template."""
        texts, survives = round_trip(self.vocabulary.tokenizer, token_ids)
        texts = [fill_template(self.template, text) for text in texts]
        sound = [
            ok and not contains_blocked(text, self.blocked) for ok, text in zip(survives.tolist(), texts, strict=True)
        ]
        return [Found(text, ids, None, ok) for text, ids, ok in zip(texts, token_ids.tolist(), sound, strict=True)]

    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return a grid of the targets above an image of each prompt."""
        return grid([several[0] for several in self.data.pictures(problems)], regenerate(self, problems, 1), problems)

    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Generate four images from each prompt and score them."""
        drawn = regenerate(self, problems, REGENERATIONS)
        scores.measure(self, problems, drawn)
        for problem, pictures in zip(problems, drawn, strict=True):
            if problem.index < SHOWN:  # for the grid
                self.data.folder.save_drawn(problem.key, to_png(to_image(torch.cat([*pictures], dim=2))))

    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the grid and the word maps."""
        targets = [several[0] for several in self.data.pictures(problems)]
        drawn = torch.stack([self._pictures_of(problem) for problem in problems])
        atomic_write(folder.grid, to_png(grid(targets, drawn, problems)))
        words = word_picture(self, problems, targets) if self.backbone.cross_attends else None
        if words:
            atomic_write(folder.words, to_png(words))
        log_images(self.trainer.loggers, "regenerations", [to_image(one) for one in drawn.flatten(0, 1)])
        if words:
            log_images(self.trainer.loggers, "words", [words])

    def _pictures_of(self, problem: Problem) -> Tensor:
        """Return the images (4, 3, H, W) in [-1, 1] of a problem's prompt, from their file if there is one."""
        try:
            drawn = pil_to_tensor(Image.open(self.data.folder.drawn_of(problem.key)))
        except OSError:  # not scored yet, or the file could not be written
            return regenerate(self, [problem], REGENERATIONS)[0]
        return torch.stack(drawn.chunk(REGENERATIONS, dim=2)) / 127.5 - 1

    def write_files(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the embeddings of the prompts."""
        tensors = {problem.key: self.embedded(problem).float().cpu().contiguous() for problem in problems}
        prompts = {problem.key: str(problem.prompt) for problem in problems}
        atomic_write(folder.embedding, save(tensors, {"format": "pt", "backbone": self.backbone.name, **prompts}))

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the validation losses of the best prompts."""
        self.batch.rows = [Row(problem) for problem in problems]
        self.set_rows(problems)
        with torch.autocast(self.device.type, enabled=False):  # as `fit` did
            return self.evaluate(
                torch.arange(len(problems)), self.encode([str(problem.prompt) for problem in problems])
            )
