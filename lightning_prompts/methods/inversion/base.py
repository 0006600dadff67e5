"""The base class of methods that find a prompt for images: the losses, and how the best prompt is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones.vocabulary import contains_banned
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.engine.batch import Row
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.method import PromptMethod
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.figures import regenerate, regenerate_and_save, target_grid, write_figures
from lightning_prompts.methods.inversion.init import init_embeddings, random_tokens, records_of_run
from lightning_prompts.methods.inversion.losses import InversionLoss, LossWeights
from lightning_prompts.methods.inversion.rerank import Rerank, Reranker
from lightning_prompts.methods.inversion.samples import Samples, draw_samples
from lightning_prompts.methods.inversion.search_clip import SearchClip, missing_gradient
from lightning_prompts.methods.inversion.token_embeddings import DecodedPrompt, TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import default_clip
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import InversionResult, Problem
from lightning_prompts.sampling.seeding import INIT, VALIDATION, validation_timesteps
from lightning_prompts.setting_types import Positive
from lightning_prompts.unused import refuse_unused


class Inverter(PromptMethod):
    """Find, for each target image, the prompt that makes the model generate it.

    Args:
        num_tokens: Length M of the prompt, in tokens.
        steps: Steps of the search.
        template: Fixed words around the prompt, with `{}` in its place.
        banned_words: Words, or parts of words, that the prompt must not have.
        allowed_words: The only words that the prompt may have.
        init: The initial prompt: `random` tokens, the best `clip_words`, the folder of a run of any method that has
            prompts for these images, an embedding file in any common layout, or a text.
        allow_pickle: Read this file even if it is a pickle; only tensors are loaded.
        loss_weights: Weights of the terms of the loss.
        clip: Folder or hub id of the search's CLIP; None for the one that goes with the backbone. Methods that move
            embeddings need a CLIP with the searched vocabulary for the CLIP loss; GCG can compare its candidates by any
            CLIP, which encodes their text.
        rerank: Weight and number of generated images in the choice of the best prompt.
        **kwargs: See `PromptMethod`.
    """

    prompt: TokenEmbeddings
    data_class = ImagesToPrompts
    result_class = InversionResult
    moves_embeddings: ClassVar[bool] = True  # whether it needs the gradient of the whole loss, including the CLIP's
    has_loss: ClassVar[bool] = True  # whether its steps minimize the loss
    latents: list[Tensor]  # of the images of each problem, (I, C, h, w)

    def __init__(
        self,
        *,
        num_tokens: Positive = 8,
        steps: Positive = 20,
        template: str = "{}",
        banned_words: Sequence[str] = (),
        allowed_words: Sequence[str] | None = None,
        init: str = "random",
        allow_pickle: bool = False,
        loss_weights: LossWeights = LossWeights(),
        clip: str | None = None,
        rerank: Rerank = Rerank(),
        **kwargs: Any,
    ) -> None:
        loss_weights.check(type(self).__name__, self.has_loss)
        if not rerank.weight:
            unused = {"images": rerank.images, "num_inference_steps": rerank.num_inference_steps}
            refuse_unused(Rerank, "with --model.rerank.weight 0", unused, "--model.rerank")
        if contains_banned(template.replace("{}", " "), tuple(banned_words)):
            raise UserError(f"--model.template has a banned word, got {template!r}; change it or --model.banned_words.")
        super().__init__(**kwargs)
        self.steps, self.loss_weights = int(steps), loss_weights
        clip, refusal = clip or default_clip(self.backbone), None
        if loss_weights.clip and (self.moves_embeddings or not loss_weights.denoising):
            refusal = missing_gradient(type(self).__name__, clip, self.backbone, self.moves_embeddings)
        self.template, self.banned_words, self.init = template, tuple(banned_words), init
        allowed = None if allowed_words is None else tuple(allowed_words)
        self.prompt = TokenEmbeddings(self.vocabulary, template, int(num_tokens), self.banned_words, allowed)
        self.given = init_embeddings(init, self.backbone, int(num_tokens), allow_pickle)
        self.search_clip = SearchClip(clip, self.prompt, self.offline, loss_weights.clip, refusal)
        self.inversion_loss = InversionLoss(loss_weights, self.backbone, self.prompt, self.search_clip, self.microbatch)
        self.reranker = Reranker(self.sampler, rerank) if rerank.weight else None
        self.latents = []

    @property
    def data(self) -> ImagesToPrompts:
        """Return the data module of the Trainer."""
        return cast("ImagesToPrompts", super().data)

    @property
    def sampling_settings(self) -> dict[str, Any]:
        """How images are generated, including those of scoring; see `PromptMethod.sampling_settings`."""
        reranking = {"rerank_steps": self.reranker.sampler.num_inference_steps} if self.reranker else {}
        return {**super().sampling_settings, **reranking}

    # --- initial prompts

    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problems of the batch and encode their images."""
        super().set_rows(problems)
        self.latents = [latents.to(self.device) for latents in self.data.latents(self.backbone, problems)]

    def evict(self, problem: Problem) -> None:
        """Forget what is cached for a problem that left the batch."""
        super().evict(problem)
        self.search_clip.evict(problem)

    def random_tokens(self, rows: Tensor, step: int | Sequence[int]) -> Tensor:
        """Draw allowed tokens (Q, M) for the problems `rows` (Q,), a function of the seed, the problem and the step."""
        return random_tokens(self.prompt, [problem.key for problem in self.records(rows)], self.data.seed, step)

    def records(self, rows: Tensor) -> list[Problem]:
        """Return the records of the problems `rows` (Q,)."""
        return [self.batch[row].record for row in rows.tolist()]

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the initial embeddings (Q, M, D); random tokens complete a shorter prompt of another run."""
        if self.given is not None:
            return self.given.to(self.device).repeat(len(rows), 1, 1)
        if self.init == "clip_words" and len(rows):
            return self.prompt.table[self.clip_words(rows)].float()
        embeddings = self.prompt.table[self.random_tokens(rows, INIT)].float()
        if self.init not in ("random", "clip_words"):
            for place, record in enumerate(records_of_run(self.init, self.records(rows))):
                earlier = self.embeddings_of(record)[: embeddings.shape[1]]
                embeddings[place, : len(earlier)] = earlier
        return embeddings

    def best_params(self, row: int) -> Tensor:
        """Return the embeddings (M, D) of the best prompt so far."""
        problem = self.batch[row].record
        return self.embeddings_of(problem) if problem.prompt else self.init_params(torch.tensor([row]))[0]

    def clip_words(self, rows: Tensor, beams: int = 1) -> Tensor:
        """Return the tokens (Q, M) that are most similar to the images of the problems `rows` (Q,) in CLIP."""
        return self.search_clip.words(self.features(rows), beams)

    def embeddings_of(self, record: Problem) -> Tensor:
        """Return the embeddings (M, D) of a problem's best prompt."""
        if record.embedding is not None:
            return torch.tensor(record.embedding, device=self.device)
        return self.prompt.table[torch.tensor(record.token_ids, device=self.device)].float()

    # --- losses

    def samples(self, rows: Tensor, batch: Step) -> Samples:
        """Return the samples of a step of the problems `rows` (Q,); several images of a problem take turns."""
        return draw_samples(self, rows, batch)

    def loss(
        self,
        rows: Tensor,
        ids: Tensor,
        embeddings: Tensor,
        samples: Samples,
        texts: Sequence[str] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Compute the weighted sum (Q,) of the losses of the problems `rows` (Q,); see `InversionLoss.terms`."""
        features = self.features(rows) if self.loss_weights.clip else None
        if self.loss_weights.denoising:
            self._add_denoising_cost(rows, samples)
        terms = self.inversion_loss.terms(ids, embeddings, samples, features, texts, chunk)
        if torch.is_grad_enabled():
            self.terms = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return torch.stack(list(terms.values())).sum(0)

    def denoising_loss(self, rows: Tensor, prompt_embeds: Tensor, samples: Samples) -> Tensor:
        """Compute the denoising losses (Q,) of encoded prompts (Q, R, D), see `InversionLoss.denoising`."""
        self._add_denoising_cost(rows, samples)
        return self.inversion_loss.denoising(prompt_embeds, samples)

    def _add_denoising_cost(self, rows: Tensor, samples: Samples) -> None:
        passes = samples.timesteps.shape[1] * (2 if torch.is_grad_enabled() else 1)
        self.batch.add_cost(rows, passes if samples.negative is None else 2 * passes)

    @property
    def uses_clip(self) -> bool:
        """Return whether the search uses a CLIP: in the loss, to choose the best prompt, or for the initial one."""
        return bool(self.loss_weights.clip or self.reranker) or self.init == "clip_words"

    def setup(self, stage: str) -> None:
        """See `PromptMethod.setup`; load the CLIP of the search before it starts, so that errors come early."""
        super().setup(stage)
        if stage == "fit":
            self.clips()

    def clips(self) -> list[ClipSimilarity]:
        """Return the CLIPs of the search; see `PromptMethod.clips`."""
        return [self.clip] if self.uses_clip else []

    @property
    def clip(self) -> ClipSimilarity:
        """The CLIP of the search, loaded on first use."""
        return self.search_clip.model

    def features(self, rows: Tensor) -> Tensor:
        """Return the mean image features (Q, E) of the problems `rows` (Q,) in the search's CLIP."""
        return torch.stack([self.search_clip.image_features(problem, self.data) for problem in self.records(rows)])

    @torch.no_grad()
    def evaluate(self, rows: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Compute the validation losses (Q,) of encoded texts (Q, R, D) on noise that is not used for gradients."""
        size = len(self.batch)
        timesteps = validation_timesteps(self.data.num_validation_samples, *self.data.timestep_range)
        samples = self.samples(rows, Step([VALIDATION] * size, timesteps.expand(size, -1)))
        loss = self.denoising_loss(rows, prompt_embeds, samples)
        return loss + self.reranker.loss(self, rows, prompt_embeds) if self.reranker else loss

    # --- results

    @torch.no_grad()
    def score(self, rows: Tensor) -> list[Problem]:
        """Score the decoded prompts of the problems `rows` (Q,) and keep the best.

        Returns:
            The problems whose prompt improved.
        """
        candidates, prompt_embeds = self.decode(rows)
        better, losses = list[Problem](), self.microbatch.broadcast(self.evaluate(rows, prompt_embeds)).tolist()
        for row, candidate, loss in zip(rows.tolist(), candidates, losses, strict=True):
            problem = self.batch[row].record
            if problem.initial_validation_loss is None:
                problem.initial_validation_loss = loss
            if self.batch.offer(row, candidate.prompt, loss, candidate.token_ids, candidate.embedding, candidate.valid):
                better.append(problem)
        return better

    def decode(self, rows: Tensor) -> tuple[list[DecodedPrompt], Tensor]:
        """Decode the problems `rows` (Q,) to the text of the nearest tokens, and encode this text to (Q, R, D)."""
        decoded = self.prompt.decode(self.prompt.project()[rows.to(self.device)].cpu())
        return decoded, self.encode([candidate.prompt for candidate in decoded])

    def preview(self, problems: list[Problem]) -> Image.Image:
        """Return a grid of the targets above an image of each prompt."""
        return target_grid(self, problems, regenerate(self, problems, 1))

    def final_evaluation(self, problems: list[Problem], scores: Scores) -> None:
        """Generate four images from each prompt and score them."""
        scores.evaluate(self, problems, regenerate_and_save(self, problems))

    def write_figures(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the grid and the word maps."""
        write_figures(self, problems, folder)

    def write_files(self, problems: list[Problem], folder: RunFolder) -> None:
        """Write the embeddings of the prompts."""
        tensors = {problem.key: self.embeddings_of(problem).float().cpu().contiguous() for problem in problems}
        prompts = {problem.key: str(problem.prompt) for problem in problems}
        atomic_write(folder.embedding, save(tensors, {"format": "pt", "backbone": self.backbone.name, **prompts}))

    def validation_losses(self, problems: list[Problem]) -> Tensor:
        """Recompute the validation losses of the best prompts."""
        self.batch.rows = [Row(problem) for problem in problems]
        self.set_rows(problems)
        with torch.autocast(self.device.type, enabled=False):  # as `fit` did
            prompt_embeds = self.encode([str(problem.prompt) for problem in problems])
            return self.evaluate(torch.arange(len(problems)), prompt_embeds)
