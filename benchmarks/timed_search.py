"""Timed searches and plain loops: a method in its Trainer with its own config, on a model that stays on its device."""

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
from lightning_prompts.python_settings import checked_settings

WARM = 1  # steps that are not timed


class Case(NamedTuple):
    """A method, the number of problems in its batch, the changes to its config, and its plain loop."""

    kind: Any
    config: str
    problems: int
    settings: dict[str, Any]
    plain: Callable[[Any], Iterator[int]]


class Stay(SingleDeviceStrategy):
    """A device on which the model stays after a search; Lightning would copy it to the CPU."""

    def teardown(self) -> None:
        """Leave the model on the device."""


class Clock(pl.Callback):
    """Time a search after its first steps for a number of seconds, count the operations of one more step, and stop it.

    It waits for the device only at the start and the end, so the search can run ahead of the device.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.rate, self.operations, self.peak = 0.0, 0.0, 0  # samples per second, operations per sample, bytes

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start or stop the clock."""
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
        """Take a step and count its operations."""
        before = samples_of(module)
        operations = speed.flops(lambda: search(*args), self.device.type)
        self.operations = operations / (samples_of(module) - before)


def samples_of(method: Any) -> int:
    """Return the denoiser samples of a search; a backward pass counts as one."""
    return sum(problem.unet_samples for problem in method.batch.records)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def search(model: Backbone, case: Case, steps: int, folder: str, *callbacks: pl.Callback, **trainer: Any) -> Any:
    """Search like `fit` with the method's config, but write no results; return the method."""
    config = yaml.safe_load((CONFIGS / f"{case.config}.yaml").read_text())
    (given,) = checked_settings((case.kind,), config["model"]["init_args"], {})
    settings = given | {"score_every_n_steps": 10**9, "log_images_every_n_steps": 0} | case.settings
    inverts = case.kind.data_class is ImagesToPrompts
    method = case.kind(
        **settings | {"backbone": model, "batch_size": case.problems} | ({"steps": steps} if inverts else {})
    )
    data: Any = Prompts(plain_loops.PROMPTS[: case.problems])
    if inverts:
        schedule = config["data"]["init_args"] | {"num_validation_samples": 1}
        data = ImagesToPrompts(speed.targets(case.problems), **schedule)
    own = {"accelerator": "gpu" if model.device.type == "cuda" else "cpu", "strategy": Stay(model.device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = pl.Trainer(**TRAINER | own | trainer, logger=False, callbacks=[*callbacks], default_root_dir=folder).fit
        fit(method, datamodule=data)
    return method


def rate(loop: Iterator[int], device: torch.device, seconds: float) -> float:
    """Measure the samples per second of a plain loop, without its first step."""
    next(loop)
    synchronize(device)
    begun, samples = time.perf_counter(), 0
    while not samples or time.perf_counter() - begun < seconds:
        samples += next(loop)
        synchronize(device)
    return samples / (time.perf_counter() - begun)
