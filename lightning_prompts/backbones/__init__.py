"""Frozen text-to-image models behind one interface, and where they are loaded from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_prompts.backbones.base import Backbone, Conditioning, TextTower
from lightning_prompts.backbones.stable_diffusion import StableDiffusion
from lightning_prompts.errors import UserError

__all__ = ["EMOJI", "Backbone", "Conditioning", "StableDiffusion", "TextTower", "load_backbone", "quiet"]

EMOJI = Path(__file__).parent.parent / "emoji" / "model"
"""Where the embedded model is."""

_NETWORKS = {  # of a StableDiffusionPipeline: their classes and the files of their weights
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}


def load_backbone(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    offline: bool = False,
    revision: str | None = None,
) -> Backbone:
    """Loads a model, on the CPU.

    Weights are read from safetensors only, since pickles can run code. The safety checker is not loaded.

    Args:
        name: `emoji` for the embedded model, a folder, or a model on the Hugging Face hub as `owner/name`.
        dtype: Precision of the networks, whatever the files' is.
        offline: Use downloaded files only, as the environment variable HF_HUB_OFFLINE=1 does.
        revision: Branch, tag or commit on the hub.
    """
    import diffusers
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = _find(name, offline, revision)
    scheduler_name = _check(name, folder)
    try:
        with quiet():
            scheduler = _read_scheduler(scheduler_name, folder)
            tokenizer = _read_tokenizer(CLIPTokenizer, folder)
            text_encoder = _read(CLIPTextModel, folder, "text_encoder", dtype=getattr(torch, dtype))
            unet = _read(diffusers.UNet2DConditionModel, folder, "unet", torch_dtype=getattr(torch, dtype))
            vae = _read(diffusers.AutoencoderKL, folder, "vae", torch_dtype=getattr(torch, dtype))
    except (AttributeError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"The model {name!r} cannot be read ({reason}); fetch or write it again.") from error
    unet.to(memory_format=torch.channels_last)  # in which convolutions are a tenth to a fifth faster
    return StableDiffusion(name, [TextTower(tokenizer, text_encoder)], unet, vae, scheduler)


def _find(name: str, offline: bool, revision: str | None) -> Path:
    """The folder of a model, downloaded if need be."""
    folder = EMOJI if name == "emoji" else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == "emoji":
        raise UserError(f"The embedded model 'emoji' is not in {folder}; install lightning-prompts again.")
    if folder.is_file():
        raise UserError(
            f"The model {name!r} is a single file, and a folder is needed; write one with "
            "`StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)`."
        )
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(
            f"The model {name!r} is neither 'emoji' nor an existing folder nor a name on the Hugging Face hub, which "
            "reads 'owner/name'; correct it."
        )
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return _download(name, offline, revision)


def _download(name: str, offline: bool, revision: str | None) -> Path:
    """A hub model's folder in the local cache, with the files that are read and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    files = ["model_index.json", "tokenizer/*", "scheduler/*"]
    for part, (_, stem) in _NETWORKS.items():
        files += [f"{part}/config.json", f"{part}/{stem}.safetensors*", f"{part}/{stem}-*-of-*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=files))
    except GatedRepoError as error:
        advice = f"is gated; accept its terms on https://huggingface.co/{name} and log in with `hf auth login`."
        raise UserError(f"The model {name!r} {advice}") from error
    except RepositoryNotFoundError as error:
        advice = "correct the name or, if the model is private, log in with `hf auth login`."
        raise UserError(f"The model {name!r} is neither a folder nor on the Hugging Face hub; {advice}") from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"The model {name!r} has no revision {revision!r}; give one of its branches or tags."
        ) from error
    except Exception as error:  # connection, proxy, time-out, full disk: their classes differ between versions
        if offline:
            problem, advice = "has not been downloaded completely, and this run is offline", "run once online"
        else:
            problem = f"could not be fetched from the Hugging Face hub ({type(error).__name__})"
            advice = "check the name, the connection and the disk, or use 'emoji', which needs no download"
        raise UserError(f"The model {name!r} is no folder here and {problem}; {advice}.") from error


def _check(name: str, folder: Path) -> str:
    """Refuses what is not a supported pipeline in safetensors; gives the name of the scheduler's class."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"The model {name!r} has no model_index.json; give a folder that a diffusers pipeline's `save_pretrained` wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        family: str = index["_class_name"]
        if family == "StableDiffusionPipeline":
            found = {part: index[part][1] for part in _NETWORKS}
            scheduler: str = index["scheduler"][1]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"The file {path} is not a pipeline's; fetch or write the model again.") from error
    if family != "StableDiffusionPipeline":
        raise UserError(f"The model {name!r} is a {family}; only StableDiffusionPipeline is supported, choose another.")
    for part, (supported, stem) in _NETWORKS.items():
        if found[part] != supported:
            raise UserError(
                f"The {part} of the model {name!r} is a {found[part]}; only {supported} is supported, choose another."
            )
        file = folder / part / f"{stem}.safetensors"
        if not file.is_file() and not Path(f"{file}.index.json").is_file():
            raise UserError(
                f"The model {name!r} has no {part}/{file.name}, and pickle weights (.bin, .ckpt) are refused because they "
                "can run code; convert it with `save_pretrained(folder, safe_serialization=True)`."
            )
    return scheduler


def _read(network: Any, folder: Path, part: str, **dtype: torch.dtype) -> Any:
    model, info = network.from_pretrained(
        folder, subfolder=part, use_safetensors=True, output_loading_info=True, **dtype
    )
    if missing := sorted(info["missing_keys"]):  # the libraries fill them at random and only warn
        raise ValueError(f"{part} lacks {len(missing)} weights such as {missing[0]}")
    return model


def _read_tokenizer(tokenizer: Any, folder: Path) -> Any:
    files = {path.name for path in (folder / "tokenizer").glob("*")}
    if (
        "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files
    ):  # transformers would make an empty one
        raise ValueError("tokenizer has neither tokenizer.json nor vocab.json with merges.txt")
    return tokenizer.from_pretrained(folder, subfolder="tokenizer")


def _read_scheduler(name: str, folder: Path) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name)
    if not issubclass(scheduler, diffusers.SchedulerMixin):
        raise TypeError(f"{name} is not a scheduler")
    config = scheduler.from_pretrained(folder, subfolder="scheduler").config
    corrected = {"steps_offset": 1, "clip_sample": False}  # as StableDiffusionPipeline does with old files
    return scheduler.from_config(config, **{key: value for key, value in corrected.items() if key in config})


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps hints, loading bars and lists of unused weights of both libraries off the screen meanwhile."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
