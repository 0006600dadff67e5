"""What a person gets: pictures drawn from the found text, its scores, the grid and the files to paste or load."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.distributed import wait_for_all
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.errors import UserError
from lightning_prompts.metrics import lpips_lacks
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.reports import versions
from lightning_prompts.sampling.figures import to_image, to_png
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

SHOWN = 24  # problems in the grid
EXPORTED = 1000  # problems in the files for other tools


class Results(Checkpoint):
    """Scores each problem when its search has ended, and writes the files of a run when `fit` or `test` ends.

    Scores are measured here and nowhere else, after everything has been selected. As a `Checkpoint` it comes after what finishes a
    search, and has to be named before what saves states. `results.jsonl` gets a line as soon as a problem is
    scored; `result.json`, `prompt.txt`, `grid.png` and so on are written at the end, by rank 0 of what all ranks have found.

    Args:
        scores: What measures them.
        seeds: Seeds that `predict` draws pictures from.
        settings: What to record as the run's settings.
        prompts: What `predict` draws instead of the found prompts.
        negative: What `predict` leads away from.
        tell: Print what was found.
    """

    def __init__(
        self,
        scores: Scores | None = None,
        seeds: Sequence[int] = (0,),
        settings: dict[str, Any] | None = None,
        prompts: Sequence[str] = (),
        negative: str = "",
        tell: bool = True,
    ) -> None:
        self.scores, self.seeds, self.settings = scores or Scores(), tuple(seeds), settings or {}
        self.prompts, self.negative, self.tell = tuple(prompts), negative, tell
        self._ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Refuses a scorer that takes part in the search, and has the lines say what earlier processes have finished."""
        self.scores.check_heldout(pl_module)
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            folder.write_lines()
        elif folder.writes:
            folder.lines_of(trainer.global_rank).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Scores what has finished."""
        self._score(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Say so if Lightning has not begun, as when earlier runs have used up `--trainer.max_time`, which counts for all together."""
        if not self._ended and trainer.is_global_zero:
            log.warning(
                "Nothing was searched, since --trainer.max_time was used up by earlier runs of this search; raise it."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Writes; when `on_fit_end` is called Lightning has moved the model to the CPU."""
        self._ended = True
        self._score(trainer, pl_module)
        self._mark_open(trainer, pl_module)
        if trainer.world_size > 1:
            wait_for_all()
        pl_module.microbatch.ranks = 1  # the others are done
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Refuses a scorer that takes part in the search, before any score is replaced."""
        self.scores.check_heldout(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Draws again from the text, scores and writes."""
        if not trainer.is_global_zero:
            return
        pl_module.microbatch.ranks = 1
        data: ProblemData = trainer.datamodule  # type: ignore[attr-defined]
        folder = data.folder
        found = folder.found()
        while problems := list(islice(found, pl_module.together)):
            if unchanged := data.unchanged(problems):
                pl_module.final_evaluation(unchanged, self.scores)
            for problem in unchanged:
                folder.save(problem)
                data.evict(problem)
        self._write(trainer, pl_module)
        pictured = any(problem.paths for problem in folder.found())
        if pictured and (reason := lpips_lacks(weights=self.scores.lpips_weights)):
            say(reason)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Draws one picture a prompt and seed."""
        if not trainer.is_global_zero:
            return
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        without = f"-without-{file_name(self.negative)}" if self.negative else ""
        if not self.prompts and not any(folder.found()):
            raise UserError("This run has no prompts yet; run `fit` first, or give --prompts.")
        for name, text, pictures in self._drawn(pl_module, folder.found(), noise):
            for seed, picture in zip(self.seeds, pictures, strict=True):
                path = folder.path / "pictures" / f"{name}{without}-seed{seed}.png"
                atomic_write(path, to_png(to_image(picture)))
                say(f"{path}  {text}")

    def _drawn(
        self, module: PromptMethod, found: Iterable[Problem], noise: Tensor
    ) -> Iterator[tuple[str, str, Tensor]]:
        """A name, the text and pictures, one from each noise, of the person's own prompts or else of what was found."""
        for text in dict.fromkeys(self.prompts):
            yield file_name(text), text, module.draw([text] * len(noise), noise, self.negative)
        if not self.prompts:
            for problem in found:
                yield problem.key, str(problem.prompt), module.draw_found(problem, noise, self.negative)

    def _score(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Scores and saves what has finished since the last time, and tells it."""
        problems = [problem for problem in module.batch.finished if problem.prompt and problem.status != "failed"]
        if problems:
            module.final_evaluation(problems, self.scores)
        for problem in module.save_finished():
            trainer.datamodule.folder.append_line(problem, trainer.global_rank)  # type: ignore[attr-defined]

    def _mark_open(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Say of problems that are still searched that the search was cut short, as `--trainer.max_time` does."""
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        for problem in module.batch.records:
            if problem.status == "open":
                problem.reason = "The search was cut short; continue it with --ckpt_path last."
                folder.save(problem)

    def _write(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Writes the files of the run, and prints what was found."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder: RunFolder = data.folder
        if shown := data.unchanged(list(islice(folder.found(), SHOWN))):
            module.write_figures(shown, folder)
            for problem in shown:
                data.evict(problem)
        if exported := list(islice(folder.found(), EXPORTED)):
            module.write_files(exported, folder)
        settings = {**self.settings, "drawing": module.drawing}
        folder.write_result(type(module).__name__, module.backbone.name, data.seed, settings, versions())
        for lines in folder.path.glob("results-rank*.jsonl"):
            lines.unlink()
        if self.tell:
            _report(folder)


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Refuse seeds that a torch generator does not take, or that draw the same picture twice.

    Args:
        name: Setting that gives them.
        seeds: The seeds.

    Raises:
        UserError: There is none; one is negative or has more than 64 bits; or two of them agree in the 32 bits that torch's CPU
            generator uses.
    """
    wrong = [seed for seed in seeds if not 0 <= seed < 2**64]
    if wrong or not seeds:
        given = wrong[0] if wrong else "an empty list"
        raise UserError(f"{name} takes whole numbers from 0 to {2**64 - 1}, not {given}.")
    first: dict[int, int] = {}
    for seed in seeds:
        if seed % 2**32 in first:
            raise UserError(
                f"{name} must draw different pictures, and {first[seed % 2**32]} and {seed} draw the same one, since torch's CPU "
                "generator uses the lowest 32 bits of a seed; leave one of them out."
            )
        first[seed % 2**32] = seed


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise (S, C, h, w) from seeds that a user has given, as diffusers does with CPU generators."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def file_name(text: str) -> str:
    """A name of at most 45 letters, digits and dashes for what is drawn from a text; other texts have others."""
    start = re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _report(folder: RunFolder) -> None:
    counts = Counter(problem.status for problem in folder.records())
    for problem in islice(folder.ordered(), SHOWN):
        note = f"  ({problem.status}: {problem.reason})" if problem.reason else ""
        score = f"  [{summary}]" if (summary := folder.result_class.of(problem).summary) else ""
        say(f"{problem.target}: {problem.shown or '-'}{score}{note}")
    if (total := sum(counts.values())) > SHOWN:
        say(f"... and {total - SHOWN} more: {', '.join(f'{count} {status}' for status, count in counts.most_common())}")
    if counts["failed"] and total > 1:
        say(
            f"Why {counts['failed']} of {total} failed is in {folder.failed}; --ckpt_path last --data.retry true tries them again."
        )
    if counts["open"]:
        say(f"The search was cut short; the same command with --run {folder.path} --ckpt_path last continues it.")
    say(f"Results are in {folder.path}" + (f"; look at {folder.grid}" if folder.grid.exists() else ""))
