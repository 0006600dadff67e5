"""Text encoders with their tokenizers, and the vocabulary of those that share one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prompts.backbones.vocabulary import allowed_tokens, check_embedded, encode_text, token_lists
from lightning_prompts.typed_module import TypedModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoderSpec:
    """A text encoder of a family: its component and classes, and how the family uses it. The defaults describe a CLIP.

    Attributes:
        component: Its name in the pipeline, such as `text_encoder_2`.
        network: Its transformers class.
        kind: Name of its vocabulary, which text encoders of one kind share; `--model.backbone.vocabulary` takes it.
        tokenizer_class: The transformers class of its tokenizer, a fast one.
        tokenizer_files: The files that this class reads if there is no tokenizer.json.
        embedding_key: Its name in embedding files of AUTOMATIC1111 and ComfyUI.
        other_keys: Other names in such files, which are read too.
        layer: Index of the hidden state to use; -1 for the last one, after the final norm.
        length: L, number of tokens, including start and end; None for as many as the encoder takes.
        mask_padding: Mask padding in the attention and set its hidden states to zeros.
        use_config_mask: Respect `use_attention_mask` in the encoder's config, as the family's pipeline does: padding
            after the end of the text is masked in the attention, and its hidden states are kept.
        optional: The family also works without it.
        lowercase: Lowercase prompts, as the family's pipeline does.
    """

    component: str
    network: str
    kind: str = "clip"
    tokenizer_class: str = "CLIPTokenizerFast"
    tokenizer_files: tuple[str, ...] = ("vocab.json", "merges.txt")
    embedding_key: str = "clip_l"
    other_keys: tuple[str, ...] = ()
    layer: int = -1
    length: int | None = None
    mask_padding: bool = False
    use_config_mask: bool = False
    optional: bool = False
    lowercase: bool = False

    @property
    def tokenizer(self) -> str:
        """The component of its tokenizer."""
        return self.component.replace("text_encoder", "tokenizer")


def t5(component: str, **options: Any) -> TextEncoderSpec:
    """Describe a T5 encoder.

    Args:
        component: Its name in the pipeline.
        **options: Other fields of `TextEncoderSpec`.
    """
    spec = TextEncoderSpec(
        component, "T5EncoderModel", "t5", "T5TokenizerFast", ("spiece.model",), "t5xxl", ("t5", "t5_xxl")
    )
    return replace(spec, **options)


class TextEncoderOutput(NamedTuple):
    """Output of a text encoder for P prompts: hidden states (P, L, D') and, if there is one, the pooled (P, D'')."""

    hidden: Tensor
    pooled: Tensor | None


class TextEncoder(TypedModule):
    """A text encoder with its tokenizer.

    Args:
        tokenizer: The tokenizer.
        encoder: The text encoder, a transformers model.
        spec: How its family uses it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.tokenizer, self.spec = tokenizer, spec
        self.encoder: Any = encoder
        self.takes_embeddings = "inputs_embeds" in inspect.signature(encoder.forward).parameters
        self.ends_at_eos = spec.use_config_mask and bool(getattr(encoder.config, "use_attention_mask", False))

    @property
    def kind(self) -> str:
        """The kind of text encoder; those of one kind share a vocabulary."""
        return self.spec.kind

    @property
    def width(self) -> int:
        """D', the width of the hidden states."""
        width: int = self.encoder.config.hidden_size
        return width

    @property
    def most_skipped(self) -> int:
        """The largest `skip`, with which the output is the token embeddings."""
        return int(self.encoder.config.num_hidden_layers) + 1 + self.spec.layer

    @property
    def table(self) -> Tensor:
        """The embedding of each token, (V, D) float32; a copy if the encoder is in half precision."""
        return at_least_float32(self.encoder.get_input_embeddings().weight.detach())

    @property
    def rows(self) -> int:
        """V, the rows of the token embedding table; the tokenizer may have fewer or more tokens."""
        rows: int = self.encoder.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def length(self) -> int:
        """L, the number of tokens, including start and end."""
        if self.spec.length:
            return self.spec.length
        most: int = self.tokenizer.model_max_length
        return min(most, getattr(self.encoder.config, "max_position_embeddings", most))

    def forward(self, ids: Tensor, embeddings: Tensor | None = None, skip: int = 0) -> TextEncoderOutput:
        """Encode tokens.

        Args:
            ids: Token ids, (P, L). With embeddings, they still mark the end of the text.
            embeddings: Replace the tokens' embeddings, (P, L, D); `table[ids]` gives the same output.
            skip: For a CLIP, use the hidden states this many layers before `layer`. If `layer` is -1, earlier hidden
                states also pass the final norm, as in diffusers. The pooled output always uses all layers.
        """
        layer = self.spec.layer - skip if self.kind == "clip" else self.spec.layer
        is_token = ids != self.tokenizer.pad_token_id
        options: dict[str, Any] = {"attention_mask": is_token} if self.spec.mask_padding else {}
        if self.ends_at_eos:
            # False after the first end-of-text token, which may also be the padding token.
            end = (ids == self.tokenizer.eos_token_id).int()
            options["attention_mask"] = (end.cumsum(1) == end).long()
        if layer != -1:
            options["output_hidden_states"] = True
        if embeddings is None:
            output = self.encoder(ids, **options)
        elif self.takes_embeddings:
            output = self.encoder(inputs_embeds=embeddings.to(self.encoder.dtype), **options)
        else:  # CLIP's text model does not take embeddings and needs the ids
            table = self.encoder.get_input_embeddings()
            with table.register_forward_hook(lambda module, args, replaced: embeddings.to(replaced.dtype)):
                output = self.encoder(ids, **options)
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        if self.spec.layer == -1 and layer != -1:
            model = getattr(self.encoder, "text_model", self.encoder)  # transformers 4 has the norm in a submodule
            hidden = model.final_layer_norm(hidden)
        if self.spec.mask_padding:
            hidden = hidden * is_token.unsqueeze(2)
        return TextEncoderOutput(hidden, output.get("text_embeds", output.get("pooler_output")))

    def encode_text(
        self, texts: Sequence[str], device: torch.device, truncate: bool = False, skip: int = 0
    ) -> TextEncoderOutput:
        """Encode texts.

        Args:
            texts: P texts.
            device: Device of the encoder.
            truncate: Truncate texts that are too long and log a warning, instead of refusing them.
            skip: See `forward`.
        """
        if truncate:
            lengths = [len(ids) for ids in token_lists(self.tokenizer, texts, add_special_tokens=True)]
            if (most := max(lengths)) > self.length:
                log.warning(
                    "A text encoder takes at most %d tokens; texts of up to %d tokens are truncated.", self.length, most
                )
        ids = encode_text(self.tokenizer, texts, self.length, truncate, self.rows)
        output: TextEncoderOutput = self(ids.to(device), skip=skip)
        return output


class Vocabulary:
    """The searched vocabulary: the tokens of the text encoders that share it.

    A token's embedding is the concatenation of its embeddings in these encoders, so the squared distance of two
    embeddings is the sum of their squared distances in each encoder.

    Args:
        text_encoders: The text encoders that share the vocabulary.

    Attributes:
        first: The position of a text's first token: 1 after a start token, 0 without one.
    """

    def __init__(self, text_encoders: Sequence[TextEncoder]) -> None:
        self.text_encoders = list(text_encoders)
        self.tokenizer = text_encoders[0].tokenizer
        (empty,) = token_lists(self.tokenizer, [""], add_special_tokens=True)
        self.first = len(empty) - 1  # a tokenizer may have a start token that it does not add to texts
        # SDXL's second tokenizer pads with "!", so it reads "!" in a text as padding; the first one has a token for it.
        self._read_as_padding = [self._id_of(text_encoder.tokenizer.pad_token) for text_encoder in text_encoders]

    def _id_of(self, text: str) -> int:
        """Return the id of a text that is one token, -1 if it is several tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 else -1

    @property
    def length(self) -> int:
        """L, the number of tokens that all encoders take, including start and end."""
        return min(text_encoder.length for text_encoder in self.text_encoders)

    @property
    def rows(self) -> int:
        """V, the number of ids that have an embedding in all encoders."""
        return min(text_encoder.rows for text_encoder in self.text_encoders)

    @property
    def table(self) -> Tensor:
        """The embedding of each token, (V, D) float32; a copy if there are several encoders or half precision."""
        tables = [text_encoder.table[: self.rows] for text_encoder in self.text_encoders]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)

    @property
    def widths(self) -> list[int]:
        """D_i, the width of the embeddings in each encoder."""
        return [text_encoder.encoder.get_input_embeddings().weight.shape[1] for text_encoder in self.text_encoders]

    def allowed(self, blocked: Iterable[str] = (), words: Iterable[str] | None = None) -> Tensor:
        """Return which tokens (V,) a search may use and all tokenizers read alike, see `allowed_tokens`."""
        others = [text_encoder.tokenizer for text_encoder in self.text_encoders[1:]]
        return allowed_tokens(self.tokenizer, blocked, words, self.rows, others)

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts without start and end tokens; refuse texts with a token that has no embedding."""
        ids = token_lists(self.tokenizer, texts)
        check_embedded(self.tokenizer, texts, ids, self.rows)
        return ids

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as ids (P, L) with start, end and padding; see `encode_text`."""
        return encode_text(self.tokenizer, texts, self.length, rows=self.rows)

    def split(self, embeddings: Tensor) -> list[Tensor]:
        """Split embeddings (..., D) into those of each encoder, (..., D_i)."""
        return list(embeddings.split(self.widths, dim=-1))

    def of_width(self, embeddings: Tensor, width: int) -> Tensor:
        """Return the part (..., width) of embeddings (..., D) that belongs to the first encoder of this width."""
        return self.split(embeddings)[self.widths.index(width)]

    def empty(self, ids: Tensor) -> Tensor:
        """Return which rows of token ids (P, L) are the empty text, (P,)."""
        end: int = self.tokenizer.eos_token_id
        return ids[:, self.first] == end

    def encode(
        self, ids: Tensor, embeddings: Tensor | None = None, skip: int = 0
    ) -> dict[TextEncoder, TextEncoderOutput]:
        """Encode token ids (P, L), or the embeddings (P, L, D), with each encoder, see `TextEncoder.forward`."""
        parts = [None] * len(self.text_encoders) if embeddings is None else self.split(embeddings)
        end = ids == self.tokenizer.eos_token_id
        after_end = (end.cumsum(1) - end.int()) > 0
        outputs = {}
        for text_encoder, part, read_as_padding in zip(self.text_encoders, parts, self._read_as_padding, strict=True):
            padding = after_end | (ids == read_as_padding)
            own = ids.masked_fill(
                padding, text_encoder.tokenizer.pad_token_id
            )  # each encoder has its own padding token
            if part is not None and text_encoder is not self.text_encoders[0]:
                weight = text_encoder.encoder.get_input_embeddings().weight
                part = part.where(~padding.unsqueeze(2), weight[text_encoder.tokenizer.pad_token_id].to(part))
            outputs[text_encoder] = text_encoder(own, part, skip)
        return outputs

    def texts(self, ids: Tensor) -> list[str]:
        """Decode token ids (P, L) without start, end and padding."""
        end = self.tokenizer.eos_token_id
        rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [" ".join(text.split()) for text in decoded]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it has a higher precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
