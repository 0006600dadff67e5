"""Searches and plain loops, timed: a method in its Trainer with its own config, on a model that stays where it is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import plain_loops
import pytorch_lightning as pl
import speed
import torch
import yaml
from pytorch_lightning.strategies import SingleDeviceStrategy

from lightning_prompts.backbones import Backbone
from lightning_prompts.commands.dry_run import peak_memory, reset_peak_memory
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import TRAINER
from lightning_prompts.python_search import CONFIGS

WARM = 1  # steps that are not timed


class Case(NamedTuple):
    """A method, how many problems it searches together, what its config is changed in, and its plain loop."""

    kind: Any
    config: str
    problems: int
    settings: dict[str, Any]
    plain: Callable[[Any], Iterator[int]]


class Stay(SingleDeviceStrategy):
    """A device on which the model is left when a search has ended; Lightning would copy it to the CPU."""

    def teardown(self) -> None:
        """Leaves it there."""


class Clock(pl.Callback):
    """Times a search after its first steps for so many seconds, counts the operations of one more step, and ends it.

    It waits for the device at the beginning and at the end alone, so that the search may run ahead of the device.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.rate, self.operations, self.peak = 0.0, 0.0, 0  # samples a second, operations a sample, bytes

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins to time, or ends it."""
        if batch_idx == WARM:
            synchronize(self.device)
            reset_peak_memory(self.device)
            self.begun, self.before = time.perf_counter(), samples_of(pl_module)
        elif batch_idx > WARM and time.perf_counter() - self.begun >= self.seconds:
            synchronize(self.device)
            self.rate = (samples_of(pl_module) - self.before) / (time.perf_counter() - self.begun)
            self.peak = peak_memory(self.device)
            pl_module.step = partial(self.counted, pl_module, pl_module.step)
            trainer.should_stop = True

    def counted(self, module: Any, search: Callable[..., None], *args: Any) -> None:
        """Takes a step and counts its operations."""
        before = samples_of(module)
        operations = speed.flops(lambda: search(*args), self.device.type)
        self.operations = operations / (samples_of(module) - before)


def samples_of(method: Any) -> int:
    """Denoiser samples that a search has taken, of which a backward pass counts as one."""
    return sum(problem.unet_samples for problem in method.batch.records)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def search(model: Backbone, case: Case, steps: int, folder: str, *callbacks: pl.Callback, **trainer: Any) -> Any:
    """Searches as `fit` does with the method's config, but for the results, and gives the method."""
    config = yaml.safe_load((CONFIGS / f"{case.config}.yaml").read_text())
    settings = config["model"]["init_args"] | {"score_every": 10**9, "sample_every": 0} | case.settings
    method = case.kind(**settings | {"backbone": model, "together": case.problems})
    data: Any = Prompts(plain_loops.PROMPTS[: case.problems])
    if case.kind.data_class is ImagesToPrompts:
        schedule = config["data"]["init_args"] | {"steps": steps, "validation_samples": 1}
        data = ImagesToPrompts(speed.targets(case.problems), **schedule)
    own = {"accelerator": "gpu" if model.device.type == "cuda" else "cpu", "strategy": Stay(model.device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = pl.Trainer(**TRAINER | own | trainer, logger=False, callbacks=[*callbacks], default_root_dir=folder).fit
        fit(method, datamodule=data)
    return method


def rate(loop: Iterator[int], device: torch.device, seconds: float) -> float:
    """Samples a second of a plain loop, whose first step is not timed."""
    next(loop)
    synchronize(device)
    begun, samples = time.perf_counter(), 0
    while not samples or time.perf_counter() - begun < seconds:
        samples += next(loop)
        synchronize(device)
    return samples / (time.perf_counter() - begun)
