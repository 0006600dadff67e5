import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from lightning_prompts.metrics import Diversity


@pytest.fixture
def metric(tiny):
    return Diversity(f"{tiny}/clip")


@pytest.fixture
def images():
    """Create three images for each of two prompts, of the CLIP's size."""
    return torch.rand(2, 3, 3, 32, 32) * 2 - 1


def test_diversity_is_the_mean_over_pairs(tiny, metric, images):
    clip = CLIPModel.from_pretrained(f"{tiny}/clip").eval()
    differences = []
    for several in images:
        with torch.no_grad():
            features = clip.visual_projection(clip.vision_model(pixel_values=several).pooler_output).double().numpy()
        pairs = itertools.combinations(features, 2)
        differences.append(np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
    assert float(metric(images)) == pytest.approx(np.mean(differences), rel=1e-3, abs=1e-6)


def test_diversity_adds_up(metric, images, assert_adds_up):
    assert_adds_up(metric, (images,), (images[:1],), (images[1:],))


def test_diversity_of_equal_images_is_zero(metric, images):
    assert float(metric(images[:, :1].expand(-1, 4, -1, -1, -1))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[1, 0], [0, 1]], 1),
        ([[1, 0], [-1, 0]], 2),
        ([[1, 0], [1, 0], [-1, 0]], 4 / 3),  # pairs of 0, 2 and 2
        ([[1, 0], [3, 4], [0, 1]], (2 / 5 + 1 + 1 / 5) / 3),
    ],
)
def test_diversity_equals_values_computed_by_hand(metric, monkeypatch, features, expected):
    monkeypatch.setattr(metric.scorer, "features", lambda x: F.normalize(torch.tensor(features).float(), dim=1))
    assert float(metric(torch.zeros(1, len(features), 3, 8, 8))) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8, 8), (4, 3, 8, 8)])
def test_diversity_needs_two_images_per_prompt(metric, shape):
    with pytest.raises(ValueError, match="two or more images per prompt"):
        metric(torch.zeros(shape))
