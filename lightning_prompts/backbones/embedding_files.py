"""Read and write files of token embeddings, as textual inversion finds them, in the layouts of other tools."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.registry import known_embedding_keys
from lightning_prompts.errors import UserError, listed, shortened

log = logging.getLogger(__name__)

FOREIGN = {
    "the weights of a LoRA": r"\blora_(?:up|down|A|B|mid)\b|\.lora[._]|\b(?:hada|lokr)_w\d",
    "the state of an optimizer": r"\b(?:exp_avg|exp_avg_sq|momentum_buffer|optimizer|param_groups)\b",
    "the weights of a model": r"\.(?:weight|bias)$|^state_dict$",
}
"""Contents of files that are not embeddings, by patterns of the names in them."""

WIDTHS = {
    768: "Stable Diffusion 1 (clip_l)",
    1024: "Stable Diffusion 2",
    1280: "the second encoder of SDXL and SD3 (clip_g)",
    4096: "the T5 of SD3, FLUX and PixArt (t5xxl)",
}


def embedding_keys(backbone: Backbone) -> list[str]:
    """Return the names that other tools give to the text encoders whose tokens are searched."""
    return [encoder.spec.embedding_key for encoder in backbone.vocabulary.text_encoders]


def pack_embedding(embedding: Tensor, backbone: Backbone, token: str) -> bytes:
    """Return the content of a safetensors file that diffusers, AUTOMATIC1111 and ComfyUI read.

    For a model whose only text encoder is a CLIP, the file has one tensor, named like the token. Otherwise it has one
    tensor per searched encoder, `clip_l`, `clip_g` or `t5xxl`; diffusers loads them one at a time.

    Args:
        embedding: Embedding (M, D) in the searched vocabulary, see `Vocabulary`.
        backbone: The model that it was found for.
        token: The word that stands for it in a prompt.
    """
    parts = [part.detach().float().cpu().contiguous() for part in backbone.vocabulary.split(embedding)]
    only_clip = [encoder.kind for encoder in backbone.text_encoders] == ["clip"]
    names = [token] if only_clip else embedding_keys(backbone)
    metadata = {"format": "pt", "family": type(backbone).__name__, "backbone": backbone.name, "token": token}
    metadata |= clip_skip_metadata(backbone)
    return save(dict(zip(names, parts, strict=True)), metadata)


def split_name(path: str | Path) -> tuple[Path, str | None]:
    """Split `file#name` into the file and the embedding's name, None for a text without one."""
    text = str(path)
    if not os.path.isfile(text):  # unlike pathlib's `is_file`, this takes a text of any length
        for position in (match.start() for match in re.finditer("#", text)):
            if os.path.isfile(text[:position]):
                return Path(text[:position]), text[position + 1 :]
    return Path(text), None


def clip_skip_metadata(backbone: Backbone) -> dict[str, str]:
    """Return metadata with the number of skipped layers, empty if there are none."""
    return {"clip_skip": str(backbone.clip_skip)} if backbone.clip_skip else {}


def read_embedding(path: str | Path, backbone: Backbone, pickle: bool = False) -> Tensor:
    """Read an embedding (M, D) for the searched vocabulary from a file in any usual layout.

    The layouts are diffusers', AUTOMATIC1111's `string_to_param`, kohya's `emb_params`, `clip_l`, `clip_g` and `t5xxl`
    (or `t5`), the same bundled with a LoRA, and bare tensors. A single row may be a vector. Embeddings for text
    encoders that are not searched are ignored, and a log line says so.

    Args:
        path: The file, or `file#name` for one of several embeddings. The layout is detected from the content, not from
            the name.
        backbone: The model to use the embedding in.
        pickle: Also read pickles that hold only tensors, including those in an `nn.ParameterDict`.

    Raises:
        UserError: The file has none of these layouts, or is for another model.
    """
    path, name = split_name(path)
    parts = _chosen(_embeddings(_load(path, pickle), path), name, path)
    names, widths = embedding_keys(backbone), backbone.vocabulary.widths
    if len(names) == 1 and list(parts) == [""]:
        parts = {names[0]: parts[""]}
    if missing := [name for name in names if name not in parts]:
        held = " and ".join(f"{name or 'an embedding'} of width {x.shape[1]}" for name, x in parts.items())
        raise UserError(
            f"The file {path} holds {held}{_for(parts)}, and the model {backbone.name!r} needs "
            f"{' and '.join(missing)}; give an embedding for this model."
        )
    for name, width in zip(names, widths, strict=True):
        if parts[name].shape[1] != width:
            raise UserError(
                f"The embedding in {path} is {parts[name].shape[1]} wide{_for({name: parts[name]})}, and the model "
                f"{backbone.name!r} takes {width}; give an embedding for this model."
            )
    if len({len(parts[name]) for name in names}) > 1:
        raise UserError(f"The file {path} has different numbers of rows for its text encoders; give another file.")
    if unused := [key for key in dict.fromkeys(known_embedding_keys().values()) if key in parts and key not in names]:
        ignored, searched = " and ".join(unused), " and ".join(names)
        log.info(
            "Ignoring the embedding for %s in %r, as the search uses the tokens of %s.", ignored, str(path), searched
        )
    embedding = torch.cat([parts[name] for name in names], dim=1)
    if not len(embedding) or not embedding.isfinite().all():
        raise UserError(f"The embedding in {path} has no rows, or numbers that are not finite; give another file.")
    return embedding


def _for(parts: Mapping[str, Tensor]) -> str:
    """Name the models that an embedding's width belongs to, if known."""
    known = [WIDTHS[part.shape[1]] for part in parts.values() if part.shape[1] in WIDTHS]
    return f", which is for {known[0]}" if len(known) == 1 else ""


class _ParameterDict:
    """Stand in for `nn.ParameterDict` in a pickle, so that no module's code runs; `_parameters` has the tensors."""


def _load(path: Path, pickle: bool) -> Any:
    """Load a file by its content, whatever its name."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the header of safetensors, after its length
            with safe_open(path, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        if not start.startswith((b"PK", b"\x80")):
            raise UserError(f"The file {path} is not an embedding; give a safetensors file.")
        if not pickle:
            raise UserError(
                f"The file {path} is a pickle, which can run code, and is not read; give a safetensors file or, if you "
                "trust this one, allow it with --model.allow_pickle true (in Python, pickle=True)."
            )
        stand_in: Any = (_ParameterDict, "torch.nn.modules.container.ParameterDict")
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals([stand_in]),
        ):  # given a path, torch would consider its name
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror or error}); give another file.") from error
    except UnpicklingError as error:
        raise UserError(
            f"The file {path} is broken or holds more than tensors, such as a module saved by torch before 1.6, and is "
            "not unpickled because it could run code; give a safetensors file."
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and safetensors have their own classes
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .")
        raise UserError(
            f"The file {path} cannot be read as an embedding ({shortened(reason, 100)}); download or save it again."
        ) from error


def _embeddings(loaded: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """Return a file's embeddings by name, each as tensors by text encoder, whose name is "" if the file has none."""
    if isinstance(loaded, Tensor):
        loaded = {"": loaded}
    if not isinstance(loaded, Mapping):
        raise UserError(f"The file {path} holds no embedding; give an embedding file.")
    if "string_to_param" in loaded:
        loaded = loaded["string_to_param"]
        loaded = vars(loaded).get("_parameters", {}) if isinstance(loaded, _ParameterDict) else loaded
        rows = _rows(loaded)
        return {name: {"": tensor} for name, tensor in rows.items()}
    rows, found, keys = _rows(loaded), dict[str, dict[str, Tensor]](), known_embedding_keys()
    # An embedding bundled with a LoRA: its name and its text encoder.
    bundled = rf"bundle_emb\.(.*)\.(?:string_to_param\.\*|({'|'.join(map(re.escape, keys))}))"
    for name, tensor in rows.items():
        if match := re.fullmatch(bundled, name, re.DOTALL):
            found.setdefault(match[1], {})[keys[match[2]] if match[2] else ""] = tensor
    if not found and (parts := {keys[name]: tensor for name, tensor in rows.items() if name in keys}):
        found = {"": parts}
    if not found and "emb_params" in rows:
        found = {"": {"": rows["emb_params"]}}
    if found:
        read = sum(len(parts) for parts in found.values())
        if len(loaded) > read:
            log.info("Ignoring %d other entries of the file %r.", len(loaded) - read, str(path))
        return found
    for kind, pattern in FOREIGN.items():
        if any(isinstance(name, str) and re.search(pattern, name) for name in loaded):
            raise UserError(f"The file {path} holds {kind}, not an embedding; give an embedding file.")
    return {name: {"": tensor} for name, tensor in rows.items()}


def _rows(loaded: Any) -> dict[str, Tensor]:
    """Return the tensors that can be embeddings, by name, as float32 (M, D)."""
    tensors = {name: x for name, x in loaded.items() if isinstance(x, Tensor)} if isinstance(loaded, Mapping) else {}
    return {
        str(name): x.detach().reshape(-1, x.shape[-1]).float()
        for name, x in tensors.items()
        if x.is_floating_point() and x.dim() and x.shape[-1] and all(length == 1 for length in x.shape[:-2])
    }


def _chosen(embeddings: Mapping[str, dict[str, Tensor]], name: str | None, path: Path) -> dict[str, Tensor]:
    """Return the only embedding of a file, or the one with a name."""
    if not embeddings:
        raise UserError(f"The file {path} holds no embedding; give an embedding file.")
    if name is None and len(embeddings) == 1:
        return next(iter(embeddings.values()))
    if name in embeddings and name is not None:
        return embeddings[name]
    if list(embeddings) == [""]:
        raise UserError(f"The file {path} holds one embedding, which has no name; leave out #{shortened(str(name))}.")
    example = next(iter(embeddings))
    wanted = f"no embedding {shortened(name)!r}, only" if name is not None else f"{len(embeddings)} embeddings,"
    raise UserError(
        f"The file {path} has {wanted} {listed(embeddings)}; name one of them, such as '{path}#{shortened(example)}'."
    )
