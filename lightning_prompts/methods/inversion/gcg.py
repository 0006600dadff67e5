"""GCG: greedy coordinate gradient (arXiv 2307.15043), on the loss of an image under a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.inversion.samples import Samples
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import Positive

TRIES = 20  # attempts to draw enough different candidates, before a step continues with fewer


class GCG(Inverter):
    """Replace tokens, as the gradient proposes and the exact loss decides (algorithm 1 of the paper).

    The gradient with respect to the one-hot tokens estimates, to first order, how each token at each position would
    change the loss. Of the `topk` best tokens per position, `candidates` prompts with `n_replace` random replacements
    are drawn. All candidates of all problems are evaluated together, each once, on the noise of the gradient. The best
    one is accepted if it improves the loss.

    Args:
        candidates: Prompts B to evaluate at each step.
        topk: Tokens to propose per position.
        n_replace: Positions that a candidate changes.
        prefilter: If above 1, draw this many times the candidates and evaluate those that are most similar to the
            images in CLIP, whose text encoder costs little beside the denoiser.
        **kwargs: See `Inverter`.
    """

    moves_embeddings = False

    def __init__(
        self,
        *,
        candidates: Positive = 32,
        topk: Positive = 32,
        n_replace: Positive = 1,
        prefilter: Positive = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 1 <= n_replace <= len(self.prompt.positions):
            raise UserError(
                f"--model.n_replace must be at most the {len(self.prompt.positions)} tokens of the prompt, got "
                f"{n_replace}."
            )
        self.candidates, self.topk, self.n_replace, self.prefilter = candidates, topk, n_replace, prefilter

    @property
    def uses_clip(self) -> bool:
        """Return whether the CLIP is used, also for the prefilter."""
        return super().uses_clip or self.prefilter > 1

    def step(self, batch: Step, rows: Tensor) -> None:
        """Propose candidates, evaluate them, and accept the best one if it improves the loss."""
        on_device, samples = rows.to(self.device), self.samples(rows, batch)
        token_ids = self.prompt.project()[on_device]
        ids = self.prompt.ids(token_ids)
        embeddings = self.prompt.table[ids].requires_grad_()
        loss = self.loss(rows, ids, embeddings, samples)
        (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
        gradient = self.microbatch.broadcast(gradient[:, self.prompt.positions])
        candidates, valid = (
            self.microbatch.broadcast(drawn) for drawn in self._propose(batch.steps, rows, token_ids, gradient)
        )
        losses, loss = (
            self.microbatch.broadcast(self._losses(rows, candidates, valid, samples)),
            self.microbatch.broadcast(loss.detach()),
        )
        lowest, best = losses.min(1)
        accepted = torch.where((lowest < loss).unsqueeze(1), candidates[torch.arange(len(rows)), best], token_ids)
        self.prompt.embeddings.data[on_device] = self.prompt.table[accepted].float()
        self.log_step(batch, rows, loss=torch.minimum(lowest, loss))

    def _propose(
        self, steps: Sequence[int], rows: Tensor, token_ids: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw candidates (Q, B, M), and return which (Q, B) are allowed and encode to the same tokens as text."""
        change = (
            gradient @ self.prompt.table.T
        )  # of the loss, to first order and up to a constant per position, (Q, M, V)
        change = change.masked_fill(~self.prompt.allowed, torch.inf).scatter(2, token_ids.unsqueeze(2), torch.inf)
        others = max(int(self.prompt.allowed.sum()) - 1, 1)
        best = change.topk(min(self.topk, others), largest=False).indices.cpu()
        count = self.candidates * self.prefilter
        candidates = token_ids.cpu().unsqueeze(1).repeat(1, count, 1)
        new = torch.zeros(candidates.shape[:2], dtype=torch.bool)
        for q, row in enumerate(rows.tolist()):
            draw = generator(self.data.seed, f"{self.batch[row].record.key}/swaps", steps[row], 0)
            replaced = self._replace(candidates[q, 0], best[q], count, draw)
            candidates[q, : len(replaced)], new[q, : len(replaced)] = replaced, True
        decoded = [candidate.valid for candidate in self.prompt.decode(candidates[new])]
        valid = new.masked_scatter(new, torch.tensor(decoded, dtype=torch.bool))
        valid &= self.prompt.allowed.cpu()[candidates].all(2)
        candidates = candidates.to(self.device)
        if self.prefilter == 1:
            return candidates, valid
        distance = self._distances(rows, candidates).masked_fill(~valid.to(self.device), torch.inf)
        kept = distance.topk(self.candidates, largest=False).indices
        kept_ids = candidates.gather(1, kept.unsqueeze(2).expand(-1, -1, candidates.shape[2]))
        return kept_ids, valid.gather(1, kept.cpu())

    def _replace(self, token_ids: Tensor, best: Tensor, count: int, draw: torch.Generator) -> Tensor:
        """Draw up to `count` different prompts (B, M) with some tokens of a prompt replaced.

        Args:
            token_ids: The prompt, (M,).
            best: Tokens to choose from at each position, (M, K).
            count: The most prompts to return.
            draw: Generator of the positions and the tokens, both uniform.
        """
        prompts: dict[tuple[int, ...], None] = {}
        for _ in range(TRIES):
            positions = torch.rand(count, len(token_ids), generator=draw).argsort(1)[:, : self.n_replace]
            ranks = torch.randint(best.shape[1], positions.shape, generator=draw)
            replaced = token_ids.repeat(count, 1).scatter(1, positions, best[positions, ranks])
            prompts |= dict.fromkeys(map(tuple, replaced[(replaced != token_ids).any(1)].tolist()))
            if len(prompts) >= count:
                break
        return torch.tensor(list(prompts)[:count], dtype=torch.long).view(-1, len(token_ids))

    def _distances(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Compute one minus the cosine (Q, B) in CLIP of candidates (Q, B, M) and their problem's images."""
        text = self.search_clip.text_features(candidates.flatten(0, 1))
        return 1 - torch.bmm(text.view(*candidates.shape[:2], -1), self.features(rows).unsqueeze(2)).squeeze(2)

    @torch.no_grad()
    def _losses(self, rows: Tensor, candidates: Tensor, valid: Tensor, samples: Samples) -> Tensor:
        """Compute the losses (Q, B) of the valid candidates; those of the others are infinite."""
        which = valid.nonzero()[:, 0]  # index into `rows` of each valid candidate
        token_ids, losses = candidates[valid.to(self.device)], [torch.empty(0, device=self.device)]
        # The samples of a chunk of candidates fill whole calls, and a group has a chunk for each rank, so that the
        # calls do not depend on the number of ranks. The remainder joins the last group, since few samples would be
        # divided otherwise.
        chunk = self.microbatch.size // math.gcd(self.microbatch.size, samples.timesteps.shape[1])
        group = chunk * self.microbatch.ranks
        groups = torch.arange(len(which)).tensor_split(tuple(range(group, len(which) - group + 1, group)))
        for part in groups if len(which) else ():
            ids = self.prompt.ids(token_ids[part.to(self.device)])
            losses.append(
                self.loss(
                    rows[which[part]], ids, self.prompt.table[ids], samples[which[part].to(self.device)], chunk=chunk
                )
            )
        result = torch.full(valid.shape, torch.inf, device=self.device)
        result[valid.to(self.device)] = torch.cat(losses)
        return result
