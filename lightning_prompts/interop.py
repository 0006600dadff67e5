"""Files of embeddings, before the text encoder and after it, that other tools read and write; and their use in a pipeline."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError

SIDES = ("prompt_embeds", "negative_prompt_embeds")
ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""What AUTOMATIC1111 and ComfyUI call the text encoders that an embedding is for."""

WIDTHS = {
    768: "Stable Diffusion 1 (clip_l)",
    1024: "Stable Diffusion 2",
    1280: "the second encoder of SDXL and SD3 (clip_g)",
    4096: "the T5 of SD3, FLUX and PixArt (t5xxl)",
}


# --- embeddings of tokens, as textual inversion finds them


def encoder_names(backbone: Backbone) -> list[str]:
    """What other tools call the text encoders whose tokens are searched."""
    if backbone.vocabulary.towers[0].kind == "t5":
        return ["t5xxl"]
    return list(ENCODERS[: len(backbone.vocabulary.towers)])


def pack_embedding(embedding: Tensor, backbone: Backbone, token: str) -> bytes:
    """The content of a safetensors file that diffusers, AUTOMATIC1111 and ComfyUI read.

    For models with one text encoder it has one tensor, named like the token; for others one an encoder, `clip_l`, `clip_g` or
    `t5xxl`, of which diffusers is given one at a time.

    Args:
        embedding: (M, D), of the tokens that are searched, see `Vocabulary`.
        backbone: The model that it was found for.
        token: What stands for it in a prompt.
    """
    parts = [part.detach().float().cpu().contiguous() for part in backbone.vocabulary.split(embedding)]
    names = [token] if len(backbone.towers) == 1 and backbone.towers[0].kind == "clip" else encoder_names(backbone)
    metadata = {"format": "pt", "family": type(backbone).__name__, "backbone": backbone.name, "token": token}
    metadata |= _clip_skip(backbone)
    return save(dict(zip(names, parts, strict=True)), metadata)


def _clip_skip(backbone: Backbone) -> dict[str, str]:
    """Return the metadata that says with how many skipped layers an embedding was found, if with any."""
    return {"clip_skip": str(backbone.clip_skip)} if backbone.clip_skip else {}


def read_embedding(path: str | Path, backbone: Backbone, pickle: bool = False) -> Tensor:
    """An embedding (M, D) of the tokens that are searched, from a file of any of the layouts that people have.

    These are diffusers', AUTOMATIC1111's `string_to_param`, kohya's `emb_params`, `clip_l`, `clip_g` and `t5xxl` also bundled with
    a LoRA, and bare tensors; a row alone may be a vector.

    Args:
        path: The file; what it holds counts, and not its name.
        backbone: The model that is to read it.
        pickle: Read pickles, too, as far as they hold tensors and nothing else.

    Raises:
        UserError: It is none of these, or for another model.
    """
    path = Path(path)
    parts = {name: tensor.reshape(-1, tensor.shape[-1]).float() for name, tensor in _parts(_load(path, pickle), path)}
    names, widths = encoder_names(backbone), backbone.vocabulary.widths
    if len(names) == 1 and len(parts) == 1 and "" in parts:
        parts = {names[0]: parts[""]}
    if missing := [name for name in names if name not in parts]:
        held = " and ".join(f"{name or 'an embedding'} of width {x.shape[1]}" for name, x in parts.items())
        raise UserError(
            f"The file {path} holds {held}{_for(parts)}, and the model {backbone.name!r} needs {' and '.join(missing)}; give an "
            "embedding that was made for it."
        )
    for name, width in zip(names, widths, strict=True):
        if parts[name].shape[1] != width:
            raise UserError(
                f"The embedding in {path} is {parts[name].shape[1]} wide{_for({name: parts[name]})}, and the model {backbone.name!r} "
                f"takes {width}; give an embedding that was made for it."
            )
    if len({len(parts[name]) for name in names}) > 1:
        raise UserError(f"The file {path} has different numbers of rows for its text encoders; give another.")
    return torch.cat([parts[name] for name in names], dim=1)


def _for(parts: Mapping[str, Tensor]) -> str:
    """Which family an embedding's width belongs to, where that is known."""
    known = [WIDTHS[part.shape[1]] for part in parts.values() if part.shape[1] in WIDTHS]
    return f", which is for {known[0]}" if len(known) == 1 else ""


def _load(path: Path, pickle: bool) -> Any:
    """What a file holds, read as what it is and not as what it is called."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the header of safetensors, behind its length
            with safe_open(path, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        if not start.startswith((b"PK", b"\x80")):
            raise UserError(f"The file {path} is no embedding; give a safetensors file.")
        if not pickle:
            raise UserError(
                f"The file {path} is a pickle, which can run code, and is not read; give a safetensors file or, if you trust it, "
                "allow it with --model.allow_pickle true, in Python with pickle=True."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror or error}); give another.") from error
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and pickle have classes of their own
        raise UserError(
            f"The file {path} cannot be read as an embedding ({str(error).partition(chr(10))[0][:100]}); fetch or write it again."
        ) from error


def _parts(loaded: Any, path: Path) -> list[tuple[str, Tensor]]:
    """The tensors of a file by the encoder that they are for, or by "" where it does not say."""
    if isinstance(loaded, Tensor):
        return [("", loaded)]
    if isinstance(loaded, Mapping):
        if "string_to_param" in loaded:
            loaded = dict(loaded["string_to_param"])
        found = {
            name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor) and tensor.is_floating_point()
        }
        for name in list(found):
            if match := re.fullmatch(r"bundle_emb\..*\.(?:string_to_param\.\*|(\w+))", name):
                found[match[1] or ""] = found[name]
        if named := [(name, found[name]) for name in ENCODERS if name in found]:
            return named
        if len(found) == 1 or "" in found:
            return [("", found.get("", next(iter(found.values()))))]
        if found:
            raise UserError(f"The file {path} has {len(found)} embeddings, and one is needed; give a file of one.")
    raise UserError(f"The file {path} holds no embedding; give another.")


@contextmanager
def embedding_in(pipeline: Any, backbone: Backbone, embedding: Tensor, token: str) -> Iterator[Any]:
    """Lets a token stand for an embedding in the prompts of a diffusers pipeline, which afterwards is what it was.

    Nothing is added to the pipeline's tables: its tokenizers are copies meanwhile, and what its text encoders look up is replaced
    on the way.

    Args:
        pipeline: Of the backbone's family.
        backbone: The model that the embedding was found for.
        embedding: (M, D).
        token: What stands for it in a prompt, such as `<fox>`.

    Raises:
        UserError: The pipeline is of another family or width, or the token means something already.
    """
    own = [tower in backbone.vocabulary.towers for tower in backbone.towers]
    parts = {name for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None}
    read = [reads for reads in backbone.reads if reads.part in parts]
    searched = [reads for reads, ours in zip(read, own, strict=False) if ours]
    widths = [getattr(pipeline, reads.part).get_input_embeddings().weight.shape[1] for reads in searched]
    if not len(parts) == len(read) == len(own) or widths != backbone.vocabulary.widths:
        raise UserError(
            f"The embedding was found for {backbone.name} ({type(backbone).__name__}), whose text encoders a "
            f"{type(pipeline).__name__} does not have; give a pipeline of that model."
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
    """A copy of a tokenizer that reads a token as `count` new ids, and the first of these."""
    words = [token, *(f"{token}_{i}" for i in range(1, count))]
    if token in tokenizer.get_vocab():
        raise UserError(f"The token {token!r} means something already; choose another, such as '<{token}-1>'.")
    written = " ".join(words)
    alone = re.compile(rf"{re.escape(token)}(?!_\d)")

    def spelt(text: Any) -> Any:
        if isinstance(text, str):  # a pipeline may have spelt it already
            return alone.sub(lambda _: written, text.replace(written, token))
        return [spelt(one) for one in text] if isinstance(text, list | tuple) else text

    kind = type(tokenizer)
    reading = type(kind.__name__, (kind,), {"__call__": lambda self, text=None, *args, **kwargs: kind.__call__(self, spelt(text), *args, **kwargs)})  # fmt: skip
    copied = copy.deepcopy(tokenizer)
    copied.__class__ = reading
    copied.add_tokens(words)
    return copied, int(copied.convert_tokens_to_ids(token))


def _replacing(encoder: Any, rows: Tensor, first: int) -> list[Any]:
    """Hooks by which a text encoder reads ids from `first` on as rows (M, D), and sees a token of its own for the rest."""
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
    """T5's stack has a table beside the one that the whole model gives."""
    stack = getattr(encoder, "encoder", None)
    table = getattr(stack, "embed_tokens", None)
    return [] if table is None else [table]


# --- encoded prompts


def pack_prompt_embeds(embeds: Mapping[str, Tensor], prompts: Sequence[str], backbone: Backbone) -> bytes:
    """The content of a safetensors file of encoded prompts, in the names of diffusers' pipelines.

    Args:
        embeds: By key, float32 (S, R, D): with S 1 what the denoiser is told, with 2 also what it is led away from.
        prompts: What a person has written for each.
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
    """Encoded prompts by key, (S, R, D) each, of a file that `pack_prompt_embeds` has made.

    Also of one that holds what a diffusers pipeline's `encode_prompt` gives, under its names: `prompt_embeds` (B, L, D),
    `negative_prompt_embeds`, `pooled_prompt_embeds`, `prompt_attention_mask` and so on, whose keys are numbers.

    Args:
        path: The file.
        backbone: The model that is to be told.
        shape: (R, D) of what it is told.

    Raises:
        UserError: There is no such file, or it was made for another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The file {path} cannot be read as embeddings ({error}); give one that `fit` has written."
        ) from error
    if "family" not in metadata:
        tensors = _numbered(tensors, path, backbone, shape)
    elif (made_for := (metadata["family"], metadata.get("shape"))) != (
        type(backbone).__name__,
        json.dumps(list(shape)),
    ):
        raise UserError(
            f"The embeddings in {path} were made for {metadata.get('backbone')} ({made_for[0]}, {made_for[1]}) and the model "
            f"{backbone.name} is {type(backbone).__name__}, {list(shape)}; give the model that they were made for."
        )
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        sides = [side for side in SIDES if f"{key}.{side}" in tensors]
        rows = [tensors[f"{key}.{side}"] for side in sides]
        if backbone.pooled_width:
            rows = [backbone.join(x, tensors[f"{key}.{_pooled(side)}"]) for x, side in zip(rows, sides, strict=True)]
        found[key] = torch.stack(rows)
    return found


def _numbered(tensors: Mapping[str, Tensor], path: Path, backbone: Backbone, shape: Sequence[int]) -> dict[str, Tensor]:
    """What a pipeline gives for B prompts, under numbers and with nothing in place of padding."""
    wanted = backbone.split(torch.empty(*shape))[0].shape
    found: dict[str, Tensor] = {}
    for side in SIDES:
        if side not in tensors:
            continue
        hidden = tensors[side].reshape(-1, *tensors[side].shape[-2:])
        if hidden.shape[1:] != wanted:
            raise UserError(
                f"The file {path} holds {side} of {list(hidden.shape[1:])}, and the model {backbone.name!r} is told {list(wanted)}; give "
                "embeddings that were made for it."
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
            f"The file {path} holds no encoded prompt; give one that `fit` has written, or one with prompt_embeds."
        )
    return found


def base_prompts(path: Path) -> dict[str, str]:
    """What a person has written for the encoded prompts of a file, by key; empty where it does not say."""
    with safe_open(path, "pt") as file:
        found: dict[str, str] = json.loads((file.metadata() or {}).get("base_prompts", "{}"))
    return found


def _mask(side: str) -> str:
    """Diffusers' name of the mask of padding: `prompt_attention_mask`, `negative_prompt_attention_mask`."""
    return side.replace("embeds", "attention_mask")


def _pooled(side: str) -> str:
    """Diffusers' name of the pooled vector: `pooled_prompt_embeds`, `negative_pooled_prompt_embeds`."""
    return side.replace("prompt_embeds", "pooled_prompt_embeds")
