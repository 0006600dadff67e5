"""Read and write files of token embeddings and encoded prompts that other tools use; apply embeddings in a diffusers pipeline."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError, listed, shortened

log = logging.getLogger(__name__)

SIDES = ("prompt_embeds", "negative_prompt_embeds")
ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""Names of the text encoders in embedding files of AUTOMATIC1111 and ComfyUI."""
ENCODER_NAMES = {**{name: name for name in ENCODERS}, "t5": "t5xxl", "t5_xxl": "t5xxl"}
"""Those names by all spellings that files use."""
BUNDLED = rf"bundle_emb\.(.*)\.(?:string_to_param\.\*|({'|'.join(ENCODER_NAMES)}))"
"""Pattern of a tensor's name in an embedding bundled with a LoRA: the embedding's name and its text encoder."""

FOREIGN = {
    "the weights of a LoRA": r"\blora_(?:up|down|A|B|mid)\b|\.lora[._]|\b(?:hada|lokr)_w\d",
    "the state of an optimizer": r"\b(?:exp_avg|exp_avg_sq|momentum_buffer|optimizer|param_groups)\b",
    "the weights of a model": r"\.(?:weight|bias)$|^state_dict$",
}
"""What a file holds if it is not an embedding, by patterns of the names in it."""

WIDTHS = {
    768: "Stable Diffusion 1 (clip_l)",
    1024: "Stable Diffusion 2",
    1280: "the second encoder of SDXL and SD3 (clip_g)",
    4096: "the T5 of SD3, FLUX and PixArt (t5xxl)",
}


# --- embeddings of tokens, as textual inversion finds them


def encoder_names(backbone: Backbone) -> list[str]:
    """Return the names that other tools give to the text encoders whose tokens are searched."""
    if backbone.vocabulary.towers[0].kind == "t5":
        return ["t5xxl"]
    return list(ENCODERS[: len(backbone.vocabulary.towers)])


def pack_embedding(embedding: Tensor, backbone: Backbone, token: str) -> bytes:
    """Return the content of a safetensors file that diffusers, AUTOMATIC1111 and ComfyUI read.

    For a model whose only text encoder is a CLIP, the file has one tensor, named like the token. Otherwise it has one tensor per
    searched encoder, `clip_l`, `clip_g` or `t5xxl`; diffusers loads them one at a time.

    Args:
        embedding: Embedding (M, D) in the searched vocabulary, see `Vocabulary`.
        backbone: The model that it was found for.
        token: The word that stands for it in a prompt.
    """
    parts = [part.detach().float().cpu().contiguous() for part in backbone.vocabulary.split(embedding)]
    names = [token] if len(backbone.towers) == 1 and backbone.towers[0].kind == "clip" else encoder_names(backbone)
    metadata = {"format": "pt", "family": type(backbone).__name__, "backbone": backbone.name, "token": token}
    metadata |= _clip_skip(backbone)
    return save(dict(zip(names, parts, strict=True)), metadata)


def split_name(path: str | Path) -> tuple[Path, str | None]:
    """Split `file#name` into the file and the embedding's name; the name is None if the whole text is a file or there is none."""
    text = str(path)
    if not os.path.isfile(text):  # unlike pathlib's, this takes a text of any length
        for place in (match.start() for match in re.finditer("#", text)):
            if os.path.isfile(text[:place]):
                return Path(text[:place]), text[place + 1 :]
    return Path(text), None


def _clip_skip(backbone: Backbone) -> dict[str, str]:
    """Return metadata with the number of skipped layers, empty if there are none."""
    return {"clip_skip": str(backbone.clip_skip)} if backbone.clip_skip else {}


def read_embedding(path: str | Path, backbone: Backbone, pickle: bool = False) -> Tensor:
    """Read an embedding (M, D) for the searched vocabulary from a file in any usual layout.

    The layouts are diffusers', AUTOMATIC1111's `string_to_param`, kohya's `emb_params`, `clip_l`, `clip_g` and `t5xxl` (or `t5`),
    the same bundled with a LoRA, and bare tensors. A single row may be a vector. Embeddings for text encoders that are not searched
    are ignored, and a log line says so.

    Args:
        path: The file, or `file#name` for one of several embeddings. The layout is detected from the content, not from the name.
        backbone: The model to use the embedding in.
        pickle: Also read pickles that hold only tensors, including those in an `nn.ParameterDict`.

    Raises:
        UserError: The file has none of these layouts, or is for another model.
    """
    path, name = split_name(path)
    parts = _chosen(_embeddings(_load(path, pickle), path), name, path)
    names, widths = encoder_names(backbone), backbone.vocabulary.widths
    if len(names) == 1 and list(parts) == [""]:
        parts = {names[0]: parts[""]}
    if missing := [name for name in names if name not in parts]:
        held = " and ".join(f"{name or 'an embedding'} of width {x.shape[1]}" for name, x in parts.items())
        raise UserError(
            f"The file {path} holds {held}{_for(parts)}, and the model {backbone.name!r} needs {' and '.join(missing)}; give an "
            "embedding for this model."
        )
    for name, width in zip(names, widths, strict=True):
        if parts[name].shape[1] != width:
            raise UserError(
                f"The embedding in {path} is {parts[name].shape[1]} wide{_for({name: parts[name]})}, and the model {backbone.name!r} "
                f"takes {width}; give an embedding for this model."
            )
    if len({len(parts[name]) for name in names}) > 1:
        raise UserError(f"The file {path} has different numbers of rows for its text encoders; give another file.")
    if unused := [name for name in ENCODERS if name in parts and name not in names]:
        searched = " and ".join(names)
        log.info(
            "Ignoring the embedding for %s in %r, as the search uses the tokens of %s.",
            " and ".join(unused),
            str(path),
            searched,
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
    """Stand in for `nn.ParameterDict` in a pickle, so that no code of a module runs; the tensors are in `_parameters`."""


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
                f"The file {path} is a pickle, which can run code, and is not read; give a safetensors file or, if you trust this "
                "one, allow it with --model.allow_pickle true (in Python, pickle=True)."
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
            f"The file {path} is broken or holds more than tensors, such as a module saved by torch before 1.6, and is not "
            "unpickled because it could run code; give a safetensors file."
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and safetensors have their own classes
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .")
        raise UserError(
            f"The file {path} cannot be read as an embedding ({shortened(reason, 100)}); download or save it again."
        ) from error


def _embeddings(loaded: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """Return a file's embeddings by name, each as tensors by text encoder; the encoder is "" if the file does not name it."""
    if isinstance(loaded, Tensor):
        loaded = {"": loaded}
    if not isinstance(loaded, Mapping):
        raise UserError(f"The file {path} holds no embedding; give another.")
    if "string_to_param" in loaded:
        loaded = loaded["string_to_param"]
        loaded = vars(loaded).get("_parameters", {}) if isinstance(loaded, _ParameterDict) else loaded
        rows = _rows(loaded)
        return {name: {"": tensor} for name, tensor in rows.items()}
    rows, found = _rows(loaded), dict[str, dict[str, Tensor]]()
    for name, tensor in rows.items():
        if match := re.fullmatch(BUNDLED, name, re.DOTALL):
            found.setdefault(match[1], {})[ENCODER_NAMES[match[2]] if match[2] else ""] = tensor
    if not found and (parts := {ENCODER_NAMES[name]: tensor for name, tensor in rows.items() if name in ENCODER_NAMES}):
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
        raise UserError(f"The file {path} holds no embedding; give another.")
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


@contextmanager
def embedding_in(pipeline: Any, backbone: Backbone, embedding: Tensor, token: str) -> Iterator[Any]:
    """Make a token stand for an embedding in the prompts of a diffusers pipeline; restore the pipeline on exit.

    The pipeline's embedding tables are not resized: inside the context its tokenizers are replaced with copies, and hooks replace
    the looked-up embeddings.

    Args:
        pipeline: A pipeline of the backbone's family.
        backbone: The model that the embedding was found for.
        embedding: Embedding (M, D) in the searched vocabulary.
        token: The word that stands for it in a prompt, such as `<fox>`.

    Raises:
        UserError: The pipeline is of another family or width, or the token is already in its vocabulary.
    """
    own = [tower in backbone.vocabulary.towers for tower in backbone.towers]
    parts = {name for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None}
    read = [reads for reads in backbone.reads if reads.part in parts]
    searched = [reads for reads, ours in zip(read, own, strict=False) if ours]
    widths = [getattr(pipeline, reads.part).get_input_embeddings().weight.shape[1] for reads in searched]
    if not len(parts) == len(read) == len(own) or widths != backbone.vocabulary.widths:
        raise UserError(
            f"The embedding was found for {backbone.name} ({type(backbone).__name__}), whose text encoders do not match those of "
            f"this {type(pipeline).__name__}; give a pipeline of that model."
        )
    before = {reads.tokenizer: getattr(pipeline, reads.tokenizer) for reads in searched}
    with ExitStack() as hooks:
        try:
            for reads, rows in zip(searched, backbone.vocabulary.split(embedding), strict=True):
                tokenizer, first = _with_token(before[reads.tokenizer], token, len(rows))
                setattr(pipeline, reads.tokenizer, tokenizer)
                for handle in _replacing(getattr(pipeline, reads.part), rows, first):
                    hooks.callback(handle.remove)
            yield pipeline
        finally:
            for name, tokenizer in before.items():
                setattr(pipeline, name, tokenizer)


def _with_token(tokenizer: Any, token: str, count: int) -> tuple[Any, int]:
    """Return a copy of a tokenizer that reads a token as `count` new ids, and the first of these ids."""
    words = [token, *(f"{token}_{i}" for i in range(1, count))]
    if token in tokenizer.get_vocab():
        raise UserError(
            f"The token {token!r} is already in the tokenizer's vocabulary; choose another, such as '<{token}-1>'."
        )
    written = " ".join(words)
    alone = re.compile(rf"{re.escape(token)}(?!_\d)")

    def spelt(text: Any) -> Any:
        if isinstance(text, str):  # a pipeline may have expanded it already
            return alone.sub(lambda _: written, text.replace(written, token))
        return [spelt(one) for one in text] if isinstance(text, list | tuple) else text

    kind = type(tokenizer)
    reading = type(kind.__name__, (kind,), {"__call__": lambda self, text=None, *args, **kwargs: kind.__call__(self, spelt(text), *args, **kwargs)})  # fmt: skip
    copied = copy.deepcopy(tokenizer)
    copied.__class__ = reading
    copied.add_tokens(words)
    return copied, int(copied.convert_tokens_to_ids(token))


def _replacing(encoder: Any, rows: Tensor, first: int) -> list[Any]:
    """Hook a text encoder to look up ids from `first` on in rows (M, D), with id 0 in their place; return the handles."""
    seen: list[Tensor] = []

    def known(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        seen[:] = [ids]
        ids = ids.where(ids < first, 0)
        return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})

    def replaced(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ours = seen[0] >= first
        found: Tensor = output.clone()
        found[ours] = rows.to(output)[seen[0][ours] - first]
        return found

    tables = {id(table): table for table in (encoder.get_input_embeddings(), *_others(encoder))}
    return [
        encoder.register_forward_pre_hook(known, with_kwargs=True),
        *(table.register_forward_hook(replaced) for table in tables.values()),
    ]


def _others(encoder: Any) -> list[Any]:
    """Return the second embedding table, which only T5 has: that of its encoder stack."""
    stack = getattr(encoder, "encoder", None)
    table = getattr(stack, "embed_tokens", None)
    return [] if table is None else [table]


# --- encoded prompts


def pack_prompt_embeds(embeds: Mapping[str, Tensor], prompts: Sequence[str], backbone: Backbone) -> bytes:
    """Return the content of a safetensors file of encoded prompts, under the names of diffusers' pipelines.

    Args:
        embeds: Encoded prompts by key, float32 (S, R, D): with S = 1 the prompt, with S = 2 also the negative prompt.
        prompts: The user's text for each of them.
        backbone: The model that they were made for.
    """
    tensors: dict[str, Tensor] = {}
    for key, sides in embeds.items():
        for side, embed in zip(SIDES, sides.detach().float().cpu(), strict=False):
            hidden, pooled = backbone.split(embed)
            tensors[f"{key}.{side}"] = hidden
            if pooled is not None:
                tensors[f"{key}.{_pooled(side)}"] = pooled
            if any(tower.masked for tower in backbone.towers):
                tensors[f"{key}.{_mask(side)}"] = (hidden != 0).any(-1).long()
    shape = list(next(iter(embeds.values())).shape[1:])
    metadata = {
        "format": "pt",
        "family": type(backbone).__name__,
        "backbone": backbone.name,
        "shape": json.dumps(shape),
        "base_prompts": json.dumps(dict(zip(embeds, prompts, strict=True))),
        **_clip_skip(backbone),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def read_prompt_embeds(path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """Read encoded prompts by key, (S, R, D) each, from a file made by `pack_prompt_embeds`.

    Files with the outputs of `encode_prompt` of a diffusers pipeline are also read, with the names `prompt_embeds` (B, L, D),
    `negative_prompt_embeds`, `pooled_prompt_embeds`, `prompt_attention_mask` and so on; the keys are then numbers.

    Args:
        path: The file.
        backbone: The model to use them in.
        shape: (R, D) of the model's encoded prompts.

    Raises:
        UserError: The file does not exist, or was made for another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        sides = [side for side in SIDES if f"{key}.{side}" in tensors]
        rows = [tensors[f"{key}.{side}"] for side in sides]
        try:
            if backbone.pooled_width:
                rows = [
                    backbone.join(x, tensors[f"{key}.{_pooled(side)}"]) for x, side in zip(rows, sides, strict=True)
                ]
            found[key] = torch.stack(rows)
        except (LookupError, RuntimeError) as error:
            raise _incomplete(path) from error
        if found[key].shape[1:] != tuple(shape):
            raise _incomplete(path)
    return found


def _incomplete(path: Path) -> UserError:
    return UserError(
        f"The encoded prompts in {path} are incomplete or have other shapes than its metadata states; give another file."
    )


def _numbered(tensors: Mapping[str, Tensor], path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """Convert a pipeline's output for B prompts: number the prompts and set padding to zeros."""
    wanted = backbone.split(torch.empty(*shape))[0].shape
    found: dict[str, Tensor] = {}
    for side in SIDES:
        if side not in tensors:
            continue
        hidden = tensors[side].reshape(-1, *tensors[side].shape[-2:])
        if hidden.shape[1:] != wanted:
            raise UserError(
                f"The file {path} holds {side} of {list(hidden.shape[1:])}, and the model {backbone.name!r} takes {list(wanted)}; "
                "give embeddings for this model."
            )
        if (mask := tensors.get(_mask(side))) is not None:
            hidden = hidden * mask.reshape(len(hidden), -1, 1)
        if backbone.pooled_width and _pooled(side) not in tensors:
            raise UserError(f"The file {path} has no {_pooled(side)}, which the model {backbone.name!r} needs; add it.")
        for i, rows in enumerate(hidden):
            found[f"{i}.{side}"] = rows
            if backbone.pooled_width:
                found[f"{i}.{_pooled(side)}"] = tensors[_pooled(side)].reshape(len(hidden), -1)[i]
    if SIDES[0] not in tensors:
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


def _mask(side: str) -> str:
    """Return diffusers' name of the padding mask: `prompt_attention_mask`, `negative_prompt_attention_mask`."""
    return side.replace("embeds", "attention_mask")


def _pooled(side: str) -> str:
    """Return diffusers' name of the pooled vector: `pooled_prompt_embeds`, `negative_pooled_prompt_embeds`."""
    return side.replace("prompt_embeds", "pooled_prompt_embeds")
