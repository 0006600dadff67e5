"""Reads models, from a folder or the hub, as the family that their model_index.json names."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.flux import Flux
from lightning_prompts.backbones.hub import EMOJI, choose_variant, files_in, find_model, local_file
from lightning_prompts.backbones.pixart import PixArt
from lightning_prompts.backbones.sd3 import StableDiffusion3
from lightning_prompts.backbones.single_file import as_stated, find_configuration, read_header, read_single_file
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_prompts.backbones.towers import Kind, TextTower
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["EMOJI", "FAMILIES", "load_backbone", "quiet"]

FAMILIES: dict[str, type[Backbone]] = {
    pipeline: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt)
    for pipeline in family.pipelines
}
"""The family of each of diffusers' pipelines that can be read."""


def load_backbone(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    offline: bool = False,
    revision: str | None = None,
    vocabulary: Kind | None = None,
    scheduler: str | None = None,
    image_size: int | None = None,
    config: str | None = None,
    variant: str | None = None,
) -> Backbone:
    """Loads a model, on the CPU.

    Weights are read from safetensors only, since pickles can run code. The safety checker is not loaded.

    Args:
        name: `emoji` for the embedded model, a folder, a short name such as `sdxl`, a model on the Hugging Face hub as
            `owner/name`, or a safetensors file of Stable Diffusion 1, 2 or XL in their original layout.
        dtype: Precision of the networks, whatever the files' is.
        offline: Use downloaded files only, as the environment variable HF_HUB_OFFLINE=1 does.
        revision: Branch, tag or commit on the hub.
        vocabulary: Whose tokens are searched, the `clip` or the `t5` encoders'; None for the family's choice.
        scheduler: Class of another scheduler of diffusers; None for the model's own.
        image_size: Height and width, in pixels, of what is drawn; None for what the model was trained on.
        config: The model or folder whose configuration and tokenizers go with a file; None for the first of its family. What the
            file states of its prediction type and noise levels goes before it.
        variant: Which of a folder's or repository's weights are read, such as `fp16`, by components that have it; None for those
            without a variant or, where there are none, for the only one.
    """
    import diffusers

    checkpoint, variants = None, dict[str, str | None]()
    if file := local_file(name):
        if variant:
            raise UserError(f"The model {name!r} is a file, which has no variants; leave out --model.variant.")
        checkpoint = read_header(file)
        folder = find_configuration(checkpoint, config, offline, revision)
    elif config:
        raise UserError(f"The model {name!r} has a configuration and is no file; leave out --model.config.")
    else:
        folder = find_model(name, offline, revision, variant=variant)
        variants = _variants(name, folder, variant)
    family, index = _check(config or name, folder, None if checkpoint else variants)
    part, kind = family.denoises
    towers = []
    with quiet():
        if checkpoint:
            with _unreadable(name, "networks", "fetch it again or give a model that describes it as --model.config"):
                networks = read_single_file(checkpoint, folder, index, set(components(family)), dtype)

        def network(part: str, kind: str) -> Any:
            return networks[part] if checkpoint else _read(folder, part, kind, dtype, variants[part])

        with _unreadable(name, "scheduler"):
            read = _read_scheduler(index["scheduler"][1], folder)
        if checkpoint:
            read = as_stated(read, checkpoint)
        if scheduler:
            read = _replaced(read, scheduler)
        for reads in family.reads:
            if index.get(reads.part, (None, None))[1]:
                with _unreadable(name, reads.tokenizer):
                    tokenizer = _read_tokenizer(folder, reads)
                with _unreadable(name, reads.part):
                    encoder = network(reads.part, reads.network)
                    towers.append(TextTower(tokenizer, encoder, *reads[2:5]))
        with _unreadable(name, part):
            denoiser = network(part, kind)
        with _unreadable(name, "vae"):
            vae = network("vae", "AutoencoderKL")
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        denoiser.to(memory_format=torch.channels_last)  # in which convolutions are a tenth to a fifth faster
    vae.to(memory_format=torch.channels_last)
    if dtype == "float16" and vae.config.get("force_upcast"):  # SDXL's leaves the range of half precision
        vae.float()
    zero_empty = bool(index.get("force_zeros_for_empty_prompt"))
    backbone = family(name, towers, denoiser, vae, read, vocabulary, image_size, zero_empty)
    if name == "emoji":
        backbone.default_steps, backbone.default_guidance = 25, 3.0  # docs/emoji.md
    return backbone


@contextmanager
def _unreadable(name: str, part: str, advice: str = "fetch or write the model again") -> Iterator[None]:
    """Makes a sentence of what the libraries say of a broken component."""
    from safetensors import SafetensorError

    try:
        yield
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .:") or type(error).__name__
        raise UserError(f"The {part} of the model {name!r} cannot be read ({reason}); {advice}.") from error


def _variants(name: str, folder: Path, variant: str | None) -> dict[str, str | None]:
    """Choose the weights of each component, and say what was not asked for."""
    chosen, read = choose_variant(name, files_in(folder), variant)
    if chosen != variant:
        log.info("The model %r has weights as the variant %r alone, which is read.", name, chosen)
    if without := [part for part, own in read.items() if own != chosen]:
        log.info("Of the model %r, %s has no variant %r and is read without one.", name, ", ".join(without), chosen)
    return read


def _check(name: str, folder: Path, weights: Mapping[str, str | None] | None) -> tuple[type[Backbone], dict[str, Any]]:
    """Refuses what is not a supported pipeline in safetensors; gives its family and its index.

    Args:
        name: The model, for messages.
        folder: Where it is.
        weights: The components of which weights were found, by variant; None if the folder needs none.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"The model {name!r} has no model_index.json; give a folder that a diffusers pipeline's `save_pretrained` wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pipeline: str = index["_class_name"]
        family = FAMILIES.get(pipeline)
        parts = components(family) if family else {}
        found = {part: (index.get(part) or (None, None))[1] for part in parts}
        index["scheduler"][1]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"The model_index.json of the model {name!r} is not a pipeline's; fetch or write it again."
        ) from error
    if not family:
        raise UserError(
            f"The model {name!r} is a {pipeline}, and what can be read is {', '.join(FAMILIES)}; choose another."
        )
    optional = {reads.part for reads in family.reads if reads.optional}
    for part, (supported, stem) in parts.items():
        if found[part] is None and part in optional:
            continue
        if found[part] is None:
            raise UserError(
                f"The model {name!r} has no {part}, which every {pipeline} needs; fetch or write the whole model again."
            )
        if found[part] != supported:
            raise UserError(
                f"The {part} of the model {name!r} is a {found[part]}; only {supported} is supported, choose another."
            )
        file = folder / part / f"{stem}.safetensors"
        if weights is None or part in weights:
            continue
        if any(other.suffix in (".bin", ".ckpt") for other in file.parent.glob("*")):
            raise UserError(
                f"The model {name!r} has no {part}/{file.name}, and pickle weights (.bin, .ckpt) are refused because they "
                "can run code; convert it with `save_pretrained(folder, safe_serialization=True)`."
            )
        raise UserError(f"The model {name!r} has no {part}/{file.name}; fetch or write the whole model again.")
    return family, index


def components(family: type[Backbone]) -> dict[str, tuple[str, str]]:
    """The networks of a family: by component its class and the stem of its files."""
    part, kind = family.denoises
    texts = {reads.part: (reads.network, "model") for reads in family.reads}
    return {**texts, part: (kind, "diffusion_pytorch_model"), "vae": ("AutoencoderKL", "diffusion_pytorch_model")}


def _read(folder: Path, part: str, kind: str, dtype: str, variant: str | None) -> Any:
    import diffusers
    import transformers

    ours = {("dtype" if part.startswith("text_encoder") else "torch_dtype"): getattr(torch, dtype)}
    network = getattr(transformers if part.startswith("text_encoder") else diffusers, kind)
    model, info = network.from_pretrained(
        folder, subfolder=part, use_safetensors=True, output_loading_info=True, variant=variant, **ours
    )
    if missing := sorted(info["missing_keys"]):  # the libraries fill them at random and only warn
        raise ValueError(f"it lacks {len(missing)} weights such as {missing[0]}")
    return model


def _read_tokenizer(folder: Path, reads: Reads) -> Any:
    from tokenizers import normalizers
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    part = reads.tokenizer
    files = {path.name for path in (folder / part).glob("*")}
    own = {"spiece.model"} if reads.network == "T5EncoderModel" else {"vocab.json", "merges.txt"}
    if "tokenizer.json" not in files and not own <= files:  # transformers would make an empty one
        raise ValueError(f"it has neither tokenizer.json nor {' with '.join(sorted(own, reverse=True))}")
    kind = T5TokenizerFast if reads.network == "T5EncoderModel" else CLIPTokenizerFast  # transformers 5 has no other
    try:
        tokenizer = kind.from_pretrained(folder, subfolder=part)
    except Exception as error:  # what tokenizers raises of broken files has no class of its own
        raise ValueError(str(error)) from error
    if reads.lower:
        backend = tokenizer.backend_tokenizer
        before = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *before])
    return tokenizer


def _read_scheduler(name: str, folder: Path) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name)
    if not issubclass(scheduler, diffusers.SchedulerMixin):
        raise TypeError(f"{name} is not a scheduler")
    config = scheduler.from_pretrained(folder, subfolder="scheduler").config
    corrected = {"steps_offset": 1, "clip_sample": False}  # as StableDiffusionPipeline does with old files
    return scheduler.from_config(config, **{key: value for key, value in corrected.items() if key in config})


def _replaced(scheduler: Any, name: str) -> Any:
    """Another scheduler with the same noise levels."""
    import diffusers

    kind = getattr(diffusers, name, None)
    known = [
        other
        for other in dir(diffusers)
        if other.endswith("Scheduler")
        and not other.startswith("Flax")
        and ("FlowMatch" in other) == ("FlowMatch" in type(scheduler).__name__)
    ]
    if name not in known or kind is None:
        raise UserError(
            f"The scheduler {name!r} does not fit this model, whose own is {type(scheduler).__name__}; use one of diffusers' such as "
            f"{', '.join(other for other in known if other in COMMON)}."
        )
    taken = inspect.signature(kind).parameters
    return kind.from_config({key: value for key, value in scheduler.config.items() if key in taken})


COMMON = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


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
