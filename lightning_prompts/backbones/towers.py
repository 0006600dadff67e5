"""Text encoders with their tokenizers, and those of them that read one sequence of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prompts.vocabulary import allowed_tokens, check_embedded, encode_text, token_lists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Kind = Literal["clip", "t5"]


class Said(NamedTuple):
    """What a text encoder says of P prompts: hidden states (P, L, D') and, where it has one, the pooled output (P, D'')."""

    hidden: Tensor
    pooled: Tensor | None


class TextTower(nn.Module):
    """A text encoder with its tokenizer.

    Args:
        tokenizer: The tokenizer.
        encoder: The text encoder, a transformers model.
        layer: Which hidden state is read; -1 for the last one, after the final norm.
        length: L, how many tokens are read, start and end included; None for as many as the encoder takes.
        masked: Padding is not attended to, and its hidden states are zeros.
        obeys_mask: The family's pipeline obeys `use_attention_mask` in the encoder's config: padding behind the end of the text is
            not attended to, and its hidden states stay what they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: nn.Module,
        layer: int = -1,
        length: int | None = None,
        masked: bool = False,
        obeys_mask: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder: Any = encoder
        self.layer, self._length, self.masked = layer, length, masked
        self.ends_at_eos = obeys_mask and bool(getattr(encoder.config, "use_attention_mask", False))

    @property
    def kind(self) -> Kind:
        """Which family of encoders it is of; those of one family share a vocabulary."""
        return "t5" if self.encoder.config.model_type == "t5" else "clip"

    @property
    def width(self) -> int:
        """D', of the hidden states."""
        width: int = self.encoder.config.hidden_size
        return width

    @property
    def most_skipped(self) -> int:
        """The most layers that `skip` can leave out: what is read then is the token embeddings."""
        return int(self.encoder.config.num_hidden_layers) + 1 + self.layer

    @property
    def table(self) -> Tensor:
        """The embedding of each token, (V, D) float32; of an encoder in half precision a copy, so take it once."""
        return at_least_float32(self.encoder.get_input_embeddings().weight.detach())

    @property
    def rows(self) -> int:
        """V, rows of the table of token embeddings; the tokenizer may have fewer or more tokens."""
        rows: int = self.encoder.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def length(self) -> int:
        """L, how many tokens are read, start and end included."""
        if self._length:
            return self._length
        most: int = self.tokenizer.model_max_length
        return min(most, getattr(self.encoder.config, "max_position_embeddings", most))

    def forward(self, ids: Tensor, embeddings: Tensor | None = None, skip: int = 0) -> Said:
        """Encodes tokens.

        Args:
            ids: Token ids, (P, L). With embeddings they still say where the text ends.
            embeddings: What stands in place of the tokens' embeddings, (P, L, D). `table[ids]` changes nothing.
            skip: In a CLIP, how many layers before `layer` the hidden states are read. Where `layer` is the last one, after the final
                norm, earlier hidden states pass that norm too, as in diffusers. The pooled output stays that of all layers.
        """
        layer = self.layer - skip if self.kind == "clip" else self.layer
        counts = ids != self.tokenizer.pad_token_id
        options: dict[str, Any] = {"attention_mask": counts} if self.masked else {}
        if self.ends_at_eos:
            # 0 behind the first end of the text, which may also be the padding token.
            end = (ids == self.tokenizer.eos_token_id).int()
            options["attention_mask"] = (end.cumsum(1) == end).long()
        if layer != -1:
            options["output_hidden_states"] = True
        if embeddings is None:
            output = self.encoder(ids, **options)
        elif self.kind == "t5":
            output = self.encoder(inputs_embeds=embeddings.to(self.encoder.dtype), **options)
        else:  # CLIP's takes none as an argument, and needs the ids beside them
            table = self.encoder.get_input_embeddings()
            with table.register_forward_hook(lambda module, args, replaced: embeddings.to(replaced.dtype)):
                output = self.encoder(ids, **options)
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        if self.layer == -1 and layer != -1:
            model = getattr(self.encoder, "text_model", self.encoder)  # transformers 4 wraps what holds the norm
            hidden = model.final_layer_norm(hidden)
        if self.masked:
            hidden = hidden * counts.unsqueeze(2)
        return Said(hidden, output.get("text_embeds", output.get("pooler_output")))

    def read(self, texts: Sequence[str], device: torch.device, cut: bool = False, skip: int = 0) -> Said:
        """Encodes texts.

        Args:
            texts: P texts.
            device: Where.
            cut: Cut off the end of those that are too long, and say so, instead of refusing them.
            skip: See `forward`.
        """
        if cut:
            lengths = [len(ids) for ids in token_lists(self.tokenizer, texts, add_special_tokens=True)]
            if (most := max(lengths)) > self.length:
                log.warning(
                    "One of the text encoders reads %d tokens, and of %d the last are cut off.", self.length, most
                )
        ids = encode_text(self.tokenizer, texts, self.length, cut, self.rows)
        said: Said = self(ids.to(device), skip=skip)
        return said


class Vocabulary:
    """What is searched: the tokens of text towers that read the same ones.

    A token's embedding is its embeddings in all of these towers, one after the other, so that the squared distance of two is the
    sum of those in each tower.

    Args:
        towers: The towers, of one vocabulary.
    """

    def __init__(self, towers: Sequence[TextTower]) -> None:
        self.towers = list(towers)
        self.tokenizer = towers[0].tokenizer

    @property
    def first(self) -> int:
        """Position of a text's first token, behind that of the start if there is one."""
        return int(self.tokenizer.bos_token_id is not None)

    @property
    def length(self) -> int:
        """L, how many tokens all of them read, start and end included."""
        return min(tower.length for tower in self.towers)

    @property
    def rows(self) -> int:
        """V, how many ids have an embedding in all towers."""
        return min(tower.rows for tower in self.towers)

    @property
    def table(self) -> Tensor:
        """The embedding of each token, (V, D) float32; a copy where there are several towers or in half precision."""
        tables = [tower.table[: self.rows] for tower in self.towers]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)

    @property
    def widths(self) -> list[int]:
        """D_i, of the embeddings in each tower."""
        return [tower.encoder.get_input_embeddings().weight.shape[1] for tower in self.towers]

    def allowed(self, blocked: Iterable[str] = (), words: Iterable[str] | None = None) -> Tensor:
        """Find the tokens (V,) bool that a search may use and that all towers read alike; see `allowed_tokens`."""
        others = [tower.tokenizer for tower in self.towers[1:]]
        return allowed_tokens(self.tokenizer, blocked, words, self.rows, others)

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """Read texts as token ids, without start and end; refuse those with a token that has no embedding."""
        ids = token_lists(self.tokenizer, texts)
        check_embedded(self.tokenizer, texts, ids, self.rows)
        return ids

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as ids (P, L) with start, end and padding; see `encode_text`."""
        return encode_text(self.tokenizer, texts, self.length, rows=self.rows)

    def split(self, embeddings: Tensor) -> list[Tensor]:
        """Embeddings (..., D) as those in each tower, (..., D_i)."""
        return list(embeddings.split(self.widths, dim=-1))

    def of_width(self, embeddings: Tensor, width: int) -> Tensor:
        """Of embeddings (..., D) those in the first tower of a width, (..., width)."""
        return self.split(embeddings)[self.widths.index(width)]

    def empty(self, ids: Tensor) -> Tensor:
        """Return which of token ids (P, L) are those of the empty text, (P,)."""
        end: int = self.tokenizer.eos_token_id
        return ids[:, self.first] == end

    def say(self, ids: Tensor, embeddings: Tensor | None = None, skip: int = 0) -> dict[TextTower, Said]:
        """What each tower says of token ids (P, L) with embeddings (P, L, D) in place of the tokens'; see `TextTower.forward`."""
        parts = [None] * len(self.towers) if embeddings is None else self.split(embeddings)
        end = ids == self.tokenizer.eos_token_id
        behind = (end.cumsum(1) - end.int()) > 0
        said = {}
        for tower, part in zip(self.towers, parts, strict=True):
            own = ids.masked_fill(behind, tower.tokenizer.pad_token_id)  # each pads with its own token
            if part is not None and tower is not self.towers[0]:
                weight = tower.encoder.get_input_embeddings().weight
                part = part.where(~behind.unsqueeze(2), weight[tower.tokenizer.pad_token_id].to(part))
            said[tower] = tower(own, part, skip)
        return said

    def texts(self, ids: Tensor) -> list[str]:
        """What token ids (P, L) say, without start, end and padding."""
        end = self.tokenizer.eos_token_id
        rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [" ".join(text.split()) for text in decoded]


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor whose numbers have 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
