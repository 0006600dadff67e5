"""Where candidate words come from, and the spaces of prompts that they span."""

from lightning_prompts.substitutes.build import Source, Sources
from lightning_prompts.substitutes.file import from_file
from lightning_prompts.substitutes.library import LIBRARY
from lightning_prompts.substitutes.meaning import Meaning, keeping
from lightning_prompts.substitutes.neighbours import Neighbours
from lightning_prompts.substitutes.space import Slot, Space, negative_slots, positive_slots
from lightning_prompts.substitutes.wordnet import WordNet

__all__ = [
    "LIBRARY",
    "Meaning",
    "Neighbours",
    "Slot",
    "Source",
    "Sources",
    "Space",
    "WordNet",
    "from_file",
    "keeping",
    "negative_slots",
    "positive_slots",
]
