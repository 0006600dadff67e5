"""Token ids and their text: which tokens are allowed, which are nearest, and which survive decoding and encoding.

A prompt is a text that a user pastes elsewhere, so ids are valid only if the tokenizer encodes their text as the same
ids. Byte-pair tokenizers do not guarantee that: CLIP's `cane` followed by `leroy</w>` decodes to `caneleroy`, which is
encoded as other tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Literal["euclidean", "cosine"]

_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are rendered as blank
LARGEST = 1e18  # norm of an embedding, whose square does not overflow in float32
# CLIP has a token for each letter as a word, T5 for longer words.
FILLERS = ("a", "b", "the", "of", "in", "to")


@torch.no_grad()
def nearest_tokens(
    embeddings: Tensor, table: Tensor, allowed: Tensor, metric: Metric = "euclidean", chunk: int | None = None
) -> Tensor:
    """Project embeddings onto the vocabulary.

    A matrix product rules out the rows that cannot be nearest. The distances of the few that remain are computed from
    differences in double precision, so the result is the same whether the product runs in float32, TF32 or bfloat16. Of
    rows that are equally near, the one with the lowest id is returned. Each product synchronizes with the device once,
    for the number of remaining rows.

    Args:
        embeddings: Embeddings (..., D), such as (P, M, D).
        table: The text encoder's token embeddings, (V, D).
        allowed: Which tokens may be returned, (V,) bool.
        metric: The distance; with "cosine" a row of zeros is never nearest.
        chunk: Rows of the table per product, which bounds the memory; None for as many as give 8 MB of distances.

    Returns:
        Token ids, (...), such as (P, M), on the device of the embeddings.
    """
    if metric not in ("euclidean", "cosine"):
        raise UserError(f"The metric {metric!r} is unknown; use 'euclidean' or 'cosine'.")
    if len(allowed) != len(table):
        raise UserError(
            f"The mask of allowed tokens has {len(allowed)} entries and the token embeddings have {len(table)} rows; "
            "use the tokenizer that belongs to the text encoder."
        )
    x = embeddings.float().reshape(-1, embeddings.shape[-1])  # (N, D)
    length = x.norm(dim=-1, keepdim=True)
    finite, cosine = (length < LARGEST).all(), metric == "cosine"
    queries = x / length.clamp_min(1e-30) if cosine else x
    length = queries.norm(dim=-1, keepdim=True)
    rounding = (x.shape[-1] + 8) * 2.0**-22  # of a sum of D float32 products, relative to the norms
    bound = x.new_full((len(x), 1), torch.inf)  # upper bound of the nearest row's score, (N, 1)
    candidates = []
    chunk = chunk or max(2**21 // max(len(x), 1), 1)
    for first in range(0, len(table), chunk):
        rows = table[first : first + chunk].to(x)  # (C, D)
        norms = rows.norm(dim=-1)
        usable = allowed[first : first + chunk].to(x.device) & (norms < LARGEST) & ((norms > 0) | (not cosine))
        with torch.autocast(x.device.type, enabled=False):
            scores = queries @ rows.T
        if cosine:
            scores, norms = scores / norms, torch.ones_like(norms)
        scores = norms.square() - 2 * scores  # squared distances minus that of the origin, (N, C)
        error = norms * ((0.016 + rounding) * length + rounding * norms)  # 0.016: factors cut to bfloat16's 8 bits
        farthest = (scores + error).masked_fill(~usable, torch.inf)
        bound = torch.minimum(bound, farthest.amin(1, keepdim=True))
        which, near = (usable & (scores - error <= bound)).nonzero(as_tuple=True)
        candidates.append(torch.stack([which, first + near]))
    if not finite:
        raise UserError("The embeddings to project are not finite or exceed 1e18; lower the learning rate.")
    which, ids = torch.cat(candidates, 1)
    if len(x) and not len(which):
        raise UserError("No token is allowed that has a usable embedding; block fewer words or allow more.")
    pairs = zip(which.split(8192), ids.to(table.device).split(8192), strict=True)
    distances = torch.cat([_distances(x[n], table[i].to(x), metric) for n, i in pairs])
    # On the CPU, where scatter_reduce is deterministic; these are few numbers.
    which, ids, distances = which.cpu(), ids.cpu(), distances.cpu()
    least = distances.new_full((len(x),), torch.inf).scatter_reduce(0, which, distances, "amin")
    slack = 1e-14 if cosine else 0.0  # multiples of a row are equally near up to rounding
    nearest = distances <= least[which] + slack
    found: Tensor = ids.new_full((len(x),), len(table)).scatter_reduce(0, which[nearest], ids[nearest], "amin")
    return found.reshape(embeddings.shape[:-1]).to(x.device)


def _distances(x: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Return squared distances (C,) between vectors (C, D) and rows (C, D), or between their directions."""
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    x, rows = x.to(precise), rows.to(precise)
    if metric == "cosine":
        x, rows = (F.normalize(v, dim=-1, eps=torch.finfo(precise).tiny) for v in (x, rows))
    return (x - rows).square().sum(-1)


def allowed_tokens(
    tokenizer: PreTrainedTokenizerBase,
    blocked: Iterable[str] = (),
    words: Iterable[str] | None = None,
    rows: int | None = None,
    others: Sequence[PreTrainedTokenizerBase] = (),
) -> Tensor:
    """Return which tokens a search may use.

    These are the tokens that survive a round trip alone (in CLIP: lowercase tokens that end a word), are neither
    special nor added, and whose text is valid and visible: it has a letter, a digit, punctuation or a symbol. Control
    characters, zero-width spaces and accents without a letter are not allowed.

    Args:
        tokenizer: The tokenizer.
        blocked: Texts that no token may contain, ignoring case. `contains_blocked` finds words of several tokens.
        words: The only words to allow; words of several tokens are ignored.
        rows: V, rows of the table of token embeddings, which may differ from the number of tokens (T5's table has 32128
            rows for 32100 tokens); None for the number of tokens. Rows without a token are not allowed.
        others: Tokenizers with the same vocabulary that have to encode a token's text as this token, too. SDXL's second
            tokenizer encodes "!" as padding.

    Returns:
        Which tokens are allowed, (V,) bool.
    """
    blocked, size = _listed("blocked", blocked), max(tokenizer.get_vocab().values()) + 1
    rows = size if rows is None else rows
    ids = torch.arange(min(size, rows)).unsqueeze(1)
    texts, survives = round_trip(tokenizer, ids)
    survives[[i for i in tokenizer.get_added_vocab().values() if i < len(ids)]] = False
    survives &= torch.tensor([_visible(text) for text in texts], dtype=torch.bool)
    for other in others:
        kept = survives.nonzero().flatten().tolist()
        again = token_lists(other, [texts[i] for i in kept])
        survives[[i for i, row in zip(kept, again, strict=True) if row != [i]]] = False
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[: len(ids)] = survives
    settings, before = [], int(allowed.sum())
    if words is not None:
        words = _listed("words", words)
        single = torch.zeros(rows, dtype=torch.bool)
        single[[row[0] for row in token_lists(tokenizer, words) if len(row) == 1 and row[0] < rows]] = True
        allowed &= single
        settings.append(f"words ({len(words)} given, which are {int(allowed.sum())} of these)")
    if blocked:
        allowed[[i for i in allowed.nonzero().flatten().tolist() if contains_blocked(texts[i], blocked)]] = False
        settings.append(f"blocked ({len(blocked)} given)")
    if not allowed.any():
        if not settings:
            raise UserError(f"None of the tokenizer's {size} tokens can be used in a search; use CLIP's tokenizer.")
        raise UserError(
            f"Of the {before} tokens that a search may use, the setting {' with the setting '.join(settings)} leaves "
            "none; give more words that are one token or block fewer."
        )
    return allowed


def _visible(text: str) -> bool:
    return "\ufffd" not in text and any(unicodedata.category(c)[0] in "LNPS" and c not in _BLANKS for c in text)


def round_trip(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> tuple[list[str], Tensor]:
    """Decode prompts and encode their texts again.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids without start, end and padding, (P, M).

    Returns:
        The P texts, with single spaces between words, and which of them are encoded as exactly these ids, (P,) bool.
        Rows with a special token do not survive.
    """
    rows, texts, special = ids.tolist(), decode(tokenizer, ids), set(tokenizer.all_special_ids)
    again = token_lists(tokenizer, texts)
    same = [row == other and special.isdisjoint(row) for row, other in zip(rows, again, strict=True)]
    return texts, torch.tensor(same, dtype=torch.bool, device=ids.device)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """Decode token ids (P, M), without start, end and padding, to P texts with single spaces between words."""
    rows = ids.tolist()
    decoded = rows and tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [" ".join(text.split()) for text in decoded]


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Tokenize texts, by default without start and end tokens and without truncation; `options` go to the tokenizer."""
    if not texts:
        return []  # transformers fails without texts
    options = {"add_special_tokens": False, "truncation": False, "verbose": False, **options}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids


def check_embedded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ids: Sequence[Sequence[int]], rows: int
) -> None:
    """Refuse texts with a token that has no embedding, such as one that was added to the tokenizer alone.

    Args:
        tokenizer: The tokenizer.
        texts: P texts.
        ids: Their token ids.
        rows: Rows of the text encoder's table of token embeddings.
    """
    for text, row in zip(texts, ids, strict=True):
        if row and max(row) >= rows:
            raise UserError(
                f"The text {_shortened(text)!r} contains the token {tokenizer.convert_ids_to_tokens(max(row))!r}, for "
                f"which the text encoder's table of {rows} rows has no embedding; leave it out, or use the tokenizer "
                "that belongs to the text encoder."
            )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def contains_blocked(text: str, blocked: Iterable[str]) -> bool:
    """Return whether a text contains a blocked text, ignoring case and the boundaries of tokens.

    Decoding adds spaces: "don't" becomes "don 't" and "2024" becomes "2 0 2 4". Spaces between a run of letters and a
    digit or symbol are therefore ignored. Whole words that together spell a blocked one, such as "nu de", also contain
    it; "glass exit" does not contain "sex". Compatibility forms, such as full-width letters, count as the letter;
    invisible characters, such as zero-width spaces and soft hyphens, are ignored.

    Args:
        text: A prompt.
        blocked: Words or longer texts that it must not contain.
    """
    words, text = _fold_all(tuple(_listed("blocked", blocked))), _fold(text)
    joined = text.replace(" ", "")
    return any(word in joined and re.search(_pattern(phrase), text) is not None for phrase, word in words)


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf")).split())


@lru_cache(maxsize=64)
def _fold_all(blocked: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return folded texts with and without their spaces."""
    folded = [_fold(phrase) for phrase in blocked]
    if "" in folded:
        raise UserError(
            f"The blocked word {blocked[folded.index('')]!r} is empty, which every text contains; leave it out."
        )
    return tuple((phrase, phrase.replace(" ", "")) for phrase in folded)


def _pattern(phrase: str) -> str:
    """Return a regular expression for a phrase that may have spaces between its runs of letters or its letters."""
    runs, letters = (
        r"\s+".join(r"\s*".join(map(re.escape, re.findall(piece, word))) for word in phrase.split())
        for piece in (r"[^\W\d_]+|.", ".")
    )
    return rf"{runs}|(?<!\w){letters}(?!\w)"


def _listed(name: str, words: Iterable[str]) -> list[str]:
    if isinstance(words, str):
        raise UserError(f"The setting {name} is the text {words!r}, and a list of words is needed; write [{words!r}].")
    return list(words)


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    truncate: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Encode texts with start, end and padding.

    Args:
        tokenizer: The tokenizer.
        texts: P texts.
        length: Number of tokens that the text encoder takes, including start and end.
        truncate: Truncate texts that are too long, instead of refusing them.
        rows: Rows of the text encoder's table of token embeddings; texts with a token beyond them are refused. None for
            no limit.

    Returns:
        Token ids, (P, length).
    """
    texts = _listed("texts", texts)
    options = {"add_special_tokens": True, "padding": "max_length", "max_length": length, "truncation": truncate}
    lists = token_lists(tokenizer, texts, **options)
    for text, ids in zip(texts, lists, strict=True):
        if len(ids) > length:
            raise UserError(
                f"The text {_shortened(text)!r} has {len(ids)} tokens with start and end, and the text encoder takes "
                f"{length}; shorten it."
            )
    if rows is not None:
        check_embedded(tokenizer, texts, lists, rows)
    return torch.tensor(lists, dtype=torch.long).reshape(len(texts), length)


def fillers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return two words that are one token each, which mark the prompt's positions in a template."""
    special = set(tokenizer.all_special_ids)
    single = [
        word
        for word, ids in zip(FILLERS, token_lists(tokenizer, FILLERS), strict=True)
        if len(ids) == 1 and ids[0] not in special
    ]
    if len(single) < 2:
        raise UserError(
            f"The tokenizer does not read two of {', '.join(FILLERS)} as one token each; use CLIP's or T5's."
        )
    return single[0], single[1]


def template_ids(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tokens: int,
    length: int | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode a template and find the positions of the prompt's tokens.

    Args:
        tokenizer: The tokenizer.
        template: A text with one `{}`, such as "a photo of {} background".
        tokens: M, the number of prompt tokens.
        length: L, number of tokens that the text encoder takes; None for the tokenizer's `model_max_length`.
        rows: Rows of its table of token embeddings; a template with a token beyond them is refused. None for no limit.

    Returns:
        The ids with start, end and padding, (L,), with arbitrary tokens in place of the prompt, and the positions of
        the prompt's tokens, (M,). With word-final tokens at these positions, the ids equal those that `encode_text`
        returns for the filled template.
    """
    length = tokenizer.model_max_length if length is None else length
    if length > 10**6:  # transformers' value for an unknown length
        raise UserError("The tokenizer does not state how many tokens the text encoder takes; give the length.")
    if tokens < 1:
        raise UserError(f"A prompt must have at least 1 token, got {tokens}; give more.")
    words = fillers(tokenizer)
    one = fill_template(template, words[0])  # the whole prompt is not encoded yet, since it may not fit into memory
    used = len(token_lists(tokenizer, [one], add_special_tokens=True)[0]) + tokens - 1
    if used > length:
        room = length - used + tokens
        advice = f"use at most {room} prompt tokens or a shorter template" if room > 0 else "shorten the template"
        raise UserError(
            f"The template {template!r} has {used} tokens with start, end and {tokens} of the prompt, and the text "
            f"encoder takes {length}; {advice}."
        )
    texts = [fill_template(template, " ".join([word] * tokens)) for word in words]
    ids, others = encode_text(tokenizer, texts, length, rows=rows)
    return ids, (ids != others).nonzero().flatten()


def fill_template(template: str, text: str) -> str:
    """Fill a template with a prompt, with a space on either side so that its tokens do not change.

    Args:
        template: A text with one `{}`, such as "a photo of {}, oil on canvas".
        text: The prompt.
    """
    if template.count("{}") != 1:
        raise UserError(
            f"The template {template!r} has {template.count('{}')} pairs of braces; write {{}} exactly once."
        )
    if re.search(r"\w\{\}|\{\}\w", template):
        raise UserError(f"The braces in the template {template!r} touch a letter or digit; put a space between.")
    before, _, after = template.partition("{}")
    return " ".join(part for part in (before.strip(), text.strip(), after.strip()) if part)
