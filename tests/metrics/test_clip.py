import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from lightning_prompts.errors import UserError
from lightning_prompts.metrics import ClipImageSimilarity, ClipTextSimilarity
from lightning_prompts.objectives import ClipSimilarity

TEXTS = ["a red square on a blue background", "two dogs", "a large tree, blurry"]


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1


def test_image_similarity_is_the_mean_cosine(tiny, images):
    generated, targets = images
    clip = CLIPModel.from_pretrained(f"{tiny}/clip").eval()

    def features(x):
        x = F.interpolate(x, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.no_grad():
            return clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output).double().numpy()

    a, b = features(generated), features(targets)
    cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for x in a for y in b]
    metric = ClipImageSimilarity(f"{tiny}/clip")
    assert float(metric(generated, targets)) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_similarity_of_an_image_to_itself_is_one(tiny, images):
    image = images[0][:1]
    assert float(ClipImageSimilarity(f"{tiny}/clip")(image, image)) == pytest.approx(1, abs=1e-5)


def test_image_similarity_adds_up(tiny, images, assert_adds_up):
    generated, targets = images
    assert_adds_up(
        ClipImageSimilarity(f"{tiny}/clip"), (generated, targets), (generated[:1], targets), (generated[1:], targets)
    )


def test_clip_of_a_metric_is_frozen(tiny):
    metric = ClipImageSimilarity(f"{tiny}/clip")
    assert not any(p.requires_grad for p in metric.parameters())
    assert not metric.scorer.clip.training


def logits(clip, ids, pixels):
    """Compute cosines (B, P) with transformers' own forward pass."""
    with torch.no_grad():
        return clip(input_ids=ids, pixel_values=pixels).logits_per_image / clip.logit_scale.exp()


def test_text_similarity_is_the_mean_cosine(tiny):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    clip = CLIPModel.from_pretrained(f"{tiny}/clip").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(f"{tiny}/clip")
    own = [logits(clip, tokenizer([text], return_tensors="pt").input_ids, images)[i] for i, text in enumerate(TEXTS)]
    metric = ClipTextSimilarity(f"{tiny}/clip")
    assert float(metric(images, TEXTS)) == pytest.approx(float(torch.stack(own).mean()), abs=1e-5)


def test_text_similarity_adds_up(tiny, images, assert_adds_up):
    images = images[0][:3]
    assert_adds_up(
        ClipTextSimilarity(f"{tiny}/clip"), (images, TEXTS), (images[:1], TEXTS[:1]), (images[1:], TEXTS[1:])
    )


def test_pixels_equal_those_of_transformers_processor(tiny, tmp_path):
    """A CLIP of 224 pixels gets the pixels of transformers' processor."""
    torch.manual_seed(1)
    config = CLIPConfig.from_pretrained(f"{tiny}/clip")
    config.vision_config.image_size, config.vision_config.patch_size = 224, 56
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    tokenizer = CLIPTokenizerFast.from_pretrained(f"{tiny}/clip")
    tokenizer.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    seen = CLIPImageProcessor()(Image.fromarray(pixels), return_tensors="pt").pixel_values
    expected = logits(clip, tokenizer(TEXTS[:1], return_tensors="pt").input_ids, seen)
    image = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    assert float(ClipTextSimilarity(str(tmp_path))(image, TEXTS[:1])) == pytest.approx(float(expected), abs=1e-5)


def test_long_text_keeps_its_end_of_text_token(tiny, images):
    image, text = images[0][:1], "two dogs beside a large tree, " * 20
    scorer, tokenizer = ClipSimilarity(f"{tiny}/clip"), CLIPTokenizerFast.from_pretrained(f"{tiny}/clip")
    words, length = (
        tokenizer(text, add_special_tokens=False).input_ids,
        scorer.clip.config.text_config.max_position_embeddings,
    )
    assert len(words) > length
    token_ids = [tokenizer.bos_token_id, *words[: length - 2], tokenizer.eos_token_id]
    assert scorer.encode([text]).tolist() == [token_ids]
    features, metric = scorer.features(image), ClipTextSimilarity(scorer)
    score = float(metric(image, [text]))
    assert score == pytest.approx(float(features[0] @ scorer.text_features(torch.tensor([token_ids]))[0]), abs=1e-5)
    cut = torch.tensor([[tokenizer.bos_token_id, *words[: length - 1]]])  # what plain slicing would leave
    assert score != pytest.approx(float(features[0] @ scorer.text_features(cut)[0]), abs=1e-4)
    beside = metric(image.expand(2, -1, -1, -1), [text, "dogs"]), metric(image, ["dogs"])
    assert float(beside[0]) == pytest.approx((score + float(beside[1])) / 2, abs=1e-5)


def test_each_image_needs_its_text(tiny, images):
    with pytest.raises(ValueError, match="4 images and 1 texts"):
        ClipTextSimilarity(f"{tiny}/clip")(images[0], ["a red cat"])


def test_clip_without_a_tokenizer_compares_images_only(tiny, tmp_path, images):
    folder = shutil.copytree(f"{tiny}/clip", tmp_path / "clip")
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            path.unlink()
    generated, targets = images
    scorer = ClipSimilarity(str(folder))
    assert float(ClipImageSimilarity(scorer)(generated, targets)) <= 1
    with pytest.raises(UserError, match="has no tokenizer that can be loaded; add vocab"):
        ClipTextSimilarity(scorer)(generated[:1], ["a red cat"])


@pytest.mark.parametrize("end", ["own", 2])
def test_text_features_equal_those_of_each_text_alone(end, tiny):
    """Whether the config has the tokenizer's id of the end of text or that of old files; also with other embeddings."""
    scorer = ClipSimilarity(f"{tiny}/clip")
    tokenizer, text_model = scorer.tokenizer, scorer.clip.text_model
    scorer.clip.config.text_config.eos_token_id = tokenizer.eos_token_id if end == "own" else end
    ids = scorer.encode(TEXTS)
    expected = torch.stack([
        text_model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0, -1] for text in TEXTS
    ])  # fmt: skip
    expected = F.normalize(scorer.clip.text_projection(expected), dim=-1)
    torch.testing.assert_close(scorer.text_features(ids), expected)
    torch.testing.assert_close(scorer.features_of(TEXTS), expected)
    (long,) = tokenizer([" ".join(["dogs"] * 3)], return_tensors="pt").input_ids
    others = ids.clone()
    others[:, 1:3] = long[1:3]
    assert not torch.equal(others, ids)
    embeddings = text_model.embeddings.token_embedding.weight[others]
    actual = scorer.text_features(ids, embeddings)
    torch.testing.assert_close(actual, scorer.text_features(others))
    assert not torch.allclose(actual, expected, atol=1e-3)
    images = F.normalize(torch.randn(len(TEXTS), actual.shape[1]), dim=-1)
    cosines = torch.stack([one @ other for one, other in zip(actual, images, strict=True)])
    torch.testing.assert_close(scorer(ids, embeddings, images), 1 - cosines)


def test_features_of_many_images_equal_those_of_each_alone(tiny):
    scorer, images = ClipSimilarity(f"{tiny}/clip"), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    result = scorer.features_of_many(images, batch=4)
    assert not result.requires_grad
    for row, several in zip(result, images, strict=True):
        for features, image in zip(row, several, strict=True):
            torch.testing.assert_close(features, scorer.features(image[None])[0])
            assert float(features.norm()) == pytest.approx(1, abs=1e-5)


def test_image_encoders_of_other_shapes_are_different(tiny, tmp_path):
    for name, size in (("hidden_size", 16), ("num_hidden_layers", 1)):
        other = CLIPConfig.from_pretrained(f"{tiny}/clip")
        setattr(other.vision_config, name, size)
        shutil.copytree(f"{tiny}/clip", tmp_path / name)
        CLIPModel(other).save_pretrained(tmp_path / name)
        one, two = ClipSimilarity(f"{tiny}/clip"), ClipSimilarity(str(tmp_path / name))
        assert not one.has_same_image_encoder(two)
        assert not two.has_same_image_encoder(one)
