"""Scenes of the embedded model, their images and captions: one emoji or colored shape on a colored background.

Emoji are rendered with a font, by their English CLDR names. Rendering them needs the font and the package `emoji`; the
model itself needs neither.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

SIZE = 64
"""Height and width of an image in pixels."""

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""The font, as Debian's package fonts-noto-color-emoji installs it."""

_SPRITE = 128  # side of the sprites that scenes are composed from, in pixels

_NAMES = """
    monkey/ape gorilla dog/hound/puppy wolf fox/vixen raccoon cat/kitten lion tiger horse/stallion unicorn zebra
    deer/stag cow pig/hog goat camel giraffe elephant rhinoceros/rhino hippopotamus/hippo mouse
    rabbit/bunny/hare hedgehog bat bear koala panda skunk kangaroo turkey chicken/hen rooster penguin eagle
    duck/mallard swan owl flamingo peacock parrot frog/toad crocodile/alligator turtle/tortoise snake/serpent
    dragon sauropod/dinosaur whale dolphin fish blowfish/pufferfish shark octopus snail butterfly/moth
    honeybee/bee spider crab shrimp/prawn rose sunflower tulip cactus mushroom/toadstool grapes watermelon lemon
    banana pineapple pear peach cherries strawberry blueberries tomato coconut avocado eggplant/aubergine carrot
    broccoli bread/loaf croissant pretzel pancakes waffle hamburger/burger pizza sandwich taco popcorn sushi
    doughnut/donut cookie/biscuit cupcake/muffin lollipop bus/coach ambulance taxi/cab automobile/car
    truck/lorry tractor motorcycle/motorbike bicycle/bike airplane/plane helicopter rocket/spaceship
    sailboat/yacht ship/boat anchor house/home castle/fortress tent umbrella/parasol snowman fire/flame balloon
    trophy basketball volleyball bowling guitar trumpet violin/fiddle drum saxophone television camera telephone
    laptop/computer candle pencil scissors key hammer axe/hatchet dagger shield magnet microscope telescope door
    bed chair toilet broom basket crown necktie jeans/trousers dress/gown handbag/purse backpack/rucksack
    lipstick bell hourglass sun cloud rainbow snowflake ghost/phantom alien robot/android skull eye brain tooth
    bone ear nose
"""

EMOJI: dict[str, tuple[str, ...]] = {
    name: tuple(synonyms) for name, *synonyms in (entry.split("/") for entry in _NAMES.split())
}
"""Names of the emoji, with their synonyms."""
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("disc",), "square": ("box",), "triangle": (), "diamond": ("rhombus",), "star": (), "heart": (),
    "cross": ("plus",), "ring": ("hoop",), "hexagon": (), "arrow": (),
}  # fmt: skip
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (250, 220, 50),
    "orange": (250, 140, 30), "purple": (130, 50, 180), "pink": (250, 150, 190), "brown": (120, 75, 40),
    "black": (15, 15, 18), "white": (245, 245, 245), "gray": (128, 128, 128), "cyan": (50, 210, 220),
}  # fmt: skip
COLOR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"), "green": ("emerald",), "blue": ("azure",), "yellow": ("golden",),
    "orange": ("amber",), "purple": ("violet",), "pink": ("rosy",), "brown": ("chocolate",), "black": ("ebony",),
    "white": ("snowy",), "gray": ("grey", "silver"), "cyan": ("turquoise", "aqua"),
}  # fmt: skip
SIZES: dict[str, tuple[str, ...]] = {"small": ("little", "tiny"), "medium": (), "large": ("big", "huge")}
PLACES: dict[str, tuple[str, ...]] = {
    "center": ("in the middle", "in the center"), "top": ("at the top",), "bottom": ("at the bottom",),
    "left": ("on the left",), "right": ("on the right",),
}  # fmt: skip
LOOKS: dict[str, tuple[str, ...]] = {"plain": (), "blurry": ("blurred",), "dark": ("dim",), "grainy": ("noisy",)}
PATTERNS: dict[str, tuple[str, ...]] = {"plain": (), "striped": (), "dotted": ("spotted",)}

OBJECTS: dict[str, tuple[str, ...]] = EMOJI | SHAPES
"""Names of all objects, with their synonyms."""

_UNMENTIONED = {"plain", "medium"}  # values that captions leave out

SYNONYMS: dict[str, tuple[str, ...]] = OBJECTS | COLOR_SYNONYMS | SIZES | LOOKS | PATTERNS
"""Names of all objects and attributes except places, with their synonyms."""

_CLDR = {"truck": "delivery_truck", "hourglass": "hourglass_done"}  # CLDR names that are shortened here
_PIXELS = {"small": 27, "medium": 37, "large": 50}
_OFFSETS = {"center": (0, 0), "top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0)}


@dataclass(frozen=True)
class Scene:
    """The content of an image; `seed` determines the exact place, size, tint and grain."""

    object: str
    color: str | None
    pattern: str
    background: str
    size: str
    place: str
    look: str
    seed: int


def random_scene(rng: random.Random) -> Scene:
    """Sample a scene; shapes have another color than the background and, in half of the cases, a pattern."""
    background = rng.choice(list(COLORS))
    if rng.random() < 0.12:
        name = rng.choice(list(SHAPES))
        color = rng.choice([c for c in COLORS if c != background])
        pattern = rng.choice(["plain", "plain", "striped", "dotted"])
    else:
        name, color, pattern = rng.choice([o for o in OBJECTS if o not in SHAPES]), None, "plain"
    size = rng.choices(list(SIZES), (1, 2, 2))[0]
    place = rng.choices(list(PLACES), (3, 1, 1, 1, 1))[0]
    look = rng.choices(list(LOOKS), (7, 1, 1, 1))[0]
    return Scene(name, color, pattern, background, size, place, look, rng.getrandbits(32))


def _word_or_synonym(word: str, rng: random.Random, synonym_share: float) -> str:
    synonyms = SYNONYMS.get(word, ())
    return rng.choice(synonyms) if synonyms and rng.random() < synonym_share else word


def caption(scene: Scene, rng: random.Random, keep: float | None = None, synonym_share: float = 0.25) -> str:
    """Sample a caption of a scene, in one of several forms.

    Args:
        scene: The scene to describe.
        rng: Source of all random choices.
        keep: Probability of mentioning an attribute, for all attributes; None for a default of each.
        synonym_share: Probability of replacing a word by one of its synonyms.
    """

    def maybe(word: str | None, chance: float) -> str:
        omitted = word in (None, *_UNMENTIONED) or rng.random() > (chance if keep is None else keep)
        return "" if omitted else _word_or_synonym(str(word), rng, synonym_share)

    look, size = maybe(scene.look, 0.8), maybe(scene.size, 0.6)
    pattern, color = maybe(scene.pattern, 0.8), maybe(scene.color, 0.85)
    background = maybe(scene.background, 0.93)
    place = (
        rng.choice(PLACES[scene.place]) if rng.random() < (0.2 if scene.place == "center" else 0.6) or keep == 1 else ""
    )
    name = (
        _word_or_synonym(scene.object, rng, synonym_share) if rng.random() < 0.97 or not background or keep == 1 else ""
    )
    thing = " ".join(filter(None, (look, size, pattern, color, name)))
    if not name:
        return f"{_article(background)} {background} background"
    form = rng.random()
    if form < 0.55:
        ground = (
            f"{rng.choice(['on', 'over', 'against'])} {_article(background)} {background} background"
            if background
            else ""
        )
        return " ".join(filter(None, (f"{_article(thing)} {thing}", ground, place)))
    if form < 0.75 and background:
        return " ".join(
            filter(None, (f"{_article(background)} {background} background with {_article(thing)} {thing}", place))
        )
    if form < 0.9:
        return ", ".join(filter(None, (thing, f"{background} background" if background else "", place)))
    words = [
        *thing.split(),
        *filter(None, (background, "background" if background and rng.random() < 0.5 else "", place)),
    ]
    return " ".join(words)


def caption_words() -> frozenset[str]:
    """Return all words that captions can contain."""
    words = {*SYNONYMS, *(synonym for synonyms in SYNONYMS.values() for synonym in synonyms)} - _UNMENTIONED
    places = {word for phrases in PLACES.values() for phrase in phrases for word in phrase.split()}
    return frozenset(words | places | set("a an on over against with background".split()))


def _article(phrase: str) -> str:
    return "an" if phrase[:1] in "aeiou" and not phrase.startswith("uni") else "a"


@cache
def _emoji_sprite(name: str) -> Image.Image:
    import emoji

    code = next(c for c, data in emoji.EMOJI_DATA.items() if data["en"] == f":{name}:" and data["status"] == 2)
    font = ImageFont.truetype(str(FONT), 109, layout_engine=ImageFont.Layout.BASIC)  # the only size of its bitmaps
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), code.rstrip("\ufe0f"), font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    side = max(glyph.size)
    sprite = Image.new("RGBA", (side, side))
    sprite.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return sprite.resize((_SPRITE, _SPRITE), Image.Resampling.LANCZOS)


_POLYGONS: dict[str, Sequence[tuple[float, float]]] = {
    "square": [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)],
    "triangle": [(0.5, 0.06), (0.97, 0.92), (0.03, 0.92)],
    "diamond": [(0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5)],
    "star": [(0.5, 0), (0.62, 0.36), (1, 0.37), (0.7, 0.6), (0.81, 0.97), (0.5, 0.75), (0.19, 0.97), (0.3, 0.6),
             (0, 0.37), (0.38, 0.36)],
    "cross": [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65), (0.65, 1), (0.35, 1),
              (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)],
    "hexagon": [(0.25, 0.07), (0.75, 0.07), (1, 0.5), (0.75, 0.93), (0.25, 0.93), (0, 0.5)],
    "arrow": [(0, 0.35), (0.55, 0.35), (0.55, 0.08), (1, 0.5), (0.55, 0.92), (0.55, 0.65), (0, 0.65)],
    "heart": [(0.5, 0.97), (0.0, 0.38), (1.0, 0.38)],
}  # fmt: skip


@cache
def _shape_mask(name: str, pattern: str) -> Image.Image:
    mask = Image.new("L", (4 * _SPRITE, 4 * _SPRITE))
    draw, side = ImageDraw.Draw(mask), 4 * _SPRITE - 1
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, side, side), fill=255)
        if name == "ring":
            draw.ellipse((0.28 * side, 0.28 * side, 0.72 * side, 0.72 * side), fill=0)
    else:
        draw.polygon([(x * side, y * side) for x, y in _POLYGONS[name]], fill=255)
    if name == "heart":
        draw.ellipse((0, 0.05 * side, 0.53 * side, 0.56 * side), fill=255)
        draw.ellipse((0.47 * side, 0.05 * side, side, 0.56 * side), fill=255)
    holes = Image.new("L", mask.size)
    draw = ImageDraw.Draw(holes)
    if pattern == "striped":
        for x in range(-side, side, side // 4):
            draw.line((x, side, x + side, 0), fill=150, width=side // 10)
    if pattern == "dotted":
        for y in range(side // 8, side, side // 4):
            for x in range(side // 8, side, side // 4):
                draw.ellipse((x - side // 15, y - side // 15, x + side // 15, y + side // 15), fill=150)
    return ImageChops.subtract(mask, holes).resize((_SPRITE, _SPRITE), Image.Resampling.BOX)


def _jitter(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, c + rng.randint(-8, 8))) for c in color)


def _object_sprite(scene: Scene, rng: random.Random) -> Image.Image:
    """Render a scene's object on a transparent square."""
    if scene.color is None:
        return _emoji_sprite(_CLDR.get(scene.object, scene.object))
    sprite = Image.new("RGBA", (_SPRITE, _SPRITE), (*_jitter(COLORS[scene.color], rng), 255))
    sprite.putalpha(_shape_mask(scene.object, scene.pattern))
    return sprite


def render(scene: Scene, second: Scene | None = None) -> Image.Image:
    """Render a scene as an RGB image of 64 x 64 pixels; equal scenes give equal pixels.

    Args:
        scene: The scene.
        second: A scene whose object is added on the same background.
    """
    rng = random.Random(scene.seed)
    image = Image.new("RGB", (SIZE, SIZE), _jitter(COLORS[scene.background], rng))
    for part in filter(None, (scene, second)):
        side = _PIXELS[part.size] + rng.randint(-2, 2)
        room = (SIZE - side) // 2
        left, top = (room + round(d * (room - 1)) + rng.randint(-1, 1) for d in _OFFSETS[part.place])
        sprite = _object_sprite(part, rng).resize((side, side), Image.Resampling.BOX)
        image.paste(sprite, (left, top), sprite)
    if scene.look == "blurry":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.3, 1.8)))
    elif scene.look == "dark":
        image = ImageChops.multiply(image, _vignette())
    elif scene.look == "grainy":
        grain = np.random.default_rng(scene.seed).normal(0, 18, (SIZE, SIZE, 1))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    return image


@cache
def _vignette() -> Image.Image:
    shade = ImageChops.invert(Image.radial_gradient("L")).resize((SIZE, SIZE), Image.Resampling.BOX)
    return Image.merge("RGB", (shade.point(lambda v: min(255, 30 + round(0.95 * v))),) * 3)
