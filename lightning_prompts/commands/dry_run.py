"""Measure the memory and time of one step of a search: `train.py dry-run`."""

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
    from lightning_prompts.backbones.memory import MemorySaving
    from lightning_prompts.engine.datamodule import Step
    from lightning_prompts.methods import PromptMethod

GIB = 2**30
WIDTH = 52  # of the settings in a table


class DryRun(pl.Callback):
    """End a search after one step, and print the peak memory and the time of its parts.

    Args:
        scores: The scores of the results.
        silent: Measure the step alone, without the results, and print nothing.

    Attributes:
        measured: Peak memory in bytes and time in seconds, by part.
    """

    def __init__(self, scores: Scores, silent: bool = False) -> None:
        self.scores, self.silent = scores, silent
        self.measured: dict[str, tuple[int, float]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Start to measure scorings and steps."""
        self.asked = pl_module.microbatch.size
        pl_module.score = self._measure("scoring", pl_module.score, pl_module)  # type: ignore[method-assign]
        pl_module.step = self._measure("a step", pl_module.step, pl_module)  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PromptMethod, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Stop the search after one step."""
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Measure the results, if there are any already, and print the table."""
        if self.silent:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if found := list(data.folder.with_prompt()):
            self._measure("the results", pl_module.final_evaluation, pl_module)(found, self.scores)
        say(*self._table(pl_module, len(pl_module.batch)).splitlines())

    def _measure(self, name: str, function: Callable[..., Any], module: PromptMethod) -> Callable[..., Any]:
        """Wrap a function, so that each call measures the part: the largest peak of all calls, the time of the last."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            reset_peak_memory(module.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            memory = peak_memory(module.device)
            previous, _ = self.measured.get(name, (0, 0.0))
            self.measured[name] = max(memory, previous), time.perf_counter() - start
            return result

        return wrapped

    def whole_search(self, module: PromptMethod) -> str:
        """Estimate the time of a search whose steps and scorings each take as long as those measured."""
        steps = int(module.steps)
        scorings = 1 + math.ceil(steps / module.score_every_n_steps)
        seconds = steps * self.measured["a step"][1] + scorings * self.measured["scoring"][1]
        return f"A search of {steps} steps and {scorings} scorings would take about {duration(seconds)}."

    def _table(self, module: PromptMethod, problems: int) -> str:
        """Format the measurements, and the settings that lower the memory."""
        backbone = module.backbone
        parts = {"text encoders": backbone.text_encoders, "denoiser": backbone.denoiser, "autoencoder": backbone.vae}
        sizes = {name: sum(weight.nbytes for weight in part.parameters()) / GIB for name, part in parts.items()}
        dtype = str(next(backbone.denoiser.parameters()).dtype).removeprefix("torch.")
        by_part = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
        batch = f"{problems} {'problem' if problems == 1 else 'problems'}, microbatch {_calls(module)}"
        lines = [
            f"{module.device}, {total_memory(module.device) / GIB:.1f} GiB; {batch}",
            f"{'weights':<12}{sum(sizes.values()):7.2f} GiB            {by_part}; {dtype}",
        ]
        lines += [
            f"{name:<12}{memory / GIB:7.2f} GiB {seconds:8.1f} s" for name, (memory, seconds) in self.measured.items()
        ]
        if module.device.type == "cpu":
            lines.append("(The memory is that of the whole process, the libraries included.)")
        lines.append(self.whole_search(module))
        if module.microbatch.size < self.asked and not module.microbatch.fitted:
            lines.append(f"A microbatch of {self.asked} does not fit into the memory.")
        return "\n".join(
            [
                *lines,
                "Settings that take less memory, and mostly more time:",
                *(f"  {line}" for line in _advice(module)),
            ]
        )


def _advice(module: PromptMethod) -> list[str]:
    """Return the settings that lower the memory, the cheapest first."""
    backbone, advice = module.backbone, []
    if next(backbone.denoiser.parameters()).dtype == torch.float32:
        half = "--model.backbone.dtype bfloat16"
        advice.append(f"{half:<{WIDTH}} half the weights and activations of the frozen model")
    if _calls(module) > 1:
        half = f"--model.microbatch {_calls(module) // 2}"
        advice.append(f"{half:<{WIDTH}} half the activations")
    if not backbone.denoiser.is_gradient_checkpointing:
        advice.append(f"{_saving('gradient_checkpointing')} activations of one block at a time in the backward pass")
    if not backbone.offloaded and module.device.type != "cpu":
        advice.append(f"{_saving('cpu_offload')} text encoders, denoiser and autoencoder one at a time")
    if not backbone.vae.use_tiling and backbone.image_size > 512:
        advice.append(f"{_saving('vae_tiling')} images are decoded in tiles")
    smaller = f"--model.backbone.image_size {backbone.image_size // 2}"
    return [*advice, f"{smaller:<{WIDTH}} a quarter of the activations; images may be worse"]


def _saving(way: MemorySaving) -> str:
    """Return a setting of the way to save memory, padded for a table."""
    return f"{f'--model.backbone.save_memory [{way}]':<{WIDTH}}"


def _calls(module: PromptMethod) -> int:
    """Return the number of samples per call: at most as many as fit into the memory, and as there are."""
    microbatch = module.microbatch
    return int(min(microbatch.size, microbatch.most) if microbatch.fitted else microbatch.size)


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure the peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak_memory`: of a GPU's tensors, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process started
    return int(peak if sys.platform == "darwin" else 1024 * peak)


def total_memory(device: torch.device) -> int:
    """Return the memory of a device in bytes; on the CPU, that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
