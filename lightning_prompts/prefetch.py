"""Downloads models before they are needed, as on a machine that has a connection."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lightning_prompts.backbones.hub import fetch, files_on_hub, hub_name, is_offline, local_folder, megabytes
from lightning_prompts.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; the command reads: {self.prog} NAME [NAME ...] [--revision REVISION].")


def prefetch(args: Sequence[str]) -> None:
    """Downloads the files of models that a run would read.

    Args:
        args: Names of models, and --revision.
    """
    parser = _Parser("train.py prefetch", description="Downloads the files of models that a run would read.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a model on the hub or a short name such as sdxl")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    given = parser.parse_args(args)
    folders = {name: local_folder(name) for name in given.names}
    hub_names = {name: hub_name(name) for name, folder in folders.items() if not folder}  # refuses before it fetches
    if hub_names and is_offline():
        raise UserError("HF_HUB_OFFLINE forbids the connection that prefetch needs; unset it.")
    for name, folder in folders.items():
        if folder:
            print(f"The model {name!r} is the folder {folder}, and nothing has to be fetched.")
        else:
            _prefetch(hub_names[name], given.revision)


def _prefetch(name: str, revision: str | None) -> None:
    files = files_on_hub(name, revision)
    print(f"{name}:")
    for file in files:
        print(f"{megabytes(file.size):>14}  {file.name}{' (in the cache)' if file.cached else ''}")
    cached = sum(file.size for file in files if file.cached)
    total = sum(file.size for file in files)
    print(f"{megabytes(total):>14}  in all, of which {megabytes(cached)} are in the cache", flush=True)
    folder = fetch(name, revision, files)
    print(f"The model {name!r} is in {folder}, commit {folder.name}.")
