"""Load models from a folder or the hub, as the family that their model_index.json names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

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
from lightning_prompts.backbones.hub import EMOJI, find_model, local_file, local_folder, variants_in
from lightning_prompts.backbones.metadata import read_metadata
from lightning_prompts.backbones.registry import families
from lightning_prompts.backbones.schedulers import replacement
from lightning_prompts.backbones.single_file import (
    Checkpoint,
    as_stated,
    find_configuration,
    read_header,
    read_single_file,
)
from lightning_prompts.backbones.text_encoders import TextEncoder
from lightning_prompts.errors import UserError
from lightning_prompts.python_values import check_arguments, plain

log = logging.getLogger(__name__)

__all__ = ["EMOJI", "load_backbone", "quiet"]


def load_backbone(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    offline: bool = False,
    revision: str | None = None,
    vocabulary: str | None = None,
    scheduler: str | None = None,
    image_size: int | None = None,
    config: str | None = None,
    variant: str | None = None,
    clip_skip: int | None = None,
) -> Backbone:
    """Load a model on the CPU.

    Weights are read from safetensors only, since pickles can run code. The safety checker is not loaded.

    Args:
        name: `emoji` for the embedded model, a folder, a short name such as `sdxl`, a model on the Hugging Face hub as
            `owner/name`, or a safetensors file of Stable Diffusion 1, 2 or XL in their original layout.
        dtype: Precision of the networks, whatever that of the files.
        offline: Use downloaded files only, as the environment variable HF_HUB_OFFLINE=1 does.
        revision: Branch, tag or commit on the hub.
        vocabulary: Kind of the text encoders whose tokens are searched, such as `t5`; None for the family's default.
        scheduler: Class name of another diffusers scheduler; None for the model's own.
        image_size: Height and width of generated images, in pixels; None for the size that the model was trained on.
        config: Model or folder that supplies the configuration and tokenizers of a single file; None for the usual one
            of its family. A prediction type and noise levels that the file states take precedence.
        variant: Weights to read, such as `fp16`, where a component has them; None for weights without a variant or, if
            there are none, the only variant.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts, as in diffusers' pipelines;
            negative prompts use all layers. None for all layers.
    """
    name = plain("name", name)
    check_arguments(load_backbone, locals())
    folder, checkpoint, variants = _find(name, offline, revision, config, variant)
    family, index = _check(config or name, folder, None if checkpoint else variants)
    metadata = read_metadata(name, local_folder(name))
    pipeline: str = index["_class_name"]
    check_clip_skip(family, pipeline, name, clip_skip)
    check_vocabulary(family, name, vocabulary)
    with quiet():
        if checkpoint:
            with _unreadable(
                name, "networks", "download it again, or give the model that describes it as --model.backbone.config"
            ):
                networks = read_single_file(checkpoint, folder, index, set(family.components()), dtype)

        def network(component: str, **changed: Any) -> Any:
            if checkpoint:
                return networks[component]
            kind, _ = family.components()[component]
            return _read(folder, component, kind, dtype, variants[component], **changed)

        with _unreadable(name, "scheduler"):
            own = prepared_scheduler(family, pipeline, _read_scheduler(index["scheduler"][1], folder))
        own = as_stated(own, checkpoint) if checkpoint else own
        other = replacement(own, scheduler, name) if scheduler else None
        components = Components(*_read_networks(name, family, index, folder, network), own, other)
    backbone = assemble(family, name, components, index, vocabulary, image_size, clip_skip)
    backbone.metadata, backbone.offline = metadata, offline
    if metadata.num_inference_steps is not None:
        backbone.default_steps = metadata.num_inference_steps
    if metadata.guidance_scale is not None:
        backbone.default_guidance = metadata.guidance_scale
    return backbone


def _find(
    name: str, offline: bool, revision: str | None, config: str | None, variant: str | None
) -> tuple[Path, Checkpoint | None, dict[str, str | None]]:
    """Find a model's files, see `load_backbone`.

    Returns:
        The folder of its configuration, the file if it is a single file, and the variant of each component's weights.
    """
    if file := local_file(name):
        if variant:
            raise UserError(f"The model {name!r} is a file, which has no variants; leave out --model.backbone.variant.")
        checkpoint = read_header(file)
        return find_configuration(checkpoint, config, offline, revision), checkpoint, {}
    if config:
        raise UserError(
            f"The model {name!r} is not a single file and has its own configuration; leave out --model.backbone.config."
        )
    folder = find_model(name, offline, revision, variant=variant)
    return folder, None, _variants(name, folder, variant)


def _read_networks(
    name: str, family: type[Backbone], index: Mapping[str, Any], folder: Path, network: Callable[..., Any]
) -> tuple[list[TextEncoder], Any, Any]:
    """Read text encoders, denoiser and autoencoder.

    Args:
        name: The model, for messages.
        family: Its family.
        index: Content of its model_index.json.
        folder: Folder of its configuration and tokenizers.
        network: Returns a component's network, given its name and changed values of its config.
    """
    texts = []
    for spec in family.text_encoder_specs:
        if index.get(spec.component, (None, None))[1]:
            with _unreadable(name, spec.tokenizer):
                tokenizer = read_tokenizer(folder, spec)
            with _unreadable(name, spec.component):
                texts.append(TextEncoder(tokenizer, network(spec.component), spec))
    component, _ = family.denoiser_spec
    with _unreadable(name, component):
        denoiser = network(component, **_size_of_positions(folder / component, name))
        family.correct_denoiser(index["_class_name"], denoiser)
    with _unreadable(name, "vae"):
        return texts, denoiser, network("vae")


@contextmanager
def _unreadable(name: str, part: str, advice: str = "download or save the model again") -> Iterator[None]:
    """Turn the libraries' errors about a broken component into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .:") or type(error).__name__
        raise UserError(f"The {part} of the model {name!r} cannot be read ({reason}); {advice}.") from error


def _variants(name: str, folder: Path, variant: str | None) -> dict[str, str | None]:
    """Choose the weights of each component; log the components that lack the variant."""
    chosen, read = variants_in(name, folder, variant)
    if without := [part for part, own in read.items() if own != chosen]:
        log.info("The model %r has no variant %r of %s; reading weights without one.", name, chosen, ", ".join(without))
    return read


def _check(name: str, folder: Path, weights: Mapping[str, str | None] | None) -> tuple[type[Backbone], dict[str, Any]]:
    """Refuse anything but a supported pipeline in safetensors; return its family and its index.

    Args:
        name: The model, for messages.
        folder: Its folder.
        weights: The variant of each component whose weights were found; None if the folder needs no weights.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"The model {name!r} has no model_index.json; give a folder written by the `save_pretrained` of a "
            "diffusers pipeline."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pipeline: str = index["_class_name"]
        family = families().get(pipeline)
        parts = family.components() if family else {}
        found = {part: (index.get(part) or (None, None))[1] for part in parts}
        index["scheduler"][1]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The model_index.json of the model {name!r} does not describe a pipeline; download or save the model "
            "again."
        ) from error
    if not family:
        raise UserError(
            f"The model {name!r} is a {pipeline}; only {', '.join(families())} are supported, so choose another model."
        )
    optional = {spec.component for spec in family.text_encoder_specs if spec.optional}
    for part, (supported, stem) in parts.items():
        if found[part] is None and part in optional:
            continue
        if found[part] is None:
            raise UserError(
                f"The model {name!r} has no {part}, which every {pipeline} needs; download or save the whole model "
                "again."
            )
        if found[part] != supported:
            raise UserError(
                f"The {part} of the model {name!r} is a {found[part]}; only {supported} is supported, so choose "
                "another model."
            )
        file = folder / part / f"{stem}.safetensors"
        if weights is None or part in weights:
            continue
        if any(other.suffix in (".bin", ".ckpt") for other in file.parent.glob("*")):
            raise UserError(
                f"The model {name!r} has no {part}/{file.name}, and pickle weights (.bin, .ckpt) are refused because "
                "they can run code; convert it with `save_pretrained(folder, safe_serialization=True)`."
            )
        raise UserError(f"The model {name!r} has no {part}/{file.name}; download or save the whole model again.")
    return family, index


def _read(folder: Path, part: str, kind: str, dtype: str, variant: str | None, **changed: Any) -> Any:
    """Load a network, with `changed` values of its config."""
    import diffusers
    import transformers

    ours = {("dtype" if part.startswith("text_encoder") else "torch_dtype"): getattr(torch, dtype)}
    network = getattr(transformers if part.startswith("text_encoder") else diffusers, kind)
    model, info = network.from_pretrained(
        folder, subfolder=part, use_safetensors=True, output_loading_info=True, variant=variant, **ours, **changed
    )
    if missing := sorted(info["missing_keys"]):  # the libraries initialize them at random and only warn
        raise ValueError(f"it lacks weights such as {missing[0]}, {len(missing)} in all")
    return model


def _read_scheduler(name: str, folder: Path) -> Any:
    """Load a model's own scheduler."""
    import diffusers

    kind = getattr(diffusers, name)
    if not issubclass(kind, diffusers.SchedulerMixin):
        raise TypeError(f"{name} is not a scheduler")
    return kind.from_pretrained(folder, subfolder="scheduler")


def _size_of_positions(part: Path, name: str) -> dict[str, int]:
    """Return a transformer's `sample_size` as a number if its config has a list, which diffusers cannot read."""
    size = json.loads((part / "config.json").read_text(encoding="utf-8")).get("sample_size")
    if part.name != "transformer" or not isinstance(size, list):
        return {}
    if len(set(size)) > 1:
        raise UserError(
            f"The model {name!r} was trained on {' x '.join(map(str, size))} latents, but only square images are "
            "supported; choose another model."
        )
    return {"sample_size": int(size[0])}
