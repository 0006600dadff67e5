"""Use an embedding in the prompts of a diffusers pipeline."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def embedding_in(
    pipeline: DiffusionPipeline, backbone: Backbone, embedding: Tensor, token: str
) -> Iterator[DiffusionPipeline]:
    """Make a token stand for an embedding in the prompts of a diffusers pipeline; restore the pipeline on exit.

    The pipeline's embedding tables are not resized: inside the context its tokenizers are replaced with copies, and
    hooks replace the looked-up embeddings.

    Args:
        pipeline: A pipeline of the backbone's family.
        backbone: The model that the embedding was found for.
        embedding: Embedding (M, D) in the searched vocabulary.
        token: The word that stands for it in a prompt, such as `<fox>`.

    Raises:
        UserError: The pipeline is of another family or width, or the token is already in its vocabulary.
    """
    parts = {name for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None}
    specs = [encoder.spec for encoder in backbone.vocabulary.text_encoders]
    same = parts == {encoder.spec.component for encoder in backbone.text_encoders}
    tables = [getattr(pipeline, spec.component).get_input_embeddings().weight for spec in specs] if same else []
    if [table.shape[1] for table in tables] != backbone.vocabulary.widths:
        raise UserError(
            f"The embedding was found for {backbone.name} ({type(backbone).__name__}), whose text encoders do not "
            f"match those of this {type(pipeline).__name__}; give a pipeline of that model."
        )
    before = {spec.tokenizer: getattr(pipeline, spec.tokenizer) for spec in specs}
    with ExitStack() as hooks:
        try:
            for spec, rows in zip(specs, backbone.vocabulary.split(embedding), strict=True):
                tokenizer, first = _with_token(before[spec.tokenizer], token, len(rows))
                setattr(pipeline, spec.tokenizer, tokenizer)
                for handle in _replacing(getattr(pipeline, spec.component), rows, first):
                    hooks.callback(handle.remove)
            yield pipeline
        finally:
            for name, tokenizer in before.items():
                setattr(pipeline, name, tokenizer)


def _with_token(tokenizer: PreTrainedTokenizerBase, token: str, count: int) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a copy of a tokenizer that reads a token as `count` new ids, and the first of these ids."""
    words = [token, *(f"{token}_{i}" for i in range(1, count))]
    if token in tokenizer.get_vocab():
        raise UserError(
            f"The token {token!r} is already in the tokenizer's vocabulary; choose another, such as '<{token}-1>'."
        )
    expanded = " ".join(words)
    single = re.compile(rf"{re.escape(token)}(?!_\d)")

    def expand(text: Any) -> Any:
        if isinstance(text, str):  # a pipeline may have expanded it already
            return single.sub(lambda _: expanded, text.replace(expanded, token))
        return [expand(item) for item in text] if isinstance(text, list | tuple) else text

    kind = type(tokenizer)

    def call(self: PreTrainedTokenizerBase, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, expand(text), *args, **kwargs)

    copied = copy.deepcopy(tokenizer)
    copied.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    copied.add_tokens(words)
    return copied, int(copied.convert_tokens_to_ids(token))


def _replacing(encoder: PreTrainedModel, rows: Tensor, first: int) -> list[RemovableHandle]:
    """Hook a text encoder to look up ids from `first` on in rows (M, D), and return the handles of the hooks."""
    seen: list[Tensor] = []

    def mask_new_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        seen[:] = [ids]
        ids = ids.where(ids < first, 0)
        return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})

    def insert_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        new = seen[0] >= first
        embeddings: Tensor = output.clone()
        embeddings[new] = rows.to(output)[seen[0][new] - first]
        return embeddings

    tables = {id(table): table for table in (encoder.get_input_embeddings(), *_second_table(encoder))}
    return [
        encoder.register_forward_pre_hook(mask_new_ids, with_kwargs=True),
        *(table.register_forward_hook(insert_rows) for table in tables.values()),
    ]


def _second_table(encoder: PreTrainedModel) -> list[nn.Module]:
    """Return the second embedding table, which only T5 has: that of its encoder stack."""
    stack = getattr(encoder, "encoder", None)
    table = getattr(stack, "embed_tokens", None)
    return [] if table is None else [table]
