"""The image processor equals that of transformers, and invalid ones are refused."""

import json
import logging
import shutil

import families
import numpy as np
import pytest
import torch
from hub import Hub, forget_connections
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.errors import UserError
from lightning_prompts.metrics import ClipImageSimilarity
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.image_processor import MEAN, STD, ImageProcessor, load_image_processor
from tools.train_emoji.networks import image_processor

CLIPS = [EMOJI / "clip", EMOJI.parent / "scorer"]


def random_image(height, width):
    """Create a smooth 8-bit image for Pillow and as a tensor (1, 3, H, W) in [-1, 1]."""
    noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    pixels = F.interpolate(noise, size=(height, width), mode="bilinear").round().byte()[0]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), pixels[None] / 127.5 - 1


CONFIGS = {
    "published": {},
    "old": {"size": 48, "crop_size": 48, "feature_extractor_type": "CLIPFeatureExtractor"},
    "own": {
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 48, "width": 48},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "cropped": {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}},
    "squashed": {"size": {"height": 48, "width": 56}, "do_center_crop": False, "resample": 2},
    "nearest": {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 0},
    "raw": {"size": 64, "crop_size": 64, "do_normalize": False},
    "0 to 255": {
        "size": 64,
        "crop_size": 64,
        "do_rescale": False,
        "image_mean": [100, 110, 120],
        "image_std": [50, 60, 70],
    },
    "other factor": {
        "size": 64,
        "crop_size": 64,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 0.9, 0.8],
        "image_std": [1.0, 0.5, 2.0],
    },
    "as it is": {"do_resize": False, "do_center_crop": False},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (100, 100), (64, 96), (90, 64)])
def test_pixels_equal_those_of_transformers(config, size):
    """Values are equal up to rounding without resizing.

    With resizing, transformers rounds to 8 bits, so they differ by up to two steps of 255.
    """
    image, ours = random_image(*size)
    processor = CLIPImageProcessor(**{key: value for key, value in config.items() if key != "feature_extractor_type"})
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt").pixel_values))
    actual = ImageProcessor.from_config(config)(ours)
    assert actual.shape == expected.shape
    unit = torch.tensor(config.get("image_std", STD) if config.get("do_normalize", True) else [1.0] * 3)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
    steps = (actual - expected).abs() * unit.view(3, 1, 1) / factor  # of 255
    resized = config.get("do_resize", True) and actual.shape[-2:] != ours.shape[-2:]
    assert float(steps.max()) < (2 if resized else 1e-3)


def test_gradient_of_pixels_equals_finite_differences():
    pixels = torch.rand(1, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    processor = ImageProcessor.from_config({"size": 12, "crop_size": 8})
    assert torch.autograd.gradcheck(lambda x: processor(x * 1.5 - 0.75), pixels)


@pytest.mark.parametrize("folder", CLIPS, ids=["clip", "scorer"])
def test_embedded_clips_take_unchanged_pixels(folder):
    """Pixels are bit-identical to those of the training: in [-1, 1], without normalization."""
    clip, images = ClipSimilarity(str(folder)), torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(clip.pixels(images), images)
    small = images[..., :16, :16]
    resized = F.interpolate(small, size=(64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.equal(clip.pixels(small), resized)
    assert json.loads((folder / "preprocessor_config.json").read_text()) == image_processor()
    theirs = CLIPImageProcessor.from_pretrained(folder)(random_image(64, 64)[0], return_tensors="pt").pixel_values
    torch.testing.assert_close(torch.as_tensor(np.asarray(theirs)), random_image(64, 64)[1], atol=1e-6, rtol=0)


@pytest.fixture
def clip(tiny, tmp_path):
    """Create a CLIP of 32 pixels, whose image processor is written by the test."""
    folder = shutil.copytree(f"{tiny}/clip", tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    return folder


def test_clip_without_an_image_processor_uses_the_published_statistics(clip, caplog):
    """This holds for small CLIPs, too."""
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with caplog.at_level(logging.INFO, "lightning_prompts"):
        result = ClipSimilarity(str(clip)).pixels(images)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(result, ((images + 1) / 2 - mean) / std, atol=1e-6, rtol=1e-6)
    assert (
        f"The CLIP '{clip}' has no preprocessor_config.json; using the mean and standard deviation of the published"
        in caplog.text
    )
    assert torch.equal(ClipImageSimilarity(str(clip)).scorer.pixels(images), result)  # metrics use the same pixels


@pytest.mark.parametrize("nested", [False, True])
def test_both_config_files_are_read(clip, nested):
    own = {"size": 32, "crop_size": 32, "image_mean": [0.25] * 3, "image_std": [0.125] * 3}
    name, content = ("processor_config.json", {"image_processor": own}) if nested else ("preprocessor_config.json", own)
    (clip / name).write_text(json.dumps(content))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ClipSimilarity(str(clip)).pixels(images), ((images + 1) / 2 - 0.25) / 0.125)


def test_image_processor_is_read_from_the_hub(clip, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # which has a copy in old versions
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    hub.push("owner/none", clip)
    assert load_image_processor("owner/none", 32).mean[0] == pytest.approx(2 * MEAN[0] - 1)
    other = shutil.copytree(clip, tmp_path / "other")
    families.save_image_processor(other, mean=0.25)
    hub.push("owner/clip", other)
    expected = ImageProcessor(32, (32, 32), "bicubic", (-0.5,) * 3, (1.0,) * 3)
    assert load_image_processor("owner/clip", 32) == expected
    hub.close()
    forget_connections()
    assert load_image_processor("owner/clip", 32, offline=True) == expected
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # the file is cached
    assert load_image_processor("owner/clip", 32) == expected
    assert load_image_processor("owner/none", 32).mean[0] == pytest.approx(2 * MEAN[0] - 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"size": 48, "crop_size": 48},
            r"takes images of 32 x 32 pixels, but its image processor makes 48 x 48; correct",
        ),
        ({"size": 32, "crop_size": 64, "do_center_crop": False, "resample": 1}, r"its resample must be 0 \(nearest"),
        ({"size": {"longest_edge": 32}}, "it lacks 'height'"),
        ({"size": 32, "crop_size": 32, "image_mean": [0.5]}, "three numbers each"),
        ({"size": 32, "crop_size": 32, "image_std": [0, 0, 0]}, "image_std and rescale_factor above 0"),
        ({"size": "x\x1b[31m"}, "cannot be used"),
        ([1], "cannot be used"),
    ],
)
def test_invalid_image_processor_is_refused(clip, content, reason):
    (clip / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason) as error:
        ClipSimilarity(str(clip))
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_image_processor_file_is_refused(clip):
    (clip / "preprocessor_config.json").write_text('{"size": 32')
    with pytest.raises(
        UserError, match=r"The image processor of the CLIP .* cannot be used \(.+\); correct its preprocessor_config"
    ):
        ClipSimilarity(str(clip))
