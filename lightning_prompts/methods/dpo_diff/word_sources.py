"""The words of DPO-Diff's search space, from all sources that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from lightning_prompts.backbones import Vocabulary
from lightning_prompts.backbones.vocabulary import token_lists
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.language_model import LanguageModel
from lightning_prompts.methods.dpo_diff.negative_words import negative_word_slots
from lightning_prompts.methods.dpo_diff.neighbors import Neighbors
from lightning_prompts.methods.dpo_diff.space import Part, Slot, Space, Substitutes, negative_slots, positive_slots
from lightning_prompts.methods.dpo_diff.word_files import read_word_file
from lightning_prompts.methods.dpo_diff.wordnet import WordNet
from lightning_prompts.metrics.words import all_words, content_words

ANSWERS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_prompts" / "answers.json"
Source = Literal["synonyms", "antonyms", "neighbors", "library"]


class WordSources:
    """The sources of words for prompts and negative prompts.

    Args:
        vocabulary: The searched vocabulary.
        positive: Sources of substitutes for the words of a prompt.
        negative: Sources of words for the negative prompt.
        dictionary: Source of synonyms and antonyms: `wordnet`, a folder with its files, a JSON file in DPO-Diff's
            layout, or a language
            model: a folder, a hub id, or the URL of an endpoint with OpenAI's protocol.
        empty: Whether words of a prompt can be removed.
        neighbors: Neighbors per word in the text encoder.
        keep: Words of a prompt that must not change.
        offline: Do not connect to the hub.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        positive: Sequence[Source],
        negative: Sequence[Source],
        dictionary: str = "wordnet",
        empty: bool = False,
        neighbors: int = 5,
        keep: Sequence[str] = (),
        offline: bool = False,
    ) -> None:
        self.vocabulary, self.positive, self.negative = vocabulary, positive, negative
        self.dictionary, self.empty, self.count, self.offline = dictionary, empty, neighbors, offline
        self.keep = {word for text in keep for word in all_words(text)}

    def space(self, prompt: str) -> Space:
        """Return the words that can replace those of a prompt, and those of its negative prompt.

        Words that have other tokens in their place than alone are left out, and so are the longest words, until every
        choice fits into the text encoder.

        Raises:
            UserError: No word can be replaced.
        """
        by_kind = {kind: self.substitutes(prompt, kind) for kind in dict.fromkeys([*self.positive, *self.negative])}
        replacements = merge(by_kind[kind] for kind in self.positive)
        replacements = {name: words for name, words in replacements.items() if self.keep.isdisjoint(all_words(name))}
        fixed, slots = positive_slots(prompt, replacements, self.empty)
        space = Space(fixed, slots, negative_slots(prompt, merge(by_kind[kind] for kind in self.negative)))
        space = fit_to_encoder(space, self.vocabulary)
        if not space.slots:
            raise UserError(
                f"The prompt {prompt!r} has no word that {', '.join(by_kind) or 'nothing'} can replace; name other "
                "sources as --model.positive or --model.negative."
            )
        return space

    def substitutes(self, prompt: str, kind: Source) -> Substitutes:
        """Return a source's substitutes for the words of a prompt."""
        words = dict.fromkeys(content_words(prompt))
        if kind == "library":
            return negative_word_slots()
        if kind == "neighbors":
            return {word: self.neighbors(word) for word in words}
        if isinstance(self.lookup, LanguageModel):
            return self.lookup(prompt, kind)
        if isinstance(self.lookup, WordNet):
            others = self.lookup.synonyms if kind == "synonyms" else self.lookup.antonyms
            return {word: others(word) for word in words}
        if prompt not in self.lookup:
            raise UserError(
                f"The space {self.dictionary!r} has no entry for the prompt {prompt!r}; add one under exactly this "
                "text."
            )
        return self.lookup[prompt][kind]

    @cached_property
    def neighbors(self) -> Neighbors:
        """The neighbors in the text encoder."""
        return Neighbors(self.vocabulary, self.count)

    @cached_property
    def lookup(self) -> WordNet | LanguageModel | Mapping[str, Mapping[str, Substitutes]]:
        """The source of synonyms and antonyms."""
        if self.dictionary.endswith(".json"):
            return read_word_file(self.dictionary)
        if self.dictionary == "wordnet" or (Path(self.dictionary) / "data.noun").is_file():
            return WordNet(None if self.dictionary == "wordnet" else self.dictionary)
        return LanguageModel(self.dictionary, ANSWERS, self.offline)


def merge(sources: Iterable[Substitutes]) -> dict[str, list[str]]:
    """Merge the substitutes of several sources by word."""
    merged: dict[str, list[str]] = {}
    for words in sources:
        for name, others in words.items():
            merged.setdefault(name.casefold(), []).extend(others)
    return merged


def fit_to_encoder(space: Space, vocabulary: Vocabulary) -> Space:
    """Remove words until every choice has the tokens of its parts, and fits into the text encoder."""
    slots = [_tokenized_alike(space, number, vocabulary) for number in range(len(space.slots))]
    split, room = len(space.positive), vocabulary.length - 2
    fixed = sum(map(len, token_lists(vocabulary.tokenizer, space.fixed)))
    positive = _without_longest(slots[:split], room - fixed, 0, vocabulary)
    negative = _without_longest(slots[split:], room + 1, 1, vocabulary)
    while negative and _longest(negative, 1, vocabulary) > room + 1:
        negative = negative[:-1]
    return replace(space, negative=space.negative[: len(negative)]).with_slots([*positive, *negative])


def _tokenized_alike(space: Space, number: int, vocabulary: Vocabulary) -> Slot:
    """Return a slot without the words that have other tokens in their place than alone."""
    slot = space.slots[number]
    alike = [all(_joins(vocabulary, parts) for parts in space.parts(choice)) for choice in space.single_changes(number)]
    return Slot(slot.name, tuple(word for i, word in enumerate(slot.words) if i == 0 or alike[i]))


def _joins(vocabulary: Vocabulary, parts: Sequence[Part]) -> bool:
    """Return whether a text has the tokens of its parts, and the text encoder an embedding for each."""
    whole, *pieces = token_lists(
        vocabulary.tokenizer, ["".join(part.text for part in parts), *(part.text for part in parts)]
    )
    return whole == list(chain.from_iterable(pieces)) and max(whole, default=0) < vocabulary.rows


def _without_longest(slots: Sequence[Slot], room: int, comma: int, vocabulary: Vocabulary) -> list[Slot]:
    """Remove the longest words until the longest choice fits.

    Words of one token stay, and so do words that are no longer than the one that they replace.

    Args:
        slots: The slots.
        room: The most tokens of a choice.
        comma: Tokens between the words of two slots.
        vocabulary: The searched vocabulary.
    """
    words = [word for slot in slots for word in slot.words]
    counts = dict(zip(words, map(len, token_lists(vocabulary.tokenizer, words)), strict=True))
    shorter = list(slots)
    for most in range(max(counts.values(), default=1), 0, -1):
        shorter = [
            Slot(slot.name, tuple(word for word in slot.words if counts[word] <= max(most, counts[slot.words[0]])))
            for slot in slots
        ]
        if _longest(shorter, comma, vocabulary) <= room:
            break
    return shorter


def _longest(slots: Sequence[Slot], comma: int, vocabulary: Vocabulary) -> int:
    """Return the tokens of the longest choice, without the fixed text."""
    return sum(
        comma + max(map(len, token_lists(vocabulary.tokenizer, slot.words))) for slot in slots if len(slot.words) > 1
    )
