"""GCG: greedy coordinate gradient (arXiv 2307.15043), on the loss of a picture under a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.base import Inverter, Samples
from lightning_prompts.methods.inversion.init import prompt_features
from lightning_prompts.sampling.seeding import generator
from lightning_prompts.setting_types import Positive

TRIES = 20  # draws of as many candidates as are wanted, before a step makes do with fewer different ones


class GCG(Inverter):
    """Swaps of tokens that the gradient proposes and the exact loss decides (algorithm 1 of the paper).

    The gradient with respect to the one-hot tokens estimates, to first order, how each token at each position would change the loss.
    Of the `topk` best tokens per position, `candidates` prompts with `swaps` random replacements are drawn. All candidates of all
    problems are evaluated together, each once, on the noise of the gradient. The best one is accepted if it improves the loss.

    Args:
        candidates: Prompts B to evaluate at each step.
        topk: Tokens to propose per position.
        swaps: Positions that a candidate changes.
        screen: If above 1, draw this many times the candidates and evaluate those that are most similar to the images in CLIP, whose
            text encoder costs little beside the denoiser.
        **kwargs: See `Inverter`.
    """

    moves_embeddings = False

    def __init__(
        self,
        *,
        candidates: Positive = 32,
        topk: Positive = 32,
        swaps: Positive = 1,
        screen: Positive = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 1 <= swaps <= len(self.prompt.positions):
            raise UserError(
                f"--model.swaps must be at most the {len(self.prompt.positions)} tokens of the prompt, got {swaps}."
            )
        self.candidates, self.topk, self.swaps, self.screen = candidates, topk, swaps, screen

    @property
    def uses_clip(self) -> bool:
        """See `Inverter.uses_clip`."""
        return super().uses_clip or self.screen > 1

    def step(self, batch: Step, rows: Tensor) -> None:
        """One step: propose, evaluate, take what is better."""
        here, samples = rows.to(self.device), self.samples(rows, batch)
        token_ids = self.prompt.project()[here]
        ids = self.prompt.ids(token_ids)
        embeddings = self.prompt.table[ids].requires_grad_()
        loss = self.loss(rows, ids, embeddings, samples)
        (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
        gradient = self.broadcast(gradient[:, self.prompt.positions])
        proposed, sound = (self.broadcast(drawn) for drawn in self._propose(batch.steps, rows, token_ids, gradient))
        losses, loss = self.broadcast(self._losses(rows, proposed, sound, samples)), self.broadcast(loss.detach())
        least, best = losses.min(1)
        taken = torch.where((least < loss).unsqueeze(1), proposed[torch.arange(len(rows)), best], token_ids)
        self.prompt.embeddings.data[here] = self.prompt.table[taken].float()
        self.log_step(batch, rows, loss=torch.minimum(least, loss))

    def _propose(
        self, steps: Sequence[int], rows: Tensor, token_ids: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Candidates (Q, B, M), and which of them (Q, B) survive being written down and read again, and are allowed."""
        change = gradient @ self.prompt.table.T  # of the loss, to first order and but for a constant a place, (Q, M, V)
        change = change.masked_fill(~self.prompt.allowed, torch.inf).scatter(2, token_ids.unsqueeze(2), torch.inf)
        others = max(int(self.prompt.allowed.sum()) - 1, 1)
        best = change.topk(min(self.topk, others), largest=False).indices.cpu()
        drawn = self.candidates * self.screen
        candidates = token_ids.cpu().unsqueeze(1).repeat(1, drawn, 1)
        new = torch.zeros(candidates.shape[:2], dtype=torch.bool)
        for q, row in enumerate(rows.tolist()):
            draw = generator(self.data.seed, f"{self.batch[row].record.key}/swaps", steps[row], 0)
            swapped = self._swapped(candidates[q, 0], best[q], drawn, draw)
            candidates[q, : len(swapped)], new[q, : len(swapped)] = swapped, True
        written = [found.sound for found in self.written(candidates[new])]
        sound = new.masked_scatter(new, torch.tensor(written, dtype=torch.bool)) & self.prompt.allowed.cpu()[
            candidates
        ].all(2)
        candidates = candidates.to(self.device)
        if self.screen == 1:
            return candidates, sound
        distance = self._distances(rows, candidates).masked_fill(~sound.to(self.device), torch.inf)
        kept = distance.topk(self.candidates, largest=False).indices
        kept_ids = candidates.gather(1, kept.unsqueeze(2).expand(-1, -1, candidates.shape[2]))
        return kept_ids, sound.gather(1, kept.cpu())

    def _swapped(self, token_ids: Tensor, best: Tensor, count: int, draw: torch.Generator) -> Tensor:
        """Draw `count` different prompts (B, M), or as many as are found, with exchanges of a prompt's tokens (M,).

        Args:
            token_ids: The prompt.
            best: Tokens (M, K) to choose from at each place.
            count: How many prompts are wanted.
            draw: Draws places and tokens uniformly.
        """
        found: dict[tuple[int, ...], None] = {}
        for _ in range(TRIES):
            places = torch.rand(count, len(token_ids), generator=draw).argsort(1)[:, : self.swaps]
            ranks = torch.randint(best.shape[1], places.shape, generator=draw)
            swapped = token_ids.repeat(count, 1).scatter(1, places, best[places, ranks])
            found |= dict.fromkeys(map(tuple, swapped[(swapped != token_ids).any(1)].tolist()))
            if len(found) >= count:
                break
        return torch.tensor(list(found)[:count], dtype=torch.long).view(-1, len(token_ids))

    def _distances(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """One minus the CLIP's cosine of each candidate (Q, B, M) with its problem's pictures, (Q, B)."""
        clip = self.clip  # loaded before it is known what it reads
        text = prompt_features(clip, self.prompt, candidates.flatten(0, 1), self.clip_reads_text)
        return 1 - torch.bmm(text.view(*candidates.shape[:2], -1), self.features(rows).unsqueeze(2)).squeeze(2)

    @torch.no_grad()
    def _losses(self, rows: Tensor, candidates: Tensor, sound: Tensor, samples: Samples) -> Tensor:
        """Losses (Q, B) of the sound candidates, infinite for the others."""
        which = sound.nonzero()[:, 0]  # the place in `rows` of each sound candidate
        token_ids, losses = candidates[sound.to(self.device)], [torch.empty(0, device=self.device)]
        # The samples of a chunk of candidates fill whole calls, and each rank has its share of a group's. So calls are the same
        # whatever the number of ranks; what is left over joins the last group, as a few samples would be divided otherwise.
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
        result = torch.full(sound.shape, torch.inf, device=self.device)
        result[sound.to(self.device)] = torch.cat(losses)
        return result
