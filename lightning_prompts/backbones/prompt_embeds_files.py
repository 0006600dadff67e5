"""Read and write files of encoded prompts, under the names of diffusers' pipelines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.embedding_files import clip_skip_metadata
from lightning_prompts.errors import UserError, shortened

NAMES = ("prompt_embeds", "negative_prompt_embeds")


def pack_prompt_embeds(embeds: Mapping[str, Tensor], prompts: Sequence[str], backbone: Backbone) -> bytes:
    """Return the content of a safetensors file of encoded prompts, under the names of diffusers' pipelines.

    Args:
        embeds: Encoded prompts by key, float32 (S, R, D): with S = 1 the prompt, with S = 2 also the negative prompt.
        prompts: The user's text for each of them.
        backbone: The model that they were made for.
    """
    tensors: dict[str, Tensor] = {}
    for key, both in embeds.items():
        for name, embed in zip(NAMES, both.detach().float().cpu(), strict=False):
            hidden, pooled = backbone.split(embed)
            tensors[f"{key}.{name}"] = hidden
            if pooled is not None:
                tensors[f"{key}.{_pooled(name)}"] = pooled
            if any(encoder.spec.mask_padding for encoder in backbone.text_encoders):
                tensors[f"{key}.{_mask(name)}"] = (hidden != 0).any(-1).long()
    shape = list(next(iter(embeds.values())).shape[1:])
    metadata = {
        "format": "pt",
        "family": type(backbone).__name__,
        "backbone": backbone.name,
        "shape": json.dumps(shape),
        "base_prompts": json.dumps(dict(zip(embeds, prompts, strict=True))),
        **clip_skip_metadata(backbone),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def read_prompt_embeds(path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """Read encoded prompts by key, (S, R, D) each, from a file made by `pack_prompt_embeds`.

    Files with the outputs of `encode_prompt` of a diffusers pipeline are also read, with the names `prompt_embeds` (B,
    L, D), `negative_prompt_embeds`, `pooled_prompt_embeds`, `prompt_attention_mask` and so on; the keys are then
    numbers.

    Args:
        path: The file.
        backbone: The model to use them in.
        shape: (R, D) of the model's encoded prompts.

    Raises:
        UserError: The file does not exist, or was made for another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The file {path} cannot be read as embeddings ({error}); give a file that `fit` has written."
        ) from error
    if "family" not in metadata:
        tensors = _numbered(tensors, path, backbone, shape)
    elif (made_for := (metadata["family"], metadata.get("shape"))) != (
        type(backbone).__name__,
        json.dumps(list(shape)),
    ):
        raise UserError(
            f"The embeddings in {path} were made for {shortened(metadata.get('backbone', 'a model'))} "
            f"({shortened(made_for[0])}, {shortened(str(made_for[1]))}) and the model "
            f"{backbone.name} is {type(backbone).__name__}, {list(shape)}; use the model that they were made for."
        )
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        names = [name for name in NAMES if f"{key}.{name}" in tensors]
        rows = [tensors[f"{key}.{name}"] for name in names]
        try:
            if backbone.pooled_width:
                rows = [
                    backbone.join(x, tensors[f"{key}.{_pooled(name)}"]) for x, name in zip(rows, names, strict=True)
                ]
            found[key] = torch.stack(rows)
        except (LookupError, RuntimeError) as error:
            raise _incomplete(path) from error
        if found[key].shape[1:] != tuple(shape):
            raise _incomplete(path)
    return found


def _incomplete(path: Path) -> UserError:
    return UserError(
        f"The encoded prompts in {path} are incomplete or have other shapes than its metadata states; give another "
        "file."
    )


def _numbered(tensors: Mapping[str, Tensor], path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """Convert a pipeline's output for B prompts: number the prompts and set padding to zeros."""
    wanted = backbone.split(torch.empty(*shape))[0].shape
    found: dict[str, Tensor] = {}
    for name in NAMES:
        if name not in tensors:
            continue
        hidden = tensors[name].reshape(-1, *tensors[name].shape[-2:])
        if hidden.shape[1:] != wanted:
            raise UserError(
                f"The file {path} holds {name} of {list(hidden.shape[1:])}, and the model {backbone.name!r} takes "
                f"{list(wanted)}; give embeddings for this model."
            )
        if (mask := tensors.get(_mask(name))) is not None:
            hidden = hidden * mask.reshape(len(hidden), -1, 1)
        if backbone.pooled_width and _pooled(name) not in tensors:
            raise UserError(f"The file {path} has no {_pooled(name)}, which the model {backbone.name!r} needs; add it.")
        for i, rows in enumerate(hidden):
            found[f"{i}.{name}"] = rows
            if backbone.pooled_width:
                found[f"{i}.{_pooled(name)}"] = tensors[_pooled(name)].reshape(len(hidden), -1)[i]
    if NAMES[0] not in tensors:
        raise UserError(
            f"The file {path} holds no encoded prompt; give a file that `fit` has written, or one with prompt_embeds."
        )
    return found


def base_prompts(path: Path) -> dict[str, str]:
    """Return the user's texts for the encoded prompts of a file, by key; empty if the file has none."""
    with safe_open(path, "pt") as file:
        try:
            found = json.loads((file.metadata() or {}).get("base_prompts", "{}"))
        except ValueError as error:
            raise UserError(f"The metadata of {path} is damaged; give a file that `fit` has written.") from error
    return {key: str(prompt) for key, prompt in found.items()} if isinstance(found, dict) else {}


def _mask(name: str) -> str:
    """Return diffusers' name of the padding mask: `prompt_attention_mask`, `negative_prompt_attention_mask`."""
    return name.replace("embeds", "attention_mask")


def _pooled(name: str) -> str:
    """Return diffusers' name of the pooled vector: `pooled_prompt_embeds`, `negative_pooled_prompt_embeds`."""
    return name.replace("prompt_embeds", "pooled_prompt_embeds")
