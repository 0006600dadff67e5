"""Scenes, captions and files of the embedded model."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizerFast

from lightning_prompts.backbones import EMOJI
from lightning_prompts.emoji import world
from lightning_prompts.emoji.world import (
    COLOR_SYNONYMS,
    COLORS,
    LOOKS,
    OBJECTS,
    SHAPES,
    SYNONYMS,
    Scene,
    caption,
    render,
)

PLAIN = Scene("circle", "red", "plain", "blue", "medium", "center", "plain", 7)


def shapes(count, seed=0):
    """Sample scenes of shapes, which need no font."""
    rng = random.Random(seed)
    scenes = (world.random_scene(rng) for _ in range(100 * count))
    return [scene for scene in scenes if scene.object in SHAPES][:count]


def mentions(text, word):
    return any(f" {known} " in f" {text.replace(',', '')} " for known in (word, *SYNONYMS.get(word, ())))


@pytest.mark.parametrize("look", LOOKS)
def test_rendering_is_deterministic(look):
    scene = Scene("star", "green", "striped", "black", "large", "left", look, 11)
    first, second = np.asarray(render(scene)), np.asarray(render(scene))
    assert first.shape == (64, 64, 3)
    assert (first == second).all()


def test_rendering_leaves_global_random_state_unchanged():
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tobytes()
    render(Scene("star", "green", "plain", "black", "large", "left", "grainy", 11))
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before


def test_scenes_and_captions_depend_only_on_the_generator():
    def make():
        rng = random.Random(5)
        return [(scene := world.random_scene(rng), caption(scene, rng)) for _ in range(20)]

    assert make() == make()


def test_seed_changes_the_details_of_a_rendering():
    other = Scene(**{**PLAIN.__dict__, "seed": 8})
    assert (np.asarray(render(PLAIN)) != np.asarray(render(other))).any()


def test_image_has_the_colors_of_the_scene():
    pixels = np.asarray(render(PLAIN)).astype(int)
    assert np.abs(pixels[32, 32] - COLORS["red"]).max() <= 8
    assert np.abs(pixels[0, 0] - COLORS["blue"]).max() <= 8


def test_shape_and_background_differ_in_color():
    scenes = shapes(200)
    assert len(scenes) == 200
    assert all(scene.color != scene.background for scene in scenes)


def test_captions_name_object_and_background():
    rng = random.Random(1)
    for _ in range(500):
        scene = world.random_scene(rng)
        text = caption(scene, rng, keep=1)
        assert mentions(text, scene.object), (scene, text)
        assert mentions(text, scene.background), (scene, text)
        assert scene.color is None or mentions(text, scene.color)


def test_captions_without_synonyms_use_the_plain_words():
    rng = random.Random(2)
    for scene in shapes(100):
        words = caption(scene, rng, keep=1, synonym_share=0).replace(",", "").split()
        assert {scene.object, scene.background, scene.color} <= set(words)


def test_caption_words_lists_the_words_of_captions():
    rng, words = random.Random(4), set()
    for _ in range(20_000):
        words |= set(caption(world.random_scene(rng), rng, synonym_share=0.6).replace(",", "").split())
    assert words == world.caption_words()


def test_no_word_names_two_things():
    groups = [{word, *others} for names in (OBJECTS, COLOR_SYNONYMS) for word, others in names.items()]
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))


@pytest.mark.skipif(not world.FONT.exists(), reason="the font Noto Color Emoji is not installed")
def test_emoji_are_rendered():
    pytest.importorskip("emoji", reason="the package emoji is not installed")
    images = [
        np.asarray(render(Scene(name, None, "plain", "white", "large", "center", "plain", 3)))
        for name in ("cat", "truck")
    ]
    assert all((image != image[0, 0]).any() for image in images)
    assert (images[0] != images[1]).any()
    cat = Scene("cat", None, "plain", "white", "large", "center", "plain", 3)
    assert (np.asarray(render(cat)) == images[0]).all()


@pytest.mark.skipif(not world.FONT.exists(), reason="the font Noto Color Emoji is not installed")
def test_every_emoji_is_in_the_font():
    pytest.importorskip("emoji", reason="the package emoji is not installed")
    for name in world.EMOJI:
        sprite = np.asarray(world._emoji_sprite(world._CLDR.get(name, name)))
        assert sprite[..., 3].max() > 0, name


def test_shipped_model_loads_as_a_diffusers_pipeline():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(EMOJI, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red circle on a blue background", num_inference_steps=3, generator=generator).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1


@pytest.mark.parametrize("folder", ["model/tokenizer", "model/clip", "scorer"])
def test_tokenizer_round_trips_every_character(folder):
    path = EMOJI.parent / folder
    tokenizer = CLIPTokenizerFast.from_pretrained(path)
    for text in ("café", "naïve 日本 🙂", "a t-shirt, don't!"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.decode(tokenizer("café", add_special_tokens=False).input_ids).strip() == "café"
    assert len(json.loads((path / "vocab.json").read_text())) == len(tokenizer)


def test_captions_fit_the_context_of_the_encoder():
    tokenizer = CLIPTokenizerFast.from_pretrained(EMOJI / "tokenizer")
    rng = random.Random(3)
    texts = [caption(world.random_scene(rng), rng, keep=1) for _ in range(500)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= tokenizer.model_max_length


def test_embedded_model_is_small():
    files = [path for path in EMOJI.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt", ".pkl")]
