"""Backbones of loaded diffusers pipelines."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prompts.backbones.assembly import (
    Components,
    assemble,
    check_clip_skip,
    check_vocabulary,
    prepared_scheduler,
    quiet,
    read_tokenizer,
)
from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.registry import families
from lightning_prompts.backbones.schedulers import replacement
from lightning_prompts.backbones.text_encoders import TextEncoder, TextEncoderSpec
from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

T = TypeVar("T")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_backbone(value: T) -> T | Backbone:
    """Return the backbone of a diffusers pipeline, and any other value unchanged."""
    diffusers = sys.modules.get("diffusers")  # a pipeline cannot exist before this import, which takes seconds
    is_pipeline = diffusers is not None and isinstance(value, diffusers.DiffusionPipeline)
    return Backbone.from_pipeline(value) if is_pipeline else value


def from_pipeline(
    cls: type[Backbone],
    pipeline: DiffusionPipeline,
    vocabulary: str | None,
    scheduler: str | None,
    image_size: int | None,
    clip_skip: int | None,
) -> Backbone:
    """Return the backbone of a loaded diffusers pipeline, see `Backbone.from_pipeline`.

    The pipeline stays unchanged. The backbone has copies of its networks whose parameters share memory with it:
    freezing or moving the copies, or checkpointing their activations, does not affect the pipeline. Only convolutions
    that are not in `channels_last` are copied to this format, as `load_backbone` does, and the autoencoder if it has to
    be float32. Scheduler and tokenizers are rebuilt as they would be from the saved pipeline.

    Raises:
        UserError: The pipeline's class is unknown, or the pipeline is incomplete, quantized or offloaded.
    """
    import diffusers

    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise UserError(f"from_pipeline takes a loaded diffusers pipeline, got {type(pipeline).__name__}.")
    kind = type(pipeline).__name__
    family = families().get(kind) if inspect.isabstract(cls) else cls if kind in cls.pipelines else None
    if family is None:
        known = families() if inspect.isabstract(cls) else cls.pipelines
        raise UserError(f"The pipeline is a {kind}, and only {', '.join(known)} are supported; give one of these.")
    name = str(pipeline.name_or_path or kind)
    check_clip_skip(family, kind, name, clip_skip)
    check_vocabulary(family, name, vocabulary)
    networks = _networks(family, pipeline)
    with quiet():
        try:
            own = prepared_scheduler(family, kind, _new_scheduler(pipeline))
        except TypeError as error:
            raise UserError(f"The {kind} cannot be used, as {error}; choose another scheduler.") from error
        other = replacement(own, scheduler, name) if scheduler else None
        copies = {component: shared_copy(network) for component, network in networks.items()}
        texts = [
            TextEncoder(_tokenizer(pipeline, spec), copies[spec.component], spec)
            for spec in family.text_encoder_specs
            if spec.component in copies
        ]
    denoiser = copies[family.denoiser_spec[0]]
    family.correct_denoiser(kind, denoiser)
    components = Components(texts, denoiser, copies["vae"], own, other)
    backbone = assemble(family, name, components, pipeline.config, vocabulary, image_size, clip_skip)
    return backbone.to(device=next(denoiser.parameters()).device)


def _networks(family: type[Backbone], pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by component; refuse those that cannot be shared."""
    kind = type(pipeline).__name__
    optional = {spec.component for spec in family.text_encoder_specs if spec.optional}
    found: dict[str, Any] = {}
    for component, (supported, _) in family.components().items():
        network: Any = getattr(pipeline, component, None)
        network = getattr(network, "_orig_mod", network)  # of a module that torch.compile returned
        if network is None and component in optional:
            continue
        if type(network).__name__ != supported:
            actual = "missing" if network is None else f"a {type(network).__name__}"
            raise UserError(
                f"The {component} of the {kind} is {actual}, and only {supported} is supported; give a complete "
                "pipeline."
            )
        _check_shareable(component, network, kind)
        found[component] = network
    return found


def _check_shareable(component: str, network: Any, kind: str) -> None:
    """Refuse a network that is quantized, offloaded or patched, or needs an image as input."""
    quantized = getattr(network, "is_quantized", False) or getattr(network, "hf_quantizer", None) is not None
    if quantized or any(type(p) is not nn.Parameter or p.dtype not in FLOATS for p in network.parameters()):
        raise UserError(
            f"The {component} of the {kind} is quantized, which is not supported; load it in float32, bfloat16 or "
            "float16."
        )
    if getattr(network.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise UserError(f"The {component} of the {kind} has an IP-Adapter, which is not supported; unload it.")
    if any(tensor.is_meta for tensor in network.parameters()) or any(map(_is_patched, network.modules())):
        raise UserError(
            f"The {component} of the {kind} is offloaded or has other hooks that replace its `forward`, which is not "
            "supported; load the pipeline without them, and call `save_memory` on the backbone to offload it."
        )


def _is_patched(module: nn.Module) -> bool:
    """Return whether `forward` is replaced on the instance, as hooks of accelerate and diffusers do."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def shared_copy(network: nn.Module) -> nn.Module:
    """Copy a network, sharing the memory of its parameters and buffers; the copied parameters require no gradient."""
    memo: dict[int, Tensor] = {id(buffer): buffer.detach() for buffer in network.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def _new_scheduler(pipeline: Any) -> Any:
    """Return a new scheduler with the config of a pipeline's."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


def _tokenizer(pipeline: Any, spec: TextEncoderSpec) -> Any:
    """Read a pipeline's tokenizer again as `load_backbone` does: a fast one that shares nothing with the pipeline's."""
    with TemporaryDirectory() as folder:
        getattr(pipeline, spec.tokenizer).save_pretrained(Path(folder) / spec.tokenizer)
        return read_tokenizer(Path(folder), spec)
