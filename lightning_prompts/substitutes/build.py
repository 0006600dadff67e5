"""The space of a prompt from all sources that a person names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lightning_prompts.backbones import TextTower
from lightning_prompts.errors import UserError
from lightning_prompts.metrics.words import content_words
from lightning_prompts.substitutes.file import from_file
from lightning_prompts.substitutes.language_model import LanguageModel
from lightning_prompts.substitutes.library import LIBRARY
from lightning_prompts.substitutes.neighbours import Neighbours
from lightning_prompts.substitutes.space import Slot, Space, Substitutes, negative_slots, positive_slots
from lightning_prompts.substitutes.wordnet import WordNet

SLOTS = 4  # of the library in a negative prompt, as in the paper
ANSWERS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_prompts" / "answers.json"
Source = Literal["synonyms", "antonyms", "neighbours", "library"]


def build_space(
    prompt: str,
    tower: TextTower,
    positive: Sequence[Source],
    negative: Sequence[Source],
    dictionary: str = "wordnet",
    empty: bool = False,
    offline: bool = False,
) -> Space:
    """The words that can stand in a prompt and in its negative prompt.

    Words that the text encoder's tokenizer reads otherwise in their place than alone are left out, and of the longest words so
    many that every choice fits into the text encoder.

    Args:
        prompt: The person's.
        tower: The text encoder.
        positive: Where words for the prompt's come from.
        negative: Where words of the negative prompt come from.
        dictionary: Where synonyms and antonyms come from: `wordnet`, a folder with its files, a JSON file in DPO-Diff's layout, or
            a language model: a folder, a hub id, or the URL of an endpoint that speaks OpenAI's protocol.
        empty: Whether words of the prompt can be left out.
        offline: Do not connect to the hub.

    Raises:
        UserError: There is no word that can be replaced.
    """
    by_kind = {
        kind: substitutes(prompt, tower, kind, dictionary, offline) for kind in dict.fromkeys([*positive, *negative])
    }
    fixed, slots = positive_slots(prompt, merged(by_kind[kind] for kind in positive), empty)
    space = Space(fixed, slots, negative_slots(prompt, merged(by_kind[kind] for kind in negative)))
    space = fitting(space, tower)
    if not space.slots:
        raise UserError(
            f"The prompt {prompt!r} has no word that {', '.join([*positive, *negative]) or 'nothing'} can replace; name other "
            "sources as --model.positive or --model.negative."
        )
    return space


def substitutes(prompt: str, tower: TextTower, kind: Source, dictionary: str, offline: bool) -> Substitutes:
    """What a source says of a prompt's words."""
    words = dict.fromkeys(content_words(prompt))
    if kind == "library":
        kinds = list(LIBRARY)
        groups = [kinds[i : i + len(kinds) // SLOTS] for i in range(0, len(kinds), len(kinds) // SLOTS)]
        return {" and ".join(group): [word for name in group for word in LIBRARY[name]] for group in groups}
    if kind == "neighbours":
        near = Neighbours(tower)
        return {word: near(word) for word in words}
    if dictionary.endswith(".json"):
        spaces = from_file(dictionary)
        if prompt not in spaces:
            raise UserError(
                f"The space {dictionary!r} has nothing for the prompt {prompt!r}; write it there as it stands."
            )
        return spaces[prompt][kind]
    if dictionary == "wordnet" or (Path(dictionary) / "data.noun").is_file():
        wordnet = WordNet(None if dictionary == "wordnet" else dictionary)
        look_up = wordnet.synonyms if kind == "synonyms" else wordnet.antonyms
        return {word: look_up(word) for word in words}
    return LanguageModel(dictionary, ANSWERS, offline)(prompt, kind)


def merged(sources: Iterable[Substitutes]) -> dict[str, list[str]]:
    """The words of several sources under the same names."""
    together: dict[str, list[str]] = {}
    for words in sources:
        for name, others in words.items():
            together.setdefault(name.casefold(), []).extend(others)
    return together


def fitting(space: Space, tower: TextTower) -> Space:
    """A space of which every choice is read as it was put together, and fits into the text encoder."""
    slots = [_sound(space, number, tower) for number in range(len(space.slots))]
    split, room = len(space.positive), tower.length - 2
    fixed = sum(len(_tokens(tower, text)) for text in space.fixed)
    positive = _short(slots[:split], room - fixed, 0, tower)
    negative = _short(slots[split:], room + 1, 1, tower)
    while negative and _length(negative, 1, tower) > room + 1:
        negative = negative[:-1]
    return replace(space, negative=space.negative[: len(negative)]).with_slots([*positive, *negative])


def _sound(space: Space, number: int, tower: TextTower) -> Slot:
    """A slot without the words that are read otherwise in their place."""
    slot, kept = space.slots[number], []
    for i, word in enumerate(slot.words):
        choice = [i if other == number else 0 for other in range(len(space.slots))]
        sides = space.parts(choice)
        if i == 0 or all(
            _tokens(tower, "".join(part.text for part in parts))
            == [t for part in parts for t in _tokens(tower, part.text)]
            for parts in sides
        ):
            kept.append(word)
    return Slot(slot.name, tuple(kept))


def _short(slots: Sequence[Slot], room: int, comma: int, tower: TextTower) -> list[Slot]:
    """Slots without their longest words, as far as the longest choice would have more tokens than there is room for.

    Words of one token stay, and those that are no longer than what they replace.
    """
    counts = {word: len(_tokens(tower, word)) for slot in slots for word in slot.words}
    shorter = list(slots)
    for most in range(max(counts.values(), default=1), 0, -1):
        shorter = [
            Slot(slot.name, tuple(word for word in slot.words if counts[word] <= max(most, counts[slot.words[0]])))
            for slot in slots
        ]
        if _length(shorter, comma, tower) <= room:
            break
    return shorter


def _length(slots: Sequence[Slot], comma: int, tower: TextTower) -> int:
    return sum(comma + max(len(_tokens(tower, word)) for word in slot.words) for slot in slots if len(slot.words) > 1)


def _tokens(tower: TextTower, text: str) -> list[int]:
    ids: list[int] = tower.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
