"""Write the results of a run: images of the best prompts, scores, the grid, and files for other tools."""

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
from lightning_prompts.distributed import barrier
from lightning_prompts.errors import UserError
from lightning_prompts.objectives.lpips import missing_lpips_weights
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.reports import versions
from lightning_prompts.runs.result_files import append_line, write_lines, write_results
from lightning_prompts.sampling.figures import to_image, to_png
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import ProblemData, Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

MAX_SHOWN = 24  # problems in the grid
MAX_EXPORTED = 1000  # problems in the files for other tools


class Results(Checkpoint):
    """Score each problem when its search ends, and write the files of a run when `fit` or `test` ends.

    Scores are computed only here, so they cannot influence the search. A `Checkpoint` is called after the callbacks
    that finish problems; this one must come before PromptCheckpoint. Each scored problem adds a line to
    `results.jsonl`. At the end, rank 0 writes `result.json`, `prompt.txt`, `grid.png` and the other files with the
    results of all ranks.

    Args:
        scores: The scores to compute.
        seeds: Seeds of the images of `predict`.
        settings: The settings to record.
        prompts: Prompts for `predict`, in place of those of the run.
        negative: Negative prompt for `predict`.
        report: Whether to print the results.
    """

    def __init__(
        self,
        scores: Scores | None = None,
        seeds: Sequence[int] = (0,),
        settings: dict[str, Any] | None = None,
        prompts: Sequence[str] = (),
        negative: str = "",
        report: bool = True,
    ) -> None:
        self.scores, self.seeds, self.settings = scores or Scores(), tuple(seeds), settings or {}
        self.prompts, self.negative, self.report = tuple(prompts), negative, report
        self._ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Refuse a scorer that takes part in the search, and write the results of problems finished by earlier runs."""
        self.scores.check_heldout(pl_module)
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            write_lines(folder)
        elif folder.writes:
            folder.lines_of(trainer.global_rank).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Score the finished problems."""
        self._score(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Warn if earlier runs of this search used up `--trainer.max_time`, so that nothing was searched."""
        if not self._ended and trainer.is_global_zero:
            log.warning(
                "Nothing was searched, since --trainer.max_time was used up by earlier runs of this search; raise it."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Write the files here, since Lightning has moved the model to the CPU before `on_fit_end`."""
        self._ended = True
        self._score(trainer, pl_module)
        self._mark_open(trainer, pl_module)
        if trainer.world_size > 1:
            barrier()
        pl_module.microbatch.ranks = 1  # only rank 0 continues
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Refuse a scorer that takes part in the search, before any score is replaced."""
        self.scores.check_heldout(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Generate images again, score them, and write the files."""
        if not trainer.is_global_zero:
            return
        pl_module.microbatch.ranks = 1
        data: ProblemData = trainer.datamodule  # type: ignore[attr-defined]
        folder = data.folder
        found = folder.with_prompt()
        while problems := list(islice(found, pl_module.batch_size)):
            if unchanged := data.unchanged(problems):
                pl_module.final_evaluation(unchanged, self.scores)
            for problem in unchanged:
                folder.save(problem)
                data.evict(problem)
        self._write(trainer, pl_module)
        from_images = any(problem.paths for problem in folder.with_prompt())
        if from_images and (reason := missing_lpips_weights(weights=self.scores.lpips_weights)):
            say(reason)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Generate an image per prompt and seed."""
        if not trainer.is_global_zero:
            return
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        without = f"-without-{file_name(self.negative)}" if self.negative else ""
        if not self.prompts and not any(folder.with_prompt()):
            raise UserError("This run has no prompts yet; run `fit` first, or give --prompts.")
        for name, text, images in self._generate(pl_module, folder.with_prompt(), noise):
            for seed, image in zip(self.seeds, images, strict=True):
                path = folder.path / "images" / f"{name}{without}-seed{seed}.png"
                atomic_write(path, to_png(to_image(image)))
                say(f"{path}  {text}")

    def _generate(
        self, module: PromptMethod, found: Iterable[Problem], noise: Tensor
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield a file name, the text and its images, one per noise, for the given prompts or those of the run."""
        for text in dict.fromkeys(self.prompts):
            yield file_name(text), text, module.generate([text] * len(noise), noise, self.negative)
        if not self.prompts:
            for problem in found:
                yield problem.key, str(problem.prompt), module.generate_best(problem, noise, self.negative)

    def _score(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Score and save the newly finished problems, and append them to `results.jsonl`."""
        problems = [problem for problem in module.batch.finished if problem.prompt and problem.status != "failed"]
        if problems:
            module.final_evaluation(problems, self.scores)
        for problem in module.save_finished():
            append_line(trainer.datamodule.folder, problem, trainer.global_rank)  # type: ignore[attr-defined]

    def _mark_open(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Record in open problems that the search was interrupted, such as by `--trainer.max_time`."""
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        for problem in module.batch.records:
            if problem.status == "open":
                problem.reason = "The search was cut short; continue it with --ckpt_path last."
                folder.save(problem)

    def _write(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Write the files of the run, and print the results."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder: RunFolder = data.folder
        if shown := data.unchanged(list(islice(folder.with_prompt(), MAX_SHOWN))):
            module.write_figures(shown, folder)
            for problem in shown:
                data.evict(problem)
        if exported := list(islice(folder.with_prompt(), MAX_EXPORTED)):
            module.write_files(exported, folder)
        settings = {**self.settings, "sampling": module.sampling_settings}
        write_results(folder, type(module).__name__, module.backbone.name, data.seed, settings, versions())
        for lines in folder.path.glob("results-rank*.jsonl"):
            lines.unlink()
        if self.report:
            _report(folder)


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Check that seeds are valid for a torch generator and give different images.

    Args:
        name: Name of the setting.
        seeds: The seeds.

    Raises:
        UserError: There are no seeds; one is negative or has more than 64 bits; or two agree in the 32 bits that
            torch's CPU generator uses.
    """
    wrong = [seed for seed in seeds if not 0 <= seed < 2**64]
    if wrong or not seeds:
        given = wrong[0] if wrong else "an empty list"
        raise UserError(f"{name} takes whole numbers from 0 to {2**64 - 1}, not {given}.")
    first: dict[int, int] = {}
    for seed in seeds:
        if seed % 2**32 in first:
            raise UserError(
                f"{name} must give different images, but {first[seed % 2**32]} and {seed} give the same one, since "
                "torch's CPU generator uses only the lowest 32 bits of a seed; leave one of them out."
            )
        first[seed % 2**32] = seed


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise (S, C, h, w) from seeds, as diffusers does with CPU generators."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def file_name(text: str) -> str:
    """Return a file name of at most 45 letters, digits and dashes for a text; different texts have different names."""
    start = re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _report(folder: RunFolder) -> None:
    """Print the results of a run."""
    counts = Counter(problem.status for problem in folder.records())
    for problem in islice(folder.ordered(), MAX_SHOWN):
        note = f"  ({problem.status}: {problem.reason})" if problem.reason else ""
        score = f"  [{summary}]" if (summary := folder.result_class.of(problem).summary) else ""
        say(f"{problem.target}: {problem.display_prompt or '-'}{score}{note}")
    if (total := sum(counts.values())) > MAX_SHOWN:
        say(
            f"... and {total - MAX_SHOWN} more: "
            f"{', '.join(f'{count} {status}' for status, count in counts.most_common())}"
        )
    if counts["failed"] and total > 1:
        say(
            f"Why {counts['failed']} of {total} failed is in {folder.failed}; --ckpt_path last --data.retry true tries "
            "them again."
        )
    if counts["open"]:
        say(f"The search was cut short; the same command with --run {folder.path} --ckpt_path last continues it.")
    say(f"Results are in {folder.path}" + (f"; look at {folder.grid}" if folder.grid.exists() else ""))
