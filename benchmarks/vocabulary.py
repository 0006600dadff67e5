"""Where the time of `fit` goes with vocabularies of real size: `python benchmarks/vocabulary.py FOLDER --config configs/pez.yaml ...`.

FOLDER is a diffusers pipeline, best one whose networks are small and whose tokenizers are a published model's, so that what grows
with the vocabulary shows. Runs the configs of methods in this process, one image or prompt each, and prints the seconds of CPU time
that went into loading (libraries, settings, weights, tokenizers), the denoiser and the autoencoder, the text encoders, the CLIP, and
the rest, and the share of the rest. With `--profile` also the functions of the rest that take most.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
PROMPT = "a small dog on a red background"
CONFIGS = ("invert", "gcg", "ph2p", "ph2p_lbfgs", "pez", "textual_inversion", "clip_words", "random_tokens", "dpo_diff", "metric_guidance",
           "seed_invariance", "human_feedback")  # fmt: skip
EXTRA = {
    "metric_guidance": ["--model.objective", "Sharpness"],
    "human_feedback": ["--model.chooser", "Scripted", "--model.chooser.wants", str(IMAGE), "--model.steps", "4"],
    "dpo_diff": ["--model.positive", "[neighbours]"],
}
PARTS = ("loading", "denoiser", "text encoders", "CLIP", "rest")


class Clock:
    """Divide this thread's CPU time among parts that call each other; the innermost part has it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running, self._since = ["loading"], time.thread_time()

    def switch(self) -> None:
        """Give the time since the last switch to the part that runs."""
        now = time.thread_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function whose time is a part's."""

        @functools.wraps(work)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(part)
            try:
                return work(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return wrapped


def watch(clock: Clock) -> None:
    """Have the parts timed: the networks with their backward passes, and the search as a whole."""
    from pytorch_lightning import Trainer

    from lightning_prompts.backbones import Backbone, TextTower
    from lightning_prompts.objectives import ClipSimilarity

    def patch(owner: Any, name: str, part: str) -> None:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))

    for family in Backbone.__subclasses__():
        patch(family, "denoise", "denoiser")
    for name in ("encode_image", "decode"):
        patch(Backbone, name, "denoiser")
    patch(TextTower, "forward", "text encoders")
    for name in ("features", "text_features"):
        patch(ClipSimilarity, name, "CLIP")
    patch(ClipSimilarity, "__init__", "loading")
    patch(torch.autograd, "grad", "denoiser")
    patch(torch.Tensor, "backward", "denoiser")
    patch(Trainer, "fit", "rest")


def run(config: str, folder: str, extra: list[str]) -> tuple[Clock, cProfile.Profile]:
    """Run `fit` with a config in this process."""
    clock, profile = Clock(), cProfile.Profile()
    from lightning_prompts.main import main

    watch(clock)
    given = (
        ["--data.images", str(IMAGE)]
        if not (config in EXTRA or config == "seed_invariance")
        else ["--data.prompts", PROMPT]
    )
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            "fit",
            "--config",
            f"configs/{config}.yaml",
            "--model.backbone",
            folder,
            *given,
            "--run",
            f"{scratch}/run",
        ]
        profile.enable()
        main([*command, "--trainer.accelerator", "cpu", *EXTRA.get(config, []), *extra])
        profile.disable()
    clock.switch()
    return clock, profile
