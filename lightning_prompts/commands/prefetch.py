"""Download models before they are needed, for example on a machine with a connection: `train.py prefetch`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_prompts.backbones.hub import (
    CLIP_FILES,
    clip_beside,
    configuration_files,
    fetch,
    files_on_hub,
    hub_name,
    is_offline,
    local_file,
    local_folder,
    megabytes,
    model_files,
)
from lightning_prompts.backbones.single_file import configuration_of, read_header
from lightning_prompts.commands.descriptions import DESCRIPTIONS
from lightning_prompts.errors import UserError
from lightning_prompts.terminal import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}; the command reads: {self.prog} NAME [NAME ...] [--revision REVISION] [--variant VARIANT]."
        )


def prefetch(args: Sequence[str]) -> None:
    """Download the files of models that a run reads, and of the CLIPs that it searches by.

    Args:
        args: Names of models, --revision and --variant.

    Raises:
        UserError: A model does not exist or cannot be downloaded.
    """
    parser = _Parser("train.py prefetch", description=DESCRIPTIONS["prefetch"])
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="a model on the hub, a short name such as sdxl, or a safetensors file"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="variant of the weights, such as fp16, for the components that have it")
    given = parser.parse_args(args)
    models = [(name, *_files_to_read(name)) for name in given.names]  # refuse a wrong name before any download
    if is_offline() and any(patterns for *_, patterns in models):
        raise UserError("HF_HUB_OFFLINE forbids the connection that prefetch needs; unset it.")
    clips = []
    for name, model, patterns in models:
        if patterns:
            folder = _download(model, given.revision, patterns, given.variant)
            clips += [] if (folder / "clip").is_dir() else [clip_beside(_widths(folder))]
        else:
            say(f"The model {name!r} is the folder {model}, and nothing has to be fetched.")
    for clip in dict.fromkeys(clips):
        _download(clip, None, CLIP_FILES, None)


def _widths(folder: Path) -> list[int]:
    """Return the hidden size of each text encoder of a model."""
    configs = [json.loads(file.read_text()) for file in sorted(folder.glob("text_encoder*/config.json"))]
    return [int(config.get("hidden_size", config.get("d_model", 0))) for config in configs]


def _files_to_read(name: str) -> tuple[str, list[str]]:
    """Return a local model's folder and no patterns, or a model on the hub and the patterns of the files to read."""
    if folder := local_folder(name):
        return str(folder), []
    if file := local_file(name):
        return hub_name(configuration_of(read_header(file))), configuration_files()
    return hub_name(name), model_files()


def _download(name: str, revision: str | None, patterns: list[str], variant: str | None) -> Path:
    """List and download the files of a model; return its folder in the cache."""
    files = files_on_hub(name, revision, patterns, variant)
    say(f"{name}:")
    for file in files:
        say(f"{megabytes(file.size):>14}  {file.name}{' (in the cache)' if file.cached else ''}")
    cached = sum(file.size for file in files if file.cached)
    total = sum(file.size for file in files)
    say(f"{megabytes(total):>14}  in all, of which {megabytes(cached)} are in the cache")
    folder = fetch(name, revision, files)
    say(f"The model {name!r} is in {folder}, commit {folder.name}.")
    return folder
