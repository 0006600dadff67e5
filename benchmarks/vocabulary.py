"""Measure where `fit` spends its time with vocabularies of full size: `python benchmarks/vocabulary.py FOLDER`.

FOLDER holds a diffusers pipeline, preferably with small networks and the tokenizers of a published model, so that costs
that grow with the vocabulary stand out. Runs each method's config on one image or prompt, in a process of its own, and
prints the seconds of CPU time spent on loading (libraries, settings, weights, tokenizers), the denoiser and the
autoencoder, the text encoders, the CLIP, and the rest, with the share of the rest. `--profile` also prints the
functions that take the most time.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
PROMPT = "a small dog on a red background"
CONFIGS = ("invert", "gcg", "ph2p", "ph2p_lbfgs", "pez", "textual_inversion", "clip_words", "random_tokens", "dpo_diff",
           "metric_guidance",
           "seed_invariance", "human_feedback")  # fmt: skip
EXTRA = {
    "metric_guidance": ["--model.objective", "Sharpness"],
    "human_feedback": ["--model.chooser", "Scripted", "--model.chooser.wants", str(IMAGE), "--model.steps", "4"],
    "dpo_diff": ["--model.positive", "[neighbors]"],
}
WITHOUT_NEGATIVE = {"dpo_diff": ["--model.negative", "[]"], "seed_invariance": ["--model.unconditional", "false"]}
"""Settings for FLUX.1, which takes no negative prompt."""
PARTS = ("loading", "denoiser", "text encoders", "CLIP", "rest")


class Clock:
    """Divide this thread's CPU time among parts that call each other; time counts for the innermost part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running, self._since = ["loading"], time.thread_time()

    def switch(self) -> None:
        """Add the time since the last switch to the running part."""
        now = time.thread_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for a part."""

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
    """Time the parts: the networks with their backward passes, and the search as a whole."""
    from pytorch_lightning import Trainer

    from lightning_prompts.backbones import Backbone, TextEncoder
    from lightning_prompts.objectives import ClipSimilarity

    def patch(owner: Any, name: str, part: str) -> None:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))

    for family in Backbone.__subclasses__():
        patch(family, "denoise", "denoiser")
    for name in ("encode_image", "decode"):
        patch(Backbone, name, "denoiser")
    patch(TextEncoder, "forward", "text encoders")
    for name in ("features", "text_features"):
        patch(ClipSimilarity, name, "CLIP")
    patch(ClipSimilarity, "__init__", "loading")
    patch(torch.autograd, "grad", "denoiser")
    patch(torch.Tensor, "backward", "denoiser")
    patch(Trainer, "fit", "rest")


def run(config: str, folder: str, extra: list[str], profiled: bool) -> dict[str, float]:
    """Run `fit` with a config in this process; return the CPU seconds of each part."""
    clock, profile = Clock(), cProfile.Profile()
    from lightning_prompts.commands.main import main

    watch(clock)
    prompted = config in ("dpo_diff", "metric_guidance", "seed_invariance", "human_feedback")
    given = ["--data.prompts", PROMPT] if prompted else ["--data.images", str(IMAGE)]
    with tempfile.TemporaryDirectory() as scratch, profile if profiled else nullcontext():
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
        flux = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
        chosen = [*EXTRA.get(config, []), *(WITHOUT_NEGATIVE.get(config, []) if flux else [])]
        main([*command, "--trainer.accelerator", "cpu", *chosen, *extra])
    clock.switch()
    if profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return clock.seconds


def main() -> None:
    """Print a table with one line per config; each runs in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, extra = parser.parse_known_args()
    if args.one:
        print(f"\n{json.dumps(run(args.one, args.folder, extra, args.profile))}")
        return
    print(
        f"| | {' | '.join(f'{part}, s' for part in PARTS)} | share of the rest |\n|{'---|' * (2 + len(PARTS))}",
        flush=True,
    )
    for config in args.configs:
        options = ["--profile"] if args.profile else []
        command = [sys.executable, __file__, args.folder, "--one", config, *options, *extra]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        if args.profile:
            print(done.stdout)
        seconds = json.loads(done.stdout.splitlines()[-1])
        share = seconds["rest"] / sum(seconds.values())
        print(f"| {config} | {' | '.join(f'{seconds[part]:.1f}' for part in PARTS)} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
