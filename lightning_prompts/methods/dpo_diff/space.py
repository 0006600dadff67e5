"""The prompts that a search can choose from: a text with slots, and the words that can stand in each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Substitutes = Mapping[str, Sequence[str]]
"""What can stand in the place of words or phrases of a prompt."""


class Slot(NamedTuple):
    """A place for a word; the first one is what stands there before the search: a word of the prompt, or nothing."""

    name: str
    words: tuple[str, ...]


class Part(NamedTuple):
    """A piece of a text: fixed, or the word that was chosen for a slot."""

    text: str
    slot: int | None = None


@dataclass(frozen=True)
class Space:
    """Positive and negative prompts: a choice of a word for each slot.

    Attributes:
        fixed: The text before, between and behind the slots of the positive prompt, one piece more than these are.
        positive: The slots of the positive prompt.
        negative: Those of the negative prompt, whose words stand behind each other with commas between.
    """

    fixed: tuple[str, ...]
    positive: tuple[Slot, ...] = ()
    negative: tuple[Slot, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, in the order of a choice."""
        return self.positive + self.negative

    @property
    def size(self) -> int:
        """How many choices there are."""
        return math.prod(len(slot.words) for slot in self.slots)

    def parts(self, choice: Sequence[int]) -> tuple[list[Part], list[Part]]:
        """What the positive and the negative prompt consist of; a slot without a word takes its comma with it."""
        words = [slot.words[i] for slot, i in zip(self.slots, choice, strict=True)]
        text, split = [Part(self.fixed[0])], len(self.positive)
        for number, (word, after) in enumerate(zip(words[:split], self.fixed[1:], strict=True)):
            before = text[-1].text if text[-1].slot is None else ""
            if not word and re.search(r"[,;]\s*$", before):
                text[-1] = Part(re.sub(r"\s*[,;]\s*$", "", before))
            elif not word and re.match(r"\s*[,;]", after):
                after = re.sub(r"^\s*[,;]\s*", "", after)
            elif not word:
                after = after.lstrip()
            text += [Part(word, number), Part(after)]
        away: list[Part] = []
        for number, word in enumerate(words[split:], split):
            if word:
                away += [Part(", "), Part(word, number)] if away else [Part(word, number)]
        return [part for part in text if part.text], away

    def alone(self, number: int) -> list[tuple[int, ...]]:
        """A choice for each word of a slot, with what stood there before in all others."""
        return [tuple(word if slot == number else 0 for slot in range(len(self.slots)))
                for word in range(len(self.slots[number].words))]  # fmt: skip

    def with_slots(self, slots: Sequence[Slot]) -> Space:
        """The space with other words in its slots; a slot that has one word left is text again, or gone from the negative prompt."""
        split = len(self.positive)
        pieces, kept, text = list[str](), list[Slot](), self.fixed[0]
        for slot, after in zip(slots[:split], self.fixed[1:], strict=True):
            if len(slot.words) > 1:
                pieces.append(text)
                kept.append(slot)
                text = after
            else:
                text += slot.words[0] + after
        negative = tuple(slot for slot in slots[split:] if len(slot.words) > 1)
        return Space((*pieces, text), tuple(kept), negative)

    def table(self) -> list[str]:
        """Lines of a table, one a slot: where it stands, what it is of, and the words that can stand there."""
        sides = [("positive", self.positive), ("negative", self.negative)]
        rows = [
            f"| {side} | {slot.name} | {', '.join(word or '(nothing)' for word in slot.words)} |"
            for side, slots in sides
            for slot in slots
        ]
        return ["| prompt | slot | words |", "|---|---|---|", *rows]

    def texts(self, choice: Sequence[int]) -> tuple[str, str]:
        """The positive and the negative prompt."""
        positive, negative = ("".join(part.text for part in parts) for parts in self.parts(choice))
        return positive.strip(), negative


def positive_slots(
    prompt: str, substitutes: Substitutes, empty: bool = False
) -> tuple[tuple[str, ...], tuple[Slot, ...]]:
    """Cuts a prompt at the words and phrases that have substitutes.

    Args:
        prompt: The person's.
        substitutes: What can stand in the place of what, in whatever case; longer phrases go first.
        empty: Whether a slot can also be left empty.

    Returns:
        The fixed text around the slots, and the slots in the order of the text, the word itself first in each.
    """
    by_phrase = {phrase.casefold(): words for phrase, words in substitutes.items() if phrase.strip()}
    phrases = sorted(by_phrase, key=len, reverse=True)
    if not phrases:
        return (prompt,), ()
    fixed, slots, end = [], [], 0
    for match in re.finditer(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)", prompt, re.IGNORECASE):
        words = _distinct([match[0], *by_phrase[match[0].casefold()]], [""] if empty else [])
        if len(words) > 1:
            fixed.append(prompt[end : match.start()])
            slots.append(Slot(match[0], words))
            end = match.end()
    return (*fixed, prompt[end:]), tuple(slots)


def negative_slots(prompt: str, substitutes: Substitutes) -> tuple[Slot, ...]:
    """A slot for each word or phrase that has substitutes, empty at first; what the prompt itself says is left out."""
    slots = (Slot(name, _distinct([""], words, prompt)) for name, words in substitutes.items())
    return tuple(slot for slot in slots if len(slot.words) > 1)


def _distinct(first: Sequence[str], more: Sequence[str], without: str = "") -> tuple[str, ...]:
    """Words in their order, each once whatever its case, without those that a text has."""
    said = set(re.findall(r"\w+", without.casefold()))
    kept: dict[str, str] = {}
    for word in (*first, *more):
        word = " ".join(word.split())
        if word.casefold() not in said:
            kept.setdefault(word.casefold(), word)
    return tuple(kept.values())
