"""Files of encoded prompts: what they hold, and for which model they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError

SIDES = ("prompt_embeds", "negative_prompt_embeds")


def pack_prompt_embeds(embeds: Mapping[str, Tensor], prompts: Sequence[str], backbone: Backbone) -> bytes:
    """The content of a safetensors file of encoded prompts, in diffusers' names.

    Args:
        embeds: By key, float32 (S, L, D): with S 1 what the denoiser is told, with 2 also what it is led away from.
        prompts: What a person has written for each.
        backbone: The model that they were made for.
    """
    tensors = {
        f"{key}.{side}": embed.detach().float().cpu().contiguous()
        for key, sides in embeds.items()
        for side, embed in zip(SIDES, sides, strict=False)
    }
    shape = list(next(iter(embeds.values())).shape[1:])
    metadata = {
        "format": "pt",
        "family": type(backbone).__name__,
        "backbone": backbone.name,
        "shape": json.dumps(shape),
        "base_prompts": json.dumps(dict(zip(embeds, prompts, strict=True))),
    }
    return save(tensors, metadata)


def read_prompt_embeds(path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """Encoded prompts by key, (S, L, D) each, of a file that `pack_prompt_embeds` has made.

    Args:
        path: The file.
        backbone: The model that is to be told.
        shape: (L, D) of what it is told.

    Raises:
        UserError: There is no such file, or it was made for another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made_for = metadata["family"], json.loads(metadata["shape"])
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The file {path} cannot be read as embeddings ({error}); give one that `fit` has written."
        ) from error
    except (LookupError, ValueError) as error:
        raise UserError(
            f"The file {path} does not say which model it was made for; give one that `fit` has written."
        ) from error
    here = type(backbone).__name__, list(shape)
    if made_for != here:
        raise UserError(
            f"The embeddings in {path} were made for {metadata.get('backbone')} ({made_for[0]}, {made_for[1]}) and the model "
            f"{backbone.name} is {here[0]}, {here[1]}; give the model that they were made for."
        )
    keys = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        key: torch.stack([tensors[f"{key}.{side}"] for side in SIDES if f"{key}.{side}" in tensors]) for key in keys
    }
