import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.data.images import to_tensor
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.methods import PEZ, TRAINER, TextualInversion
from lightning_prompts.methods.inversion.word_maps import SAMPLES, prompt_word_maps, token_texts
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.attention_maps import HEAT, word_map_grid, word_maps
from lightning_prompts.sampling.seeding import WORD_MAPS, draw_noise, validation_timesteps

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = Path(__file__).parents[2] / "benchmarks" / "targets" / "development"


def slow_word_maps(backbone, prompt, latents, noise, positions):
    """Compute the maps by their definition, one sample at a time."""
    maps = 0
    for t, eps in zip(validation_timesteps(len(noise), 250, 750), noise, strict=True):
        noisy = backbone.add_noise(latents[None], eps[None], t[None])
        maps = maps + backbone.attention_maps(noisy, t[None], prompt)[0] / len(noise)
    compared = sum(maps[p] for p in [*positions, positions[-1] + 1])
    return torch.stack([(maps[p] / compared - (maps[p] / compared).mean()).clamp(min=0) for p in positions])


@pytest.mark.parametrize("tokens", [1, 3])
def test_word_maps_equal_a_slow_reference(sd, tokens):
    backbone = load_backbone(str(sd))
    text_encoder = backbone.vocabulary
    prompt = backbone.encode(encode_text(text_encoder.tokenizer, ["red cat tree"], text_encoder.length))
    latents, noise = torch.randn(4, 8, 8), torch.randn(5, 4, 8, 8)
    maps = word_maps(backbone, prompt, latents, noise, 1, tokens, batch=2)
    assert maps.shape == (tokens, 8, 8)
    assert 0 <= maps.amin() <= maps.amax() < 1
    assert (maps.amax((1, 2)) > 0).all()  # a prompt of one token has a map, too
    torch.testing.assert_close(maps, slow_word_maps(backbone, prompt, latents, noise, range(1, 1 + tokens)))


@pytest.mark.parametrize("method", [PEZ, TextualInversion])
def test_maps_of_prompts_use_the_positions_in_the_template(method, sd1, image_folder, tmp_path):
    module = method(
        backbone=str(sd1), num_tokens=3, steps=2, template="a photo of {} in the corner", sampler=SamplerSettings(2)
    )
    data = ImagesToPrompts([str(image_folder)], num_noise_samples=1, num_validation_samples=1)
    pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=tmp_path).fit(module, datamodule=data)
    problems = list(data.folder.load().values())
    maps = prompt_word_maps(module, problems)
    assert len(maps) == 3
    for problem, word_map in zip(problems, maps, strict=True):
        latents = data.latents(module.backbone, [problem])[0][0]
        noise = draw_noise(0, [problem.key], WORD_MAPS, SAMPLES, latents.shape, "cpu")[0]
        prompt = module.encode([problem.prompt])
        torch.testing.assert_close(
            word_map, slow_word_maps(module.backbone, prompt, latents, noise, module.prompt.positions)
        )
        torch.testing.assert_close(word_map, prompt_word_maps(module, [problem])[0])


def test_token_texts_join_to_the_prompt(sd1):
    tokenizer = load_backbone(str(sd1)).text_encoders[0].tokenizer
    ids = tokenizer("red cat", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, Problem("0" * 16, "x", prompt="red cat", token_ids=ids))
    assert len(texts) == len(ids)
    assert "".join(texts) == "redcat"
    free = Problem("0" * 16, "x", prompt="<x-0000>", embedding=[[0.0], [0.0]])
    assert token_texts(tokenizer, free) == ["1", "2"]


def test_heat_is_drawn_over_the_target():
    target = torch.zeros(3, 16, 16)
    maps = torch.zeros(2, 8, 8)
    maps[1, :4] = 0.3
    image = word_map_grid([target, target], [maps[1:], maps], ["a", "b"], [["one"], ["one", "two"]])
    assert image.size == (3 * 104, 2 * 116)
    pixels = np.asarray(image).astype(int)
    assert (pixels[60, 52] == 128).all()  # the unchanged target
    without, above, below = pixels[116 + 20, 104 + 52], pixels[116 + 20, 208 + 52], pixels[116 + 90, 208 + 52]
    assert (without == below).all()
    assert len(set(without.tolist())) == 1
    assert np.abs(above - HEAT).max() < 20
    assert (pixels[20, 104 + 52] == above).all()  # each row has its own maximum
    assert (pixels[:116, 208:] == 255).all()  # a shorter prompt leaves white space


def test_zero_map_shows_no_heat():
    image = np.asarray(word_map_grid([torch.zeros(3, 16, 16)], [torch.zeros(1, 8, 8)], ["a"], [["one"]]))
    panel = image[2:98, 108:204]
    assert (panel == panel[0, 0]).all()
    assert len(set(panel[0, 0].tolist())) == 1


def test_word_maps_highlight_what_the_words_name():
    """On the embedded model, the word of the object highlights the object, and the color its surroundings."""
    backbone = load_backbone("emoji")
    text_encoder, words = backbone.text_encoders[0], json.loads((TARGETS / "words.json").read_text())
    for file in ("002.png", "005.png", "007.png"):
        named, image = words[file], to_tensor(Image.open(TARGETS / file).convert("RGB"))
        latents = backbone.encode_image(image[None])[0]
        noise = draw_noise(0, [file], WORD_MAPS, SAMPLES, latents.shape, "cpu")[0]
        ids = encode_text(text_encoder.tokenizer, [f"{named['object']} {named['background']}"], text_encoder.length)
        shape, color = word_maps(backbone, backbone.encode(ids), latents, noise, 1, 2)
        region = ((image - image[:, :1, :1]).abs().amax(0) > 0.2).float()
        region = torch.nn.functional.adaptive_avg_pool2d(region[None], 16)[0]
        assert (shape * region).sum() / shape.sum() > 2 * region.mean()
        assert (color * (1 - region)).sum() / color.sum() > 0.95
        assert region.flatten()[shape.argmax()] > 0.5
        assert region.flatten()[color.argmax()] == 0
