"""The settings of `predict`, and the callback that writes its images."""

from __future__ import annotations

import os
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser

from lightning_prompts.callbacks import ImageWriter, Scores
from lightning_prompts.commands.interpolate import Interpolate
from lightning_prompts.commands.mix import Crossover, find_parents
from lightning_prompts.engine.loaders import PredictSettings
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import own_rank
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.sampling.seeding import check_seeds
from lightning_prompts.setting_types import Positive

DEFAULT_SEEDS, DEFAULT_MIX_SEEDS = "0", "0,1,2,3"

# Prompts are not optional: jsonargparse would read the prompts `# one` and `~` as null.
SETTINGS: list[tuple[str, Any, Any, str]] = [
    ("--prompts", str | list[str], [], "Prompts to generate images from, in place of those of the run."),
    ("--negative", str, "", "Negative prompt: a text, or a run's folder, whose prompts are joined by commas."),
    ("--frames", Positive, 12, "With --path: images per seed, the two ends included."),
    ("--generations", Positive, 4, "With --mix: number of generations."),
    ("--population", Positive, 16, "With --mix: children per generation."),
    ("--select", Positive, 4, "With --mix: prompts that the score keeps for the next generation."),
    ("--choose", Literal["score", "hand"], "score", "With --mix: whether the score or you choose the prompts to keep."),
]


def add_settings(parser: LightningArgumentParser) -> None:
    """Add the settings that only `predict` has."""
    for name, type_, default, help in SETTINGS:
        parser.add_argument(name, type=type_, default=default, help=help)
    parser.add_argument(
        "--path", type=str, nargs=2, help="Two prompts, or files of prompt embeddings, to interpolate between."
    )
    parser.add_argument("--mix", type=str, nargs=2, help="Two runs whose prompts are recombined; see docs/uses.md.")


def parse_seeds(config: Any) -> list[int]:
    """Parse --seeds; the default depends on whether two runs are mixed.

    Raises:
        UserError: A seed is not a whole number, is out of range, or generates the same image as another one.
    """
    try:
        seeds = [int(seed) for seed in (config.seeds or _default_seeds(config)).split(",")]
    except ValueError:
        raise UserError(f"--seeds takes whole numbers such as 0,1,2,3, not {config.seeds!r}.") from None
    check_seeds("--seeds", seeds)
    return seeds


def _default_seeds(config: Any) -> str:
    return DEFAULT_MIX_SEEDS if config.get("mix") else DEFAULT_SEEDS


def prepare_prediction(
    config: Any, folder: RunFolder, scores: Scores, seeds: list[int]
) -> tuple[PredictSettings, pl.Callback]:
    """Return which images `predict` generates, and the callback that writes them.

    With --path and --mix, `predict` itself generates none, and the callback generates its own when it ends.

    Args:
        config: All settings of `predict`.
        folder: The folder to write to; that of a mix is created.
        scores: The scores of a mix.
        seeds: Seeds of the images.

    Raises:
        UserError: Settings exclude each other, or a run that they name does not exist.
    """
    prompts, negative = config.prompts or None, read_negative(config.negative)
    if config.path:
        if config.mix or prompts or negative:
            raise UserError("--path cannot be combined with --mix, --prompts or --negative; leave these out.")
        first, last = config.path
        return PredictSettings(prompts=()), Interpolate(folder, first, last, seeds, int(config.frames))
    if not config.mix:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return PredictSettings(seeds, prompts, negative), ImageWriter()
    if prompts:
        raise UserError(
            "--mix recombines the prompts of two runs and cannot be combined with --prompts; give one of the two."
        )
    parents = find_parents(config.mix)
    if own_rank() == 0:
        folder.prepare(resume=False, search=False)
    evolution = {name: config[name] for name in ("generations", "population", "select", "choose")}
    crossover = Crossover(folder, parents, seeds=seeds, negative=negative, scores=scores, **evolution)
    return PredictSettings(prompts=()), crossover


def read_negative(negative: str) -> str:
    """Return a negative prompt: the given text, or all prompts of the run in the given folder, joined by commas."""
    parent = os.path.dirname(negative)
    if negative and (
        os.path.isdir(negative) or os.path.isdir(parent)
    ):  # a name in a folder that exists is a misspelled run
        return ", ".join(str(problem.prompt) for problem in RunFolder(negative).hard_prompts())
    return negative
