"""Token ids and the text that they stand for: which may be used, which is nearest, which survive being written down.

A prompt is a text that a person pastes elsewhere, so ids count only if the tokenizer reads their text as these same ids. Byte-pair
tokenizers do not promise that: CLIP's `cane` followed by `leroy</w>` is written `caneleroy`, which is read as other tokens.
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

_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are drawn as nothing
LARGEST = 1e18  # norm of an embedding, whose square still has room in float32
# CLIP has a token for each letter as a word of its own, and T5 for longer words.
FILLERS = ("a", "b", "the", "of", "in", "to")


@torch.no_grad()
def nearest_tokens(
    embeddings: Tensor, table: Tensor, allowed: Tensor, metric: Metric = "euclidean", chunk: int | None = None
) -> Tensor:
    """Projects embeddings onto the vocabulary.

    A matrix product rules out the rows that cannot be nearest and the few that remain are measured by their difference, which
    loses no digits; the answer is the same whether the product runs in float32, TF32 or bfloat16. Of rows that are equally near,
    the one with the lowest id is returned. The host waits for the device once a product, to learn how many rows remain.

    Args:
        embeddings: What to project, (..., D), such as (P, M, D).
        table: The text encoder's token embeddings, (V, D).
        allowed: Which tokens may be returned, (V,) bool.
        metric: By which distance; with "cosine" a row of zeros is never nearest.
        chunk: Rows of the table in a product, which bounds the memory; None for all, as far as that is 8 MB of distances.

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
    sound, cosine = (length < LARGEST).all(), metric == "cosine"
    queries = x / length.clamp_min(1e-30) if cosine else x
    length = queries.norm(dim=-1, keepdim=True)
    rounding = (x.shape[-1] + 8) * 2.0**-22  # of a sum of D float32 products, relative to the norms
    bound = x.new_full((len(x), 1), torch.inf)  # the nearest row is no farther, (N, 1)
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
        scores = norms.square() - 2 * scores  # squared distances less that of the origin, (N, C)
        error = norms * ((0.016 + rounding) * length + rounding * norms)  # 0.016: factors cut to bfloat16's 8 bits
        farthest = (scores + error).masked_fill(~usable, torch.inf)
        bound = torch.minimum(bound, farthest.amin(1, keepdim=True))
        which, near = (usable & (scores - error <= bound)).nonzero(as_tuple=True)
        candidates.append(torch.stack([which, first + near]))
    if not sound:
        raise UserError("The embeddings to project are not finite or larger than 1e18; lower the learning rate.")
    which, ids = torch.cat(candidates, 1)
    if len(x) and not len(which):
        raise UserError("No token is allowed that has an embedding to compare with; block fewer words or allow more.")
    pairs = zip(which.split(8192), ids.to(table.device).split(8192), strict=True)
    distances = torch.cat([_distances(x[n], table[i].to(x), metric) for n, i in pairs])
    # A few numbers, so on the CPU, where scatter_reduce is deterministic.
    which, ids, distances = which.cpu(), ids.cpu(), distances.cpu()
    least = distances.new_full((len(x),), torch.inf).scatter_reduce(0, which, distances, "amin")
    slack = 1e-14 if cosine else 0.0  # multiples of one row are equally near but for the last digit
    nearest = distances <= least[which] + slack
    found: Tensor = ids.new_full((len(x),), len(table)).scatter_reduce(0, which[nearest], ids[nearest], "amin")
    return found.reshape(embeddings.shape[:-1]).to(x.device)


def _distances(x: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Squared distances between vectors, or between their directions: (C, D) and (C, D) to (C,)."""
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
    """Finds the tokens that a search may use.

    These are the tokens that survive the round trip alone (in CLIP: tokens that end a word, in lower case), are neither special
    nor added, and whose text is valid and has something to see: a letter, a digit, punctuation or a symbol. A control
    character, a zero-width space or an accent without its letter is not enough.

    Args:
        tokenizer: The tokenizer.
        blocked: Texts that no token may contain, in whatever case. Words of several tokens are `contains_blocked`'s.
        words: The only words that may be used; those of several tokens cannot be.
        rows: V, rows of the table of token embeddings, which may have more or fewer rows than the tokenizer has tokens (T5's
            has 32128 rows for 32100 tokens); None for as many as there are tokens. Rows without a token are not allowed.
        others: Tokenizers with the same vocabulary that must read a token's text as this token, too. SDXL's second one reads
            "!" as its padding.

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
            raise UserError(f"The tokenizer has {size} tokens and none that a search may use; use CLIP's tokenizer.")
        raise UserError(
            f"Of the {before} tokens that a search may use, the setting {' with the setting '.join(settings)} leaves none; "
            "give more words that are one token or block fewer."
        )
    return allowed


def _visible(text: str) -> bool:
    return "\ufffd" not in text and any(unicodedata.category(c)[0] in "LNPS" and c not in _BLANKS for c in text)


def round_trip(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> tuple[list[str], Tensor]:
    """Writes prompts down and reads them again.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids without start, end and padding, (P, M).

    Returns:
        The P texts, words apart by one space, and which of them are read as exactly these ids, (P,) bool. A special token is no
        text, so that a row with one does not survive.
    """
    rows, texts, special = ids.tolist(), decode(tokenizer, ids), set(tokenizer.all_special_ids)
    again = token_lists(tokenizer, texts)
    same = [row == other and special.isdisjoint(row) for row, other in zip(rows, again, strict=True)]
    return texts, torch.tensor(same, dtype=torch.bool, device=ids.device)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """Write token ids (P, M), without start, end and padding, as P texts whose words are one space apart."""
    rows = ids.tolist()
    decoded = rows and tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [" ".join(text.split()) for text in decoded]


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Token ids of texts, each of its own length: without start and end, and none cut, unless `options` ask for it."""
    if not texts:
        return []  # transformers cannot
    options = {"add_special_tokens": False, "truncation": False, "verbose": False, **options}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids


def check_embedded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ids: Sequence[Sequence[int]], rows: int
) -> None:
    """Refuse texts with a token that the text encoder has no embedding for, such as one that was added to the tokenizer alone.

    Args:
        tokenizer: The tokenizer.
        texts: P texts.
        ids: Their token ids.
        rows: Rows of the text encoder's table of token embeddings.
    """
    for text, row in zip(texts, ids, strict=True):
        if row and max(row) >= rows:
            raise UserError(
                f"The text {_shortened(text)!r} contains the token {tokenizer.convert_ids_to_tokens(max(row))!r}, for which the "
                f"text encoder's table of {rows} rows has no embedding; leave it out, or use the tokenizer that belongs to the "
                "text encoder."
            )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def contains_blocked(text: str, blocked: Iterable[str]) -> bool:
    """Tells whether a text contains a blocked text, in whatever case and however it was cut into tokens.

    Decoded prompts have spaces that nobody wrote: "don't" comes back as "don 't" and "2024" as "2 0 2 4". Between a run of
    letters and a digit or sign, space is therefore ignored. Whole words that spell a blocked one, as "nu de" does, contain it
    too; "glass exit" does not contain "sex". Compatibility forms (full-width letters) count as the letter, and characters
    without a shape (zero-width space, soft hyphen) as nothing.

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
    """Folded texts with and without their spaces."""
    folded = [_fold(phrase) for phrase in blocked]
    if "" in folded:
        raise UserError(
            f"The blocked word {blocked[folded.index('')]!r} is empty, which every text contains; leave it out."
        )
    return tuple((phrase, phrase.replace(" ", "")) for phrase in folded)


def _pattern(phrase: str) -> str:
    """What to search for: the phrase with space between its runs of letters, or between all letters of whole words."""
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
    cut: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Encodes texts with start, end and padding.

    Args:
        tokenizer: The tokenizer.
        texts: P texts.
        length: How many tokens the text encoder takes, start and end included.
        cut: Cut off words at the end of texts that are too long, instead of refusing these.
        rows: Rows of the text encoder's table of token embeddings; texts with a token beyond them are refused. None for any.

    Returns:
        Token ids, (P, length).
    """
    texts = _listed("texts", texts)
    how = {"add_special_tokens": True, "padding": "max_length", "max_length": length, "truncation": cut}
    lists = token_lists(tokenizer, texts, **how)
    for text, ids in zip(texts, lists, strict=True):
        if len(ids) > length:
            raise UserError(
                f"The text {_shortened(text)!r} has {len(ids)} tokens with start and end, and the text encoder takes {length}; "
                "shorten it."
            )
    if rows is not None:
        check_embedded(tokenizer, texts, lists, rows)
    return torch.tensor(lists, dtype=torch.long).reshape(len(texts), length)


def fillers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Find two words that are one token each, to find out where a prompt's tokens are in a text."""
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
    """Encodes a template and says where the prompt's tokens belong.

    Args:
        tokenizer: The tokenizer.
        template: A text with one `{}`, such as "a photo of {} background".
        tokens: M, how many tokens the prompt has.
        length: L, how many tokens the text encoder takes; by default what the tokenizer says.
        rows: Rows of its table of token embeddings; a template with a token beyond them is refused. None for any.

    Returns:
        The ids with start, end and padding, (L,), in which any token stands in the prompt's place, and the positions of the
        prompt's tokens, (M,). Word-final tokens put there give what `encode_text` makes of the filled template.
    """
    length = tokenizer.model_max_length if length is None else length
    if length > 10**6:  # what transformers writes when it does not know
        raise UserError("The tokenizer does not say how many tokens the text encoder takes; give the length.")
    if tokens < 1:
        raise UserError(f"A prompt of {tokens} tokens was asked for; it needs at least 1.")
    words = fillers(tokenizer)
    one = fill_template(template, words[0])  # so many tokens may be asked for that no memory holds them
    used = len(token_lists(tokenizer, [one], add_special_tokens=True)[0]) + tokens - 1
    if used > length:
        room = length - used + tokens
        advice = f"use at most {room} prompt tokens or a shorter template" if room > 0 else "shorten the template"
        raise UserError(
            f"The template {template!r} has {used} tokens with start, end and {tokens} of the prompt, and the text encoder "
            f"takes {length}; {advice}."
        )
    texts = [fill_template(template, " ".join([word] * tokens)) for word in words]
    ids, others = encode_text(tokenizer, texts, length, rows=rows)
    return ids, (ids != others).nonzero().flatten()


def fill_template(template: str, text: str) -> str:
    """Writes a prompt into a template, with a space on either side so that its tokens stay what they are.

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
