import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from lightning_prompts.metrics import ClipImageSimilarity, WordRecall, lpips_lacks, perceptual, perceptual_distance
from lightning_prompts.metrics.words import content_words


def recall(prompts, captions, synonyms=None):
    return float(WordRecall(synonyms)(prompts, captions))


SYNONYMS = {"cat": ("kitten",), "red": ("crimson", "scarlet"), "large": ("big", "huge"), "blurry": ()}


@pytest.mark.parametrize(
    ("prompt", "caption", "expected"),
    [
        ("red cat", "a red cat", 1),
        ("cat", "a red cat", 1 / 2),
        ("", "a red cat", 0),
        ("RED! CAT?", "a red, cat.", 1),
        ("crimson kitten", "a red cat", 1),
        ("red cat", "a scarlet kitten", 1),
        ("scarlet", "a crimson kitten on a blue background", 1 / 3),  # of crimson, kitten and blue
        ("category redder", "a red cat", 0),  # whole words only
        ("a on the background", "a red cat on a background", 0),  # words without content do not count
        ("blurry", "a blurry large cat", 1 / 3),
        ("cat cat cat", "a cat and a dog", 1 / 2),
        ("t-shirt", "a t-shirt", 1),
    ],
)
def test_word_recall_counted_by_hand(prompt, caption, expected):
    assert recall([prompt], [caption], SYNONYMS) == pytest.approx(expected)


def test_word_recall_without_synonyms():
    assert recall(["kitten"], ["a cat"]) == 0


def test_word_recall_weighs_words_not_captions():
    assert recall(["red", ""], ["a red cat", "a dog"]) == pytest.approx(1 / 3)
    metric = WordRecall()
    metric.update(["red"], ["a red cat"])
    metric.update([""], ["a dog"])
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_word_recall_of_nothing():
    assert recall([], []) == 0
    assert recall(["cat"], ["a"]) == 0


def test_word_recall_needs_a_caption_a_prompt():
    with pytest.raises(ValueError, match="zip"):
        recall(["cat", "dog"], ["a cat"])


def test_content_words():
    assert content_words("A small café, don't; on the RED background") == ["small", "café", "don't", "red"]


@pytest.fixture
def scored(tiny):
    return torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1


def test_clip_similarity_is_the_mean_cosine(tiny, scored):
    drawn, targets = scored
    clip = CLIPModel.from_pretrained(f"{tiny}/clip").eval()

    def features(x):
        x = F.interpolate(x, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.no_grad():
            return clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output).double().numpy()

    a, b = features(drawn), features(targets)
    cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for x in a for y in b]
    metric = ClipImageSimilarity(f"{tiny}/clip")
    assert float(metric(drawn, targets)) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_clip_similarity_is_one_with_itself_and_accumulates(tiny, scored):
    drawn, targets = scored
    metric = ClipImageSimilarity(f"{tiny}/clip")
    assert float(metric(drawn[:1], drawn[:1])) == pytest.approx(1, abs=1e-5)
    metric.reset()
    metric.update(drawn[:1], targets)
    metric.update(drawn[1:], targets)
    whole = ClipImageSimilarity(f"{tiny}/clip")(drawn, targets)
    assert float(metric.compute()) == pytest.approx(float(whole), abs=1e-6)


def test_clip_of_a_metric_is_frozen(tiny):
    metric = ClipImageSimilarity(f"{tiny}/clip")
    assert not any(p.requires_grad for p in metric.parameters())
    assert not metric.scorer.clip.training


def test_perceptual_distance_downloads_nothing(monkeypatch, tmp_path, scored):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert perceptual_distance(*scored) is None
    assert str(tmp_path) in lpips_lacks()
    assert not list(tmp_path.rglob("*.pth"))


def test_perceptual_distance_is_the_mean_over_pairs(monkeypatch, tmp_path):
    """On a random trunk: the numbers mean nothing, what is compared with what does."""
    import lpips

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / perceptual.TRUNK).touch()
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr(perceptual, "_network", lambda folder: network)
    drawn, targets = (torch.rand(n, 3, 64, 64) * 2 - 1 for n in (3, 2))
    assert lpips_lacks() is None
    assert perceptual_distance(drawn[:1], drawn[:1]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        pairs = [float(network(picture[None], target[None])) for picture in drawn for target in targets]
    assert perceptual_distance(drawn, targets) == pytest.approx(sum(pairs) / 6, rel=1e-4)
    assert perceptual_distance(drawn[..., :32, :32], targets[..., :32, :32]) > 0  # smaller than AlexNet takes
