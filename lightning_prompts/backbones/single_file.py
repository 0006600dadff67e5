"""Checkpoints in one file, in the layout of the code that the models were trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_prompts.backbones.hub import CONFIGURATION, SHORT_NAMES, find_model
from lightning_prompts.errors import UserError

DESCRIBED_BY = {  # how the names of weights begin, and the model that they are described by
    "conditioner.embedders.1.model.": "sdxl",
    "cond_stage_model.transformer.": "sd15",
    "cond_stage_model.model.": "sd21",
}


def described_by(file: Path) -> str:
    """The short name of the model whose configuration and tokenizers go with a file."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise UserError(
            f"The file {str(file)!r} is not called .safetensors, and pickle weights (.ckpt, .pt, .bin) are refused because they can run "
            "code; convert it to safetensors."
        )
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"The file {str(file)!r} cannot be read ({error}); fetch it again.") from error
    for start, model in DESCRIBED_BY.items():
        if any(name.startswith(start) for name in names):
            return model
    raise UserError(
        f"The file {str(file)!r} has no text encoder of Stable Diffusion 1, 2 or XL in their original layout; give a folder in "
        "diffusers' layout."
    )


def find_configuration(file: Path, config: str | None, offline: bool, revision: str | None) -> Path:
    """The folder of the configuration and tokenizers that go with a file, downloaded if need be."""
    wanted = described_by(file)
    try:
        return find_model(config or wanted, offline, revision, CONFIGURATION)
    except UserError as error:
        raise UserError(
            f"The file {str(file)!r} holds weights alone, and the configuration of {config or SHORT_NAMES[wanted]!r} is missing, in "
            f"whose place --model.config can name another model or folder: {error}"
        ) from error


def read_single_file(file: Path, folder: Path, index: Mapping[str, Any], read: set[str], dtype: str) -> dict[str, Any]:
    """The networks in a file.

    Args:
        file: The weights.
        folder: Where configuration and tokenizers are.
        index: The content of the folder's model_index.json.
        read: The components to read.
        dtype: Precision of the networks.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    others = [part for part, value in index.items() if isinstance(value, list) and part not in read]
    unused = {part: None for part in others if not part.startswith(("scheduler", "tokenizer"))}
    try:
        with _complete():
            pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
                str(file), config=str(folder), local_files_only=True, torch_dtype=getattr(torch, dtype), **unused
            )
    except SingleFileComponentError as error:
        raise ValueError(str(error.message).partition("\n")[0].replace(". ", ": ")) from error
    return {part: pipeline.components[part] for part in read}


@contextmanager
def _complete() -> Iterator[None]:
    """Refuses networks of which a weight is missing, which diffusers leaves at random without a word."""
    load = torch.nn.Module.load_state_dict

    def load_all(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        loaded = load(module, *args, **kwargs)
        if missing := sorted(loaded.missing_keys):
            raise ValueError(f"the {type(module).__name__} lacks {len(missing)} weights such as {missing[0]}")
        return loaded

    torch.nn.Module.load_state_dict = load_all  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
