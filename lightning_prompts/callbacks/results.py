"""Write the results of a run: images of the best prompts, scores, the grid, and files for other tools."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.distributed import barrier
from lightning_prompts.objectives.lpips import missing_lpips_weights
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.reports import versions
from lightning_prompts.runs.result_files import append_line, write_lines, write_results
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
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
        settings: The settings to record.
        report: Whether to print the results.
    """

    def __init__(
        self, scores: Scores | None = None, settings: dict[str, Any] | None = None, report: bool = True
    ) -> None:
        self.scores, self.settings, self.report = scores or Scores(), settings or {}, report
        self._ended = False

    def setup(self, trainer: pl.Trainer, pl_module: PromptMethod, stage: str) -> None:
        """Let `test` compute the same scores."""
        pl_module.evaluation.scores = self.scores

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
        self._write_once(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Refuse a scorer that takes part in the search, before any score is replaced."""
        self.scores.check_heldout(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Write the files, after all ranks have saved their records."""
        self._write_once(trainer, pl_module)
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not any(problem.paths for problem in folder.with_prompt()):
            return
        if reason := missing_lpips_weights(weights=self.scores.lpips_weights):
            say(reason)

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

    def _write_once(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Wait for all ranks; then rank 0 writes the files of the run, and prints the results."""
        if trainer.world_size > 1:
            barrier()
        module.microbatch.ranks = 1  # only rank 0 continues
        if trainer.is_global_zero:
            self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: PromptMethod) -> None:
        """Write the files of the run, and print the results."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder: RunFolder = data.folder
        first = list(islice(folder.with_prompt(), MAX_SHOWN))
        if shown := data.unchanged(first, warn=not trainer.testing):  # `test_step` has warned
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
