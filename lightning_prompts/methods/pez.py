"""PEZ: hard prompts made easy (arXiv 2302.03668)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prompts.data.inversion import Step
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import clip_of
from lightning_prompts.problems import Problem
from lightning_prompts.vocabulary import Metric


class PEZ(PromptMethod):
    """Gradients at the nearest tokens' embeddings, applied to the continuous ones (algorithm 1 of the paper).

    Args:
        objective: `denoising` (the paper's Stable Diffusion variant) or `clip` (its main one: cosine of prompt and pictures).
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        clip: Folder or hub id of the CLIP; None for the one that goes with the backbone.
        metric: Distance by which embeddings are replaced with tokens.
        **kwargs: See `PromptMethod`.
    """

    def __init__(
        self,
        *,
        objective: Literal["denoising", "clip"] = "denoising",
        lr: float = 0.1,
        weight_decay: float = 0.1,
        clip: str | None = None,
        metric: Metric = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(metric=metric, **kwargs)
        self.lr, self.weight_decay = lr, weight_decay
        self.clip = ClipSimilarity(clip or clip_of(self.backbone.name), self.offline) if objective == "clip" else None
        self._features: dict[str, Tensor] = {}

    def search(self, batch: Step, rows: Tensor) -> None:
        """One AdamW step."""
        optimizer: Any = self.optimizers()
        ids, embeddings = self.prompt(rows.to(self.device), straight_through=True)
        loss = self._loss(batch, rows, ids, embeddings)
        self.step_active(optimizer, loss)
        self.log("train/loss", loss.mean().detach(), prog_bar=True)

    def _loss(self, batch: Step, rows: Tensor, ids: Tensor, embeddings: Tensor) -> Tensor:
        if self.clip is None:
            return self.denoising_loss(rows, ids, embeddings, self.samples(rows, batch))
        features = torch.stack([self._features_of(self.problems[row]) for row in rows.tolist()])
        loss: Tensor = self.clip(ids, embeddings, features)
        return loss

    def _features_of(self, problem: Problem) -> Tensor:
        """Mean CLIP features (E,) of a problem's pictures, encoded once."""
        assert self.clip is not None
        if problem.key not in self._features:
            (pictures,) = self.data.pictures([problem])
            self._features[problem.key] = self.clip.features(pictures.to(self.device)).mean(0)
        return self._features[problem.key]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as the released code."""
        return torch.optim.AdamW([self.prompt.embeddings], lr=self.lr, weight_decay=self.weight_decay)
