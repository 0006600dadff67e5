"""The spaces of prompts from all sources that a person names."""

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
from lightning_prompts.methods.dpo_diff.negative_words import library_slots
from lightning_prompts.methods.dpo_diff.neighbors import Neighbours
from lightning_prompts.methods.dpo_diff.space import Part, Slot, Space, Substitutes, negative_slots, positive_slots
from lightning_prompts.methods.dpo_diff.word_files import from_file
from lightning_prompts.methods.dpo_diff.wordnet import WordNet
from lightning_prompts.metrics.words import all_words, content_words

ANSWERS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_prompts" / "answers.json"
Source = Literal["synonyms", "antonyms", "neighbours", "library"]


class Sources:
    """Where the words come from that can stand in prompts and in their negative prompts.

    Args:
        vocabulary: The vocabulary that is searched.
        positive: Where words for a prompt's come from.
        negative: Where words of the negative prompt come from.
        dictionary: Where synonyms and antonyms come from: `wordnet`, a folder with its files, a JSON file in DPO-Diff's layout, or
            a language model: a folder, a hub id, or the URL of an endpoint that speaks OpenAI's protocol.
        empty: Whether words of a prompt can be left out.
        neighbours: How many of the text encoder's neighbours a word has.
        keep: Words of a prompt that stay as they are.
        offline: Do not connect to the hub.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        positive: Sequence[Source],
        negative: Sequence[Source],
        dictionary: str = "wordnet",
        empty: bool = False,
        neighbours: int = 5,
        keep: Sequence[str] = (),
        offline: bool = False,
    ) -> None:
        self.vocabulary, self.positive, self.negative = vocabulary, positive, negative
        self.dictionary, self.empty, self.count, self.offline = dictionary, empty, neighbours, offline
        self.keep = {word for text in keep for word in all_words(text)}

    def space(self, prompt: str) -> Space:
        """The words that can stand in a prompt and in its negative prompt.

        Words that the text encoder's tokenizer reads otherwise in their place than alone are left out, and of the longest words
        so many that every choice fits into the text encoder.

        Raises:
            UserError: There is no word that can be replaced.
        """
        by_kind = {kind: self.substitutes(prompt, kind) for kind in dict.fromkeys([*self.positive, *self.negative])}
        others = merged(by_kind[kind] for kind in self.positive)
        others = {name: words for name, words in others.items() if self.keep.isdisjoint(all_words(name))}
        fixed, slots = positive_slots(prompt, others, self.empty)
        space = Space(fixed, slots, negative_slots(prompt, merged(by_kind[kind] for kind in self.negative)))
        space = fitting(space, self.vocabulary)
        if not space.slots:
            raise UserError(
                f"The prompt {prompt!r} has no word that {', '.join(by_kind) or 'nothing'} can replace; name other "
                "sources as --model.positive or --model.negative."
            )
        return space

    def substitutes(self, prompt: str, kind: Source) -> Substitutes:
        """What a source says of a prompt's words."""
        words = dict.fromkeys(content_words(prompt))
        if kind == "library":
            return library_slots()
        if kind == "neighbours":
            return {word: self.neighbours(word) for word in words}
        if isinstance(self.look_up, LanguageModel):
            return self.look_up(prompt, kind)
        if isinstance(self.look_up, WordNet):
            others = self.look_up.synonyms if kind == "synonyms" else self.look_up.antonyms
            return {word: others(word) for word in words}
        if prompt not in self.look_up:
            raise UserError(
                f"The space {self.dictionary!r} has nothing for the prompt {prompt!r}; write it there as it stands."
            )
        return self.look_up[prompt][kind]

    @cached_property
    def neighbours(self) -> Neighbours:
        """The text encoder's."""
        return Neighbours(self.vocabulary, self.count)

    @cached_property
    def look_up(self) -> WordNet | LanguageModel | Mapping[str, Mapping[str, Substitutes]]:
        """The dictionary."""
        if self.dictionary.endswith(".json"):
            return from_file(self.dictionary)
        if self.dictionary == "wordnet" or (Path(self.dictionary) / "data.noun").is_file():
            return WordNet(None if self.dictionary == "wordnet" else self.dictionary)
        return LanguageModel(self.dictionary, ANSWERS, self.offline)


def merged(sources: Iterable[Substitutes]) -> dict[str, list[str]]:
    """The words of several sources under the same names."""
    together: dict[str, list[str]] = {}
    for words in sources:
        for name, others in words.items():
            together.setdefault(name.casefold(), []).extend(others)
    return together


def fitting(space: Space, vocabulary: Vocabulary) -> Space:
    """A space of which every choice is read as it was put together, and fits into the text encoder."""
    slots = [_sound(space, number, vocabulary) for number in range(len(space.slots))]
    split, room = len(space.positive), vocabulary.length - 2
    fixed = sum(map(len, token_lists(vocabulary.tokenizer, space.fixed)))
    positive = _short(slots[:split], room - fixed, 0, vocabulary)
    negative = _short(slots[split:], room + 1, 1, vocabulary)
    while negative and _longest(negative, 1, vocabulary) > room + 1:
        negative = negative[:-1]
    return replace(space, negative=space.negative[: len(negative)]).with_slots([*positive, *negative])


def _sound(space: Space, number: int, vocabulary: Vocabulary) -> Slot:
    """A slot without the words that are read otherwise in their place."""
    slot = space.slots[number]
    sound = [all(_joins(vocabulary, parts) for parts in space.parts(choice)) for choice in space.alone(number)]
    return Slot(slot.name, tuple(word for i, word in enumerate(slot.words) if i == 0 or sound[i]))


def _joins(vocabulary: Vocabulary, parts: Sequence[Part]) -> bool:
    """Whether a text has the tokens of its parts, and the text encoder an embedding for each."""
    whole, *pieces = token_lists(
        vocabulary.tokenizer, ["".join(part.text for part in parts), *(part.text for part in parts)]
    )
    return whole == list(chain.from_iterable(pieces)) and max(whole, default=0) < vocabulary.rows


def _short(slots: Sequence[Slot], room: int, comma: int, vocabulary: Vocabulary) -> list[Slot]:
    """Slots without their longest words, as far as the longest choice would have more tokens than there is room for.

    Words of one token stay, and those that are no longer than what they replace.
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
    """Tokens of the longest choice, beside the fixed text's."""
    return sum(
        comma + max(map(len, token_lists(vocabulary.tokenizer, slot.words))) for slot in slots if len(slot.words) > 1
    )
