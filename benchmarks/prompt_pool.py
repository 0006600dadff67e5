"""Prompts as a user would write them: the embedded model's objects and colors under other names, in other sentences."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from lightning_prompts.emoji import world

SENTENCES = (
    "a cute {size} {thing} on a {color} wall",
    "{thing} on {color}, 4k",
    "a nice {thing} against plain {color}",
    "a {thing} standing on {color} floor",
    "a {size} {thing} over a {color} background, hd",
    "{thing} cartoon, {color} background",
)


class PoolPrompt(NamedTuple):
    """A prompt and the content of its image, under the embedded model's own names."""

    prompt: str
    thing: str
    color: str


def sample_prompts(seed: int, count: int) -> list[PoolPrompt]:
    """Sample this many different prompts."""
    rng, prompts = random.Random(seed), dict[str, PoolPrompt]()
    while len(prompts) < count:
        thing, color = rng.choice(sorted(world.OBJECTS)), rng.choice(sorted(world.COLORS))
        names = [rng.choice([name, *others[name]]) for name, others in
                 ((thing, world.OBJECTS), (color, world.COLOR_SYNONYMS))]  # fmt: skip
        sizes = [size for name, others in world.SIZES.items() if name != "medium" for size in (name, *others)]
        prompt = rng.choice(SENTENCES).format(thing=names[0], color=names[1], size=rng.choice(sizes))
        prompt = re.sub(r"\ba (?=[aeiou](?!ni))", "an ", prompt)
        prompts.setdefault(prompt, PoolPrompt(prompt, thing, color))
    return list(prompts.values())
