"""The search space of DPO-Diff: a text with slots, and the words that can fill each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Substitutes = Mapping[str, Sequence[str]]
"""The words that can replace a word or phrase of a prompt, by this word or phrase."""

Choice = tuple[int, ...]
"""The index of the chosen word of each slot."""


class Slot(NamedTuple):
    """A position for a word; its first word leaves the prompt unchanged: the prompt's own, or an empty text."""

    name: str
    words: tuple[str, ...]


class Part(NamedTuple):
    """A piece of a text: fixed, or the word chosen for a slot."""

    text: str
    slot: int | None = None


@dataclass(frozen=True)
class Space:
    """Positive and negative prompts, given by a word for each slot.

    Attributes:
        fixed: The text before, between and after the slots of the positive prompt, one more piece than slots.
        positive: The slots of the positive prompt.
        negative: The slots of the negative prompt, whose words are separated by commas.
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
        """The number of choices."""
        return math.prod(len(slot.words) for slot in self.slots)

    def parts(self, choice: Sequence[int]) -> tuple[list[Part], list[Part]]:
        """Return the parts of the positive and the negative prompt; an empty slot loses its comma, too."""
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
        negative: list[Part] = []
        for number, word in enumerate(words[split:], split):
            if word:
                negative += [Part(", "), Part(word, number)] if negative else [Part(word, number)]
        return [part for part in text if part.text], negative

    def single_changes(self, number: int) -> list[Choice]:
        """Return a choice for each word of a slot, with the first word in all other slots."""
        return [tuple(word if slot == number else 0 for slot in range(len(self.slots)))
                for word in range(len(self.slots[number].words))]  # fmt: skip

    def with_slots(self, slots: Sequence[Slot]) -> Space:
        """Return the space with other words; a slot of one word becomes fixed text, or leaves the negative prompt."""
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
        """Return the lines of a Markdown table of the slots: the prompt, the slot's name and its words."""
        sides = [("positive", self.positive), ("negative", self.negative)]
        rows = [
            f"| {side} | {slot.name} | {', '.join(word or '(nothing)' for word in slot.words)} |"
            for side, slots in sides
            for slot in slots
        ]
        return ["| prompt | slot | words |", "|---|---|---|", *rows]

    def texts(self, choice: Sequence[int]) -> tuple[str, str]:
        """Return the positive and the negative prompt."""
        positive, negative = ("".join(part.text for part in parts) for parts in self.parts(choice))
        return positive.strip(), negative


def positive_slots(
    prompt: str, substitutes: Substitutes, empty: bool = False
) -> tuple[tuple[str, ...], tuple[Slot, ...]]:
    """Split a prompt at the words and phrases that have substitutes.

    Args:
        prompt: The user's prompt.
        substitutes: The substitutes of words and phrases, whatever their case; longer phrases take precedence.
        empty: Whether a slot can also be empty.

    Returns:
        The fixed text around the slots, and the slots in the order of the text, with the prompt's word first in each.
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
    """Return a slot per word or phrase with substitutes: an empty text first, and no words of the prompt."""
    slots = (Slot(name, _distinct([""], words, prompt)) for name, words in substitutes.items())
    return tuple(slot for slot in slots if len(slot.words) > 1)


def _distinct(first: Sequence[str], more: Sequence[str], without: str = "") -> tuple[str, ...]:
    """Return words in their order, each once whatever its case, without those of a text."""
    excluded = set(re.findall(r"\w+", without.casefold()))
    kept: dict[str, str] = {}
    for word in (*first, *more):
        word = " ".join(word.split())
        if word.casefold() not in excluded:
            kept.setdefault(word.casefold(), word)
    return tuple(kept.values())
