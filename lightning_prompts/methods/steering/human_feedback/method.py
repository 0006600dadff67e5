"""Iterative human feedback: manipulating embeddings of Stable Diffusion prompts (arXiv 2308.12059, section 3.2)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.backbones.vocabulary import token_lists
from lightning_prompts.embeddings import farthest, principal_axes, slerp, transfer
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.methods.steering.human_feedback.choices import Choice, Chooser, Round, checked_choice
from lightning_prompts.methods.steering.human_feedback.page import Page
from lightning_prompts.methods.steering.parameters import PromptEmbeds
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.runs.record import HumanFeedbackResult, Move, Problem
from lightning_prompts.sampling.seeding import derive_seed
from lightning_prompts.setting_types import Positive

log = logging.getLogger(__name__)

HALVINGS = 4  # rounds of other candidates, each at half the distance, before the distance is reset


class HumanFeedback(Steering):
    """Move an encoded prompt towards images that the user likes.

    Each round adds random words to the text of the last move, and shows images of the texts that lead farthest apart.
    The user chooses one and how far to move on the arc to it, or asks for other candidates, which are nearer. The
    record has the moves, so that the search can resume. Prompts are searched one after the other.

    Args:
        chooser: Who chooses: the user on a `Page`, or `Scripted`.
        candidates: Images per round.
        texts: Random texts per round, from which the candidates are chosen; 500 in the paper.
        added: The most words that a text adds.
        words: The words to add; None for all whole words of the vocabulary.
        steps: Answers after which a search ends.
        **kwargs: See `Steering`.
    """

    prompt: PromptEmbeds
    result_class = HumanFeedbackResult
    path: list[Tensor]  # encoded prompts (S, R, D) after each move, from the user's prompt to the current one
    images: list[Tensor]  # their images
    axes: Tensor  # axes of the map, (2, D)

    def __init__(
        self,
        *,
        chooser: Chooser | None = None,
        candidates: Positive = 5,
        texts: Positive = 100,
        added: Positive = 1,
        words: list[str] | None = None,
        steps: Positive = 100,
        **kwargs: Any,
    ) -> None:
        # One prompt at a time, every choice is kept, and the user decides when to stop.
        super().__init__(unconditional=False, steps=steps, batch_size=1, score_every_n_steps=1, patience=1, **kwargs)
        if texts < candidates:
            raise UserError(f"--model.texts must be at least --model.candidates, got {texts} and {candidates}.")
        self.chooser, self.candidates, self.texts, self.added = chooser or Page(), candidates, texts, added
        if words is None:
            allowed = self.vocabulary.allowed().nonzero()
            words = [word.strip() for word in self.vocabulary.tokenizer.batch_decode(allowed)]
            words = [word for word in words if word.isalpha()]
        if not words:
            raise UserError("--model.words has no words; give at least one, or leave it out.")
        self.words = words
        self.tokens = [len(ids) for ids in token_lists(self.vocabulary.tokenizer, words)]
        self.finished_keys: set[str] = set()  # keys of the problems that the user finished

    # --- the current prompt

    def init_params(self, rows: Tensor) -> Tensor:
        """Return the current embeddings, those of the last move or the encoded prompt."""
        return self.prompt.moving_rows(torch.stack([self.path[-1]] * len(rows)))

    @torch.no_grad()
    def set_rows(self, problems: list[Problem]) -> None:
        """Set the problem, and repeat the moves of its record."""
        if newest := self.data.folder.read(problems[0].key):  # which may be newer than a checkpoint
            problems[0].result = HumanFeedbackResult.of(newest)
        super().set_rows(problems)
        self.path, self.images = [], []
        self.move_to(self.init_embeds(torch.tensor([0]))[0])
        self.axes = principal_axes(self.summaries(self.encoded(self.variations(problems[0], 0, 0))), 2)
        for i, move in enumerate(HumanFeedbackResult.of(problems[0]).moves):
            (end,) = self.candidate_embeds([move["text"]], self.base_text(problems[0], i))
            self.move_to(slerp(self.path[-1], end, move["strength"]))

    def move_to(self, embeds: Tensor) -> None:
        """Make an encoded prompt (S, R, D) the current one."""
        self.path.append(embeds)
        self.images.append(self.image(embeds))

    @torch.no_grad()
    def update_params(self) -> None:
        """Set the parameters to the current prompt."""
        self.prompt.rows.copy_(self.prompt.moving_rows(self.path[-1][None]))

    def encoded(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to (T, S, R, D)."""
        return self.encode(texts).unsqueeze(1).float()

    def image(self, embeds: Tensor) -> Tensor:
        """Generate the image (3, H, W) of an encoded prompt (S, R, D), always from the same noise."""
        return self.sampler.generate_from_embeds(embeds[None], self.noise[:, :1])[0, 0]

    def positions(self, embeds: Sequence[Tensor]) -> Tensor:
        """Return the positions (N, 2) of N encoded prompts (S, R, D) on the map, relative to the user's prompt."""
        return (self.summaries(torch.stack(list(embeds))) - self.summaries(self.path[0][None])) @ self.axes.T

    def summaries(self, embeds: Tensor) -> Tensor:
        """Summarize encoded prompts (T, S, R, D) to vectors (T, D); see `Backbone.summary_embedding`."""
        return self.backbone.summary_embedding(embeds[:, 0])

    # --- candidates

    def variations(self, problem: Problem, moves: int, others: int) -> list[str]:
        """Return the random texts of a round, a function of the seed, the problem, and the moves and others so far."""
        rng, text = (
            random.Random(derive_seed(self.data.seed, problem.key, moves, others)),
            self.base_text(problem, moves),
        )
        texts: list[str] = []
        for _ in range(self.texts):
            varied = text.split()
            for _ in range(rng.randint(1, int(self.added))):
                varied.insert(rng.randint(0, len(varied)), rng.choice(self.words))
            texts.append(" ".join(varied))
        return texts

    def base_text(self, problem: Problem, moves: int) -> str:
        """Return the text to add words to: that of the last move of strength 0.5 or more that has room for words."""
        made = HumanFeedbackResult.of(problem).moves[:moves]
        texts = (move["text"] for move in reversed(made) if move["strength"] >= 0.5)
        return next((text for text in texts if self.has_room(text)), problem.target)

    def has_room(self, text: str) -> bool:
        """Return whether words can be added to a text."""
        (tokens,) = token_lists(self.vocabulary.tokenizer, [text])
        return len(tokens) + int(self.added) * max(self.tokens) <= self.vocabulary.length - 2

    def check(self, prompt: str) -> None:
        """Refuse a prompt that has no room for more words."""
        super().check(prompt)
        if not self.has_room(prompt):
            raise UserError(
                f"The prompt {prompt!r} is too long to add words, as the text encoder takes {self.vocabulary.length} "
                "tokens with start and end; shorten it or lower --model.added."
            )

    def candidate_embeds(self, texts: Sequence[str], text: str) -> Tensor:
        """Apply the changes from a text to T others to the current encoded prompt, (T, S, R, D)."""
        return transfer(self.path[-1], self.encoded([text]), self.encoded(texts))

    @torch.no_grad()
    def step(self, batch: Step, rows: Tensor) -> None:
        """Show a round of candidates and apply the user's choice."""
        (problem,) = self.batch.records
        result = HumanFeedbackResult.of(problem)
        texts = self.variations(problem, len(result.moves), result.others)
        ends = self.candidate_embeds(texts, self.base_text(problem, len(result.moves)))
        chosen = farthest(self.summaries(ends) - self.summaries(self.path[-1][None]), int(self.candidates))
        texts, ends = [texts[i] for i in chosen], ends[chosen]
        reach = 0.5 ** (result.others % HALVINGS)

        @cache
        def generate(candidate: int, strength: float) -> Tensor:
            return self.image(slerp(self.path[-1], ends[candidate], reach * strength))

        question = Round(
            prompt=problem.target,
            images=list(self.images),
            texts=texts,
            positions=self.positions(self.path),
            candidate_positions=self.positions(list(slerp(self.path[-1], ends, reach))),
            generate=generate,
            stopped=lambda: self.stopped,
        )
        choice = self.chooser.choose(question)
        if choice is not None or not self.stopped:
            choice = checked_choice(choice, len(texts))
        if choice:
            self.apply_choice(problem, choice, texts, reach)
        self.update_params()

    def apply_choice(self, problem: Problem, choice: Choice, texts: Sequence[str], reach: float) -> None:
        """Apply a choice to a problem's moves.

        Args:
            problem: The record.
            choice: The choice.
            texts: Texts of the round's candidates.
            reach: How far the candidates are on the arcs to their texts, up to 1.
        """
        result = HumanFeedbackResult.of(problem)
        if choice.action == "finish":
            self.finished_keys.add(problem.key)
        elif choice.action == "others":
            result.others += 1
        elif choice.action == "undo" and result.moves:
            result.others = result.moves.pop()["others"]
            self.path.pop()
            self.images.pop()
        elif choice.action == "move":
            text, strength = texts[choice.candidate], reach * choice.strength
            end = self.candidate_embeds([text], self.base_text(problem, len(result.moves)))  # alone, as after resuming
            result.moves.append(Move(text=text, strength=strength, candidate=choice.candidate, others=result.others))
            result.others = 0
            self.move_to(slerp(self.path[-1], end[0], strength))
            log.info("%s: move %d, %.2f of the way to %r", problem.target, len(result.moves), strength, text)

    # --- results

    def score(self, rows: Tensor) -> list[Problem]:
        """Keep the current prompt, which is the best by definition."""
        (problem,) = self.batch.records
        problem.prompt = problem.target
        self.batch[0].best = self.path[-1]
        self.data.folder.save_embeds(problem.key, self.file([problem], self.path[-1][None]))
        return [problem]

    def finish_done(self, rows: Tensor) -> None:
        """Finish the problem if the user did."""
        if len(rows) and self.batch[0].record.key in self.finished_keys:
            self.batch.finish(0)
        else:
            super().finish_done(rows)

    def finish(self, row: int) -> None:
        """Finish a problem; one without a move is not improved."""
        super().finish(row)
        if not HumanFeedbackResult.of(self.batch[row].record).moves:
            self.batch[row].record.status, self.batch[row].record.reason = "not improved", "Nothing was chosen."

    def values(self, images: Tensor, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Return nothing, since the user's taste has no metric."""
        return {}

    def metric(self, values: dict[str, Tensor]) -> Tensor:
        """Refuse, since there is no metric."""
        raise UserError("HumanFeedback has no metric to validate; look at grid.png, or run `test`.")

    def clips(self) -> list[ClipSimilarity]:
        """See `PromptMethod.clips`; includes the CLIP of a scripted chooser."""
        return [*super().clips(), *(one for one in vars(self.chooser).values() if isinstance(one, ClipSimilarity))]

    # --- the chooser

    @property
    def stopped(self) -> bool:
        """Whether the run is stopping."""
        return self.trainer.should_stop or self.trainer.received_sigterm

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callbacks, with one that closes the chooser however the search ends."""
        return [*super().configure_callbacks(), _Closing()]

    def on_fit_start(self) -> None:
        """Open the chooser before the first round."""
        self.chooser.open(self.backbone, self.offline)

    def on_fit_end(self) -> None:
        """Close the chooser after the results are written."""
        self.chooser.close(f"Finished. The results are in {self.data.folder.path}. You can close this page.")

    def on_train_start(self) -> None:
        """Resume from the record, which may be newer than the checkpoint."""
        super().on_train_start()
        if self.batch.records:
            self.score(torch.tensor([0]))  # the checkpoint's embeddings may be older too


class _Closing(pl.Callback):
    """Close the chooser when a search fails or is stopped, which Lightning reports to callbacks only."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the chooser, also on Ctrl-C."""
        if isinstance(pl_module, HumanFeedback):
            pl_module.chooser.close("The search was stopped. Your choices are saved; resume with --ckpt_path last.")
