"""What a search would take: memory and time of one step."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

GIB = 2**30


class DryRun(pl.Callback):
    """Ends a search after one step and prints how much memory at most, and how much time, its parts have taken.

    Args:
        scores: What the results would be scored by.
        silent: Measure the step alone, without drawing results, and print nothing.
    """

    def __init__(self, scores: Scores, silent: bool = False) -> None:
        self.scores, self.silent = scores, silent
        self.taken: dict[str, tuple[int, float]] = {}  # bytes and seconds of each part

    def on_fit_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Has the parts measured from now on."""
        self.asked = pl_module.microbatch.size
        pl_module.score = self._measured("scoring", pl_module.score, pl_module)  # type: ignore[method-assign]
        pl_module.step = self._measured("a step", pl_module.step, pl_module)  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Ends the search."""
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Draws results, if there are any already, and prints."""
        if self.silent:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if found := list(data.folder.found()):
            self._measured("the results", pl_module.final_evaluation, pl_module)(found, self.scores)
        say(*self._table(pl_module, len(pl_module.batch)).splitlines())

    def _measured(self, name: str, work: Callable[..., Any], module: PromptMethod) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            forget_peak(module.device)
            begun = time.perf_counter()
            given = work(*args, **kwargs)
            most = peak(module.device)
            most_before, _ = self.taken.get(name, (0, 0.0))
            self.taken[name] = max(most, most_before), time.perf_counter() - begun
            return given

        return done

    def whole_search(self, module: PromptMethod) -> str:
        """How long a search would take whose steps and scorings all take as long as those that were measured."""
        steps = int(module.data.steps)
        scorings = 1 + math.ceil(steps / module.score_every)
        seconds = steps * self.taken["a step"][1] + scorings * self.taken["scoring"][1]
        return f"A search of {steps} steps and {scorings} scorings would take about {duration(seconds)}."

    def _table(self, module: PromptMethod, problems: int) -> str:
        """What was measured, and what would lower it."""
        backbone = module.backbone
        parts = {"text encoders": backbone.towers, "denoiser": backbone.denoiser, "autoencoder": backbone.vae}
        sizes = {name: sum(weight.nbytes for weight in part.parameters()) / GIB for name, part in parts.items()}
        dtype = str(next(backbone.denoiser.parameters()).dtype).removeprefix("torch.")
        which = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
        lines = [
            f"{module.device}, {memory_of(module.device) / GIB:.1f} GiB; {problems} {'problem' if problems == 1 else 'problems'}, microbatch {_calls(module)}",
            f"{'weights':<12}{sum(sizes.values()):7.2f} GiB            {which}; {dtype}",
        ]
        lines += [f"{name:<12}{most / GIB:7.2f} GiB {seconds:8.1f} s" for name, (most, seconds) in self.taken.items()]
        if module.device.type == "cpu":
            lines.append("(Memory is the whole process's at that time, with what the libraries take.)")
        lines.append(self.whole_search(module))
        if module.microbatch.size < self.asked and not module.microbatch.fitted:
            lines.append(f"The memory does not hold a microbatch of {self.asked}.")
        return "\n".join([*lines, "Less memory, and mostly more time:", *(f"  {line}" for line in _advice(module))])


def _advice(module: PromptMethod) -> list[str]:
    """Settings that lower the memory, those first that cost least."""
    backbone, advice = module.backbone, []
    if next(backbone.denoiser.parameters()).dtype == torch.float32:
        advice.append(
            "--model.backbone.dtype bfloat16                 half the weights and activations of the frozen model"
        )
    if _calls(module) > 1:
        half = f"--model.microbatch {_calls(module) // 2}"
        advice.append(f"{half:<38} half the activations")
    if not backbone.denoiser.is_gradient_checkpointing:
        advice.append(
            "--model.backbone.gradient_checkpointing true    activations of one block at a time in the backward pass"
        )
    if not backbone.offloaded and module.device.type != "cpu":
        advice.append(
            "--model.backbone.cpu_offload true               text encoders, denoiser and autoencoder one at a time"
        )
    if not backbone.vae.use_tiling and backbone.image_size > 512:
        advice.append("--model.backbone.vae_tiling true                pictures are decoded in tiles")
    smaller = f"--model.backbone.image_size {backbone.image_size // 2}"
    return [*advice, f"{smaller:<38} a quarter of the activations; the model may draw worse"]


def _calls(module: PromptMethod) -> int:
    """How many samples a call takes: no more than the memory holds, and than there are."""
    microbatch = module.microbatch
    return int(min(microbatch.size, microbatch.most) if microbatch.fitted else microbatch.size)


def forget_peak(device: torch.device) -> None:
    """Begins to measure the most memory that is taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes that were taken since then: by tensors on the device or, on the CPU, by the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process began
    return int(most if sys.platform == "darwin" else 1024 * most)


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory, or of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads well."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
