"""The losses that an inversion minimizes, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.samples import Samples
from lightning_prompts.methods.inversion.search_clip import SearchClip
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import Denoising
from lightning_prompts.sampling import Microbatch
from lightning_prompts.setting_types import Weight
from lightning_prompts.unused import refuse_unused


@dataclass(frozen=True)
class LossWeights:
    """Set the weights of the terms of the loss.

    Args:
        denoising: Weight of the denoising loss.
        negative: Weight of the denoising loss of `--data.negative_images`, relative to that of the target.
        clip: Weight of one minus the cosine of prompt and images in CLIP.
    """

    denoising: Weight = 1.0
    negative: Weight = 0.2
    clip: Weight = 0.0

    def check(self, method: str, has_loss: bool) -> None:
        """Refuse weights that leave nothing to minimize, or that a method without a loss does not use.

        Args:
            method: Class of the method.
            has_loss: Whether its steps minimize the loss.

        Raises:
            UserError: The weights cannot be used.
        """
        if not has_loss:
            unused = {"denoising": self.denoising, "clip": self.clip}
            refuse_unused(LossWeights, f"in {method}, which minimizes no loss", unused, "--model.loss_weights")
        if not self.denoising and not self.clip:
            raise UserError(
                "Both loss weights are 0; set --model.loss_weights.denoising or --model.loss_weights.clip above 0."
            )


class InversionLoss:
    """The weighted sum of the denoising and the CLIP loss of prompts.

    Args:
        weights: The weights; a term with weight 0 is not computed.
        backbone: The frozen model.
        prompt: The prompts, which give the text of tokens.
        clip: The CLIP of the search.
        microbatch: Samples per denoiser call.
    """

    def __init__(
        self,
        weights: LossWeights,
        backbone: Backbone,
        prompt: TokenEmbeddings,
        clip: SearchClip,
        microbatch: Microbatch,
    ) -> None:
        self.weights, self.backbone, self.prompt, self.clip = weights, backbone, prompt, clip
        self._denoising = Denoising(microbatch)

    def terms(
        self,
        ids: Tensor,
        embeddings: Tensor,
        samples: Samples,
        features: Tensor | None,
        texts: Sequence[str] | None = None,
        chunk: int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms (Q,) of the loss of Q prompts, by name.

        Args:
            ids: Token ids of the prompts, (Q, L).
            embeddings: Embeddings in place of the tokens', (Q, L, D).
            samples: The step's samples.
            features: Mean features of each problem's images in the CLIP, (Q, E); None without the CLIP loss.
            texts: Q texts for the text encoders that are not searched; None for the text of the tokens.
            chunk: Prompts per call of the text encoders; None for all.
        """
        terms, count = dict[str, Tensor](), max(len(ids), 1)
        chunk = chunk or count
        parts = [slice(begin, begin + chunk) for begin in range(0, count, chunk)]
        if self.weights.denoising:
            if texts is None and self.backbone.other_text_encoders:
                texts = self.prompt.texts(ids[:, self.prompt.positions])
            encoded = [self.backbone.encode(ids[part], embeddings[part], texts=texts and texts[part]) for part in parts]
            terms["denoising"] = self.weights.denoising * self.denoising(torch.cat(encoded), samples)
        if features is not None:
            distances = [self.clip.loss(ids[part], embeddings[part], features[part]) for part in parts]
            terms["clip"] = self.weights.clip * torch.cat(distances)
        return terms

    def denoising(self, prompt_embeds: Tensor, samples: Samples) -> Tensor:
        """Compute denoising losses (Q,) of encoded prompts (Q, R, D), minus the weighted ones on negative images."""
        fixed = samples.timesteps, samples.noise
        loss: Tensor = self._denoising(self.backbone, prompt_embeds, samples.latents, *fixed)
        if samples.negative is None:
            return loss
        other: Tensor = self._denoising(self.backbone, prompt_embeds, samples.negative, *fixed)
        return loss - self.weights.negative * other
