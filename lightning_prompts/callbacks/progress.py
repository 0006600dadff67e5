"""What a person sees of the search: the step, and the prompts and their scores as they change."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)


class PromptProgress(pl.Callback):
    """A line for every better prompt, above a bar with the newest one where the output is a terminal.

    Args:
        most: Problems in a wave up to which every better prompt gets a line; with more, a line tells how many
            got better.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._shown: dict[str, float | None] = {}
        self._open = ExitStack()
        self._bar: tqdm[Any] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Opens the bar of a wave and shows the prompts that it begins with."""
        if self._bar is None:
            self._open.enter_context(logging_redirect_tqdm([logging.getLogger()]))
            steps = pl_module.data.steps
            self._bar = self._open.enter_context(
                tqdm(
                    total=steps,
                    initial=batch.step,
                    unit="step",
                    file=sys.stdout,
                    disable=None if trainer.is_global_zero else True,
                    leave=False,
                    mininterval=0,
                    miniters=1,
                )
            )
            self._show(pl_module, batch.step, begins=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows what has changed."""
        self._show(pl_module, batch.step + 1)
        if self._bar is not None:
            self._bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Closes the bar of a wave."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the terminal as it was."""
        self._open.close()

    def _show(self, module: Any, step: int, begins: bool = False) -> None:
        problems = [problem for problem in module.problems if problem.prompt]
        better = [problem for problem in problems if self._shown.get(problem.key) != problem.validation_loss]
        self._shown.update({problem.key: problem.validation_loss for problem in better})
        if not better:
            return
        if len(module.problems) <= self.most:
            for problem in better:
                log.info("step %d  %s  %.5f  %s", step, problem.target, problem.validation_loss, problem.prompt)
        else:
            mean = sum(problem.validation_loss for problem in problems) / len(problems)
            which = f"{len(problems)} prompts" if begins else f"{len(better)} of {len(problems)} prompts better"
            log.info("step %d  %s, mean loss %.5f", step, which, mean)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{better[-1].validation_loss:.5f} {better[-1].prompt}"[:80])
