"""Print the progress of a search: the step, the prompts, and their scores."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lightning_prompts.errors import printable

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)


class PromptProgress(pl.Callback):
    """Print a line for every improved prompt, above a progress bar if the output is a terminal.

    Args:
        most: Largest batch in which every improved prompt has its own line; for larger ones, a line counts them.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._shown: dict[str, float | None] = {}
        self._open = ExitStack()
        self._bar: tqdm[Any] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PromptMethod, batch: Step, batch_idx: int) -> None:
        """Open the bar and print the initial prompts."""
        if self._bar is None:
            self._open.enter_context(logging_redirect_tqdm([logging.getLogger()]))
            self._bar = self._open.enter_context(
                tqdm(
                    total=self._share(pl_module) * pl_module.steps,
                    unit="step",
                    file=sys.stdout,
                    disable=None if trainer.is_global_zero else True,
                    leave=False,
                    mininterval=0,
                    miniters=1,
                )
            )
            self._advance(pl_module)
        self._show(
            pl_module, [row for row, step in enumerate(batch.steps) if step == 0 or not self._shown], begins=True
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Print improved prompts, and advance the bar."""
        self._show(pl_module, range(len(pl_module.batch)))
        self._advance(pl_module)
        for row in pl_module.batch.rows:
            if not row.active:
                self._shown.pop(row.record.key, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Close the progress bar and restore the terminal."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: PromptMethod, exception: BaseException) -> None:
        """Restore the terminal after an error or an interruption."""
        self._open.close()

    def _share(self, module: PromptMethod) -> int:
        """Return the number of this rank's problems."""
        return sum(module.data.owns(place) for place in range(module.data.total))

    def _advance(self, module: PromptMethod) -> None:
        """Advance the bar; a finished problem counts as all of its steps."""
        if self._bar is not None:
            active = [row.steps for row in module.batch.rows if row.active]
            finished = len(module.data.seen) - len(active)
            self._bar.update(finished * module.steps + sum(active) - self._bar.n)

    def _show(self, module: PromptMethod, rows: Iterable[int], begins: bool = False) -> None:
        batch = module.batch
        problems = [batch[row].record for row in rows if batch[row].record.prompt]
        better = [problem for problem in problems if self._shown.get(problem.key) != problem.validation_loss]
        self._shown.update({problem.key: problem.validation_loss for problem in better})
        if not better:
            return
        if len(batch) <= self.most:
            for problem in better:
                step = batch[batch.records.index(problem)].steps
                log.info("step %d  %s  %.5f  %s", step, problem.target, problem.validation_loss, problem.prompt)
        else:
            mean = sum(problem.validation_loss or 0.0 for problem in problems) / len(problems)
            which = f"{len(problems)} prompts" if begins else f"{len(better)} of {len(problems)} prompts improved"
            log.info("step %d  %s, mean loss %.5f", max(batch.steps), which, mean)
        if self._bar is not None:
            self._bar.set_postfix_str(printable(f"{better[-1].validation_loss:.5f} {better[-1].prompt}"[:80]))
