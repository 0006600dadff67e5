"""Downloads models before they are needed, as on a machine that has a connection."""

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
from lightning_prompts.errors import UserError
from lightning_prompts.terminal import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}; the command reads: {self.prog} NAME [NAME ...] [--revision REVISION] [--variant VARIANT]."
        )


def prefetch(args: Sequence[str]) -> None:
    """Downloads the files of models that a run would read, and of the CLIPs that search and judge there.

    Args:
        args: Names of models, --revision and --variant.
    """
    parser = _Parser("train.py prefetch", description="Downloads the files of models that a run would read.")
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="a model on the hub, a short name such as sdxl, or a safetensors file"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="which weights, such as fp16, of components that have them")
    given = parser.parse_args(args)
    wanted = [(name, *_wanted(name)) for name in given.names]  # refuses a wrong name before it fetches the others
    if is_offline() and any(files for *_, files in wanted):
        raise UserError("HF_HUB_OFFLINE forbids the connection that prefetch needs; unset it.")
    clips = []
    for name, model, files in wanted:
        if files:
            folder = _prefetch(model, given.revision, files, given.variant)
            clips += [] if (folder / "clip").is_dir() else [clip_beside(_widths(folder))]
        else:
            say(f"The model {name!r} is the folder {model}, and nothing has to be fetched.")
    for clip in dict.fromkeys(clips):
        _prefetch(clip, None, CLIP_FILES, None)


def _widths(folder: Path) -> list[int]:
    """Of the text encoders of a model."""
    configs = [json.loads(file.read_text()) for file in sorted(folder.glob("text_encoder*/config.json"))]
    return [int(config.get("hidden_size", config.get("d_model", 0))) for config in configs]


def _wanted(name: str) -> tuple[str, list[str]]:
    """A folder, or a model on the hub and which of its files a run would read."""
    if folder := local_folder(name):
        return str(folder), []
    if file := local_file(name):
        return hub_name(configuration_of(read_header(file))), configuration_files()
    return hub_name(name), model_files()


def _prefetch(name: str, revision: str | None, wanted: list[str], variant: str | None) -> Path:
    """Lists and downloads; gives the folder."""
    files = files_on_hub(name, revision, wanted, variant)
    say(f"{name}:")
    for file in files:
        say(f"{megabytes(file.size):>14}  {file.name}{' (in the cache)' if file.cached else ''}")
    cached = sum(file.size for file in files if file.cached)
    total = sum(file.size for file in files)
    say(f"{megabytes(total):>14}  in all, of which {megabytes(cached)} are in the cache")
    folder = fetch(name, revision, files)
    say(f"The model {name!r} is in {folder}, commit {folder.name}.")
    return folder
