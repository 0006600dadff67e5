"""Each objective equals an independent computation, and its gradient finite differences."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from inputs import noise
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig

from lightning_prompts.backbones import load_backbone
from lightning_prompts.errors import UserError
from lightning_prompts.objectives import (
    Aesthetic,
    Blurriness,
    ClipQuality,
    ClipSimilarity,
    ClipText,
    LatentDistance,
    Perceptual,
    Preference,
    Sharpness,
)

HEAD = Path(__file__).parents[3] / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ["two dogs", "a large tree, blurry", "two dogs"]

needs_head = pytest.mark.skipif(not HEAD.exists(), reason=f"the aesthetic predictor's weights are not in {HEAD}")


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, dtype=torch.float64) * 1.8 - 0.9


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.png"
    noise().save(path)
    return str(path)


@pytest.fixture(scope="session")
def vit_l(tiny, tmp_path_factory):
    """Save a CLIP with the feature width and image size of ViT-L/14; return its folder."""
    folder, text = tmp_path_factory.mktemp("vit_l"), CLIPTextConfig.from_pretrained(f"{tiny}/text_encoder")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)
    ).save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(f"{tiny}/clip").save_pretrained(folder)
    return str(folder)


def test_sharpness_equals_a_slow_loop(images):
    expected = []
    for image in ((images + 1) / 2).tolist():
        luma = [
            [0.2989 * image[0][y][x] + 0.5870 * image[1][y][x] + 0.1140 * image[2][y][x] for x in range(16)]
            for y in range(16)
        ]
        actual = [
            sum(luma[y + i][x + j] for i in (-1, 0, 1) for j in (-1, 0, 1)) - 9 * luma[y][x]
            for y in range(1, 15)
            for x in range(1, 15)
        ]
        mean = sum(actual) / len(actual)
        expected.append(sum((value - mean) ** 2 for value in actual) / (len(actual) - 1))
    assert Sharpness()(images, PROMPTS).tolist() == pytest.approx(expected)
    assert Blurriness()(images, PROMPTS).tolist() == pytest.approx(expected)


def test_sharpness_is_higher_with_edges():
    edges = torch.zeros(1, 3, 16, 16)
    edges[..., ::2] = 1
    smooth = F.avg_pool2d(edges, 3, 1, 1)
    assert Sharpness()(edges, [""]) > Sharpness()(smooth, [""])
    assert Sharpness.higher_is_better
    assert not Blurriness.higher_is_better


def attached(objective, folder):
    objective.attach(load_backbone(folder), True)
    return objective.double()


@pytest.mark.parametrize("name", ["Sharpness", "ClipText", "ClipQuality", "Preference", "LatentDistance"])
def test_gradient_equals_finite_differences(name, tiny, reference, images):
    objective = {
        "Sharpness": Sharpness,
        "ClipText": ClipText,
        "ClipQuality": lambda: ClipQuality("two dogs", "a large tree, blurry"),
        "Preference": lambda: Preference(f"{tiny}/clip"),
        "LatentDistance": lambda: LatentDistance(reference),
    }[name]()
    backbone = load_backbone(tiny).double()
    objective.attach(backbone, True)
    objective.double()
    if name in ("ClipText", "ClipQuality", "Preference"):  # features are float32 in any precision
        clip = objective.clip.clip
        objective.clip.features = lambda x: F.normalize(
            clip.visual_projection(
                clip.vision_model(
                    F.interpolate(x, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
                ).pooler_output
            ),
            dim=-1,
        )
        objective.clip.features_of = lambda texts: F.normalize(  # similar texts, so that no quality is saturated
            1 + 0.05 * clip.text_projection(clip.text_model(objective.clip.encode(texts)).pooler_output),
            dim=-1,
        )
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(images, PROMPTS).sum(), images)
    direction = torch.randn_like(images)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (objective(images + sign * step * direction, PROMPTS).sum() for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-4)


def test_clip_scores_equal_those_of_transformers(tiny):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    clip = CLIPModel.from_pretrained(f"{tiny}/clip").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(f"{tiny}/clip")

    def logits(texts):
        with torch.no_grad():
            return clip(
                input_ids=tokenizer(texts, padding=True, return_tensors="pt").input_ids, pixel_values=images
            ).logits_per_image

    scale = clip.logit_scale.exp()
    result = attached(Preference(f"{tiny}/clip"), tiny).float()(images, PROMPTS)
    assert result == pytest.approx(logits(PROMPTS).diagonal(), abs=1e-4)
    result = attached(ClipText(), tiny).float()(images, PROMPTS)
    assert result == pytest.approx((logits(PROMPTS) / scale).diagonal().detach(), abs=1e-5)


def test_quality_is_a_softmax_of_a_hundred_cosines(tiny):
    texts = ["two dogs", "a large tree, blurry"]
    objective = attached(ClipQuality(*texts), tiny).float()
    clip, tokenizer = (
        CLIPModel.from_pretrained(f"{tiny}/clip").eval(),
        CLIPTokenizerFast.from_pretrained(f"{tiny}/clip"),
    )
    with torch.no_grad():
        encoded = clip.text_model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        good, bad = F.normalize(clip.text_projection(encoded), dim=-1)
    for share in (0.49, 0.498, 0.5, 0.503):  # between the two texts, where the probability is neither 0 nor 1
        features = F.normalize(share * good + (1 - share) * bad, dim=-1)
        expected = 1 / (1 + math.exp(100 * float(features @ bad - features @ good)))
        assert float(objective.score(features[None], [""])) == pytest.approx(expected, rel=1e-3)
        assert 0.01 < expected < 0.99


@needs_head
def test_aesthetic_predictor_equals_the_released_network(tiny, vit_l):
    objective = Aesthetic(str(HEAD), clip=vit_l)
    released = nn.Sequential(
        nn.Linear(768, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    state = torch.load(HEAD, map_location="cpu", weights_only=True)
    released.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    objective.attach(load_backbone(tiny), True)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    # CLIP's own preprocessing of [0, 1], and unit vectors
    pixels = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    clip = CLIPModel.from_pretrained(vit_l).eval()
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=(pixels - mean[:, None, None]) / std[:, None, None])
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        expected = released.eval()(features / features.norm(dim=1, keepdim=True))[:, 0]
    assert objective(images, ["a"] * 4) == pytest.approx(expected, abs=1e-4)
    assert not any(parameter.requires_grad for parameter in objective.parameters())


@needs_head
def test_aesthetic_scores_are_between_0_and_10():
    objective = Aesthetic(str(HEAD))
    rated = objective.score(F.normalize(torch.randn(1000, 768), dim=1), [])
    assert float(rated.min()) > 0
    assert float(rated.max()) < 10  # 20 to 30 without unit vectors


@needs_head
def test_aesthetic_predictor_refuses_narrow_clips(tiny):
    with pytest.raises(UserError, match="features of 16 numbers, but the aesthetic predictor takes 768"):
        Aesthetic(str(HEAD), clip=f"{tiny}/clip").attach(load_backbone(tiny), True)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_files_without_weights_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no file .*absent\.pth"):
        Aesthetic(str(tmp_path / "absent.pth"))
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"layers.0.weight": Code()}, protocol=2))
    with pytest.raises(UserError, match=r"code\.pth is refused"):
        Aesthetic(str(tmp_path / "code.pth"))
    assert capsys.readouterr().out == ""
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pth is refused"):
        Aesthetic(str(tmp_path / "text.pth"))
    for name, state in (
        ("narrow", {"layers.0.weight": torch.zeros(1024, 512)}),
        ("tensor", torch.zeros(3)),
        ("empty", {}),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match="does not hold the five layers"):
            Aesthetic(str(tmp_path / f"{name}.pth"))


def test_latent_distance_equals_that_of_encoded_images(tiny, reference):
    backbone, objective = load_backbone(tiny), LatentDistance(reference)
    objective.attach(backbone, True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    one, other = backbone.encode_image(images), backbone.encode_image(objective.image)
    assert objective(images, ["", ""]).tolist() == pytest.approx([float(((x - other[0]) ** 2).mean()) for x in one])
    assert float(objective(objective.image, [""])) == 0
    assert (LatentDistance.lowest, LatentDistance.highest) == (0, math.inf)
    assert not objective.state_dict()  # nothing of the reference is in checkpoints


def test_perceptual_distance_without_weights_is_refused(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UserError, match="LPIPS lacks the weights"):
        Perceptual(reference)
    with pytest.raises(UserError, match=r"absent\.png"):
        LatentDistance(str(tmp_path / "absent.png"))


def alexnet_file(folder):
    """Create a file of random weights for the trunk of LPIPS."""
    from torchvision.models import alexnet

    file = folder / "alexnet.pth"
    torch.save({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}, file)
    return file


def test_perceptual_distance_passes_a_gradient_on(reference, tmp_path, tiny):
    objective = Perceptual(reference, str(alexnet_file(tmp_path)))
    objective.attach(load_backbone(tiny), True)
    images = torch.cat([objective.image, objective.image + 0.2]).requires_grad_()
    values = objective(images, ["", ""])
    same, other = values.tolist()
    assert same == pytest.approx(0, abs=1e-6)
    assert other > 0
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (64, 80), (40, 80)])
def test_images_too_small_for_lpips_are_enlarged(size, reference, tmp_path):
    objective = Perceptual(reference, str(alexnet_file(tmp_path)))
    objective.image, images = torch.rand(1, 3, *size) * 2 - 1, torch.rand(2, 3, *size) * 2 - 1
    one, other = images, objective.image.repeat(2, 1, 1, 1)
    if min(size) < 64:
        one, other = (F.interpolate(x, size=(64, 64)) for x in (one, other))
    assert objective(images, ["", ""]) == pytest.approx(
        objective.lpips.network(one, other).flatten().detach(), rel=1e-5
    )


def test_weights_are_the_papers_or_those_given(reference, tmp_path):
    """arXiv 2308.12059: 50 for sharpness and aesthetics, 20 for blurriness."""
    file = str(alexnet_file(tmp_path))
    made = {
        Sharpness: ({}, 50), Blurriness: ({}, 20), ClipText: ({}, 1), ClipQuality: ({}, 1), Preference: ({}, 1),
        LatentDistance: ({"reference": reference}, 1), Perceptual: ({"reference": reference, "lpips_weights": file}, 1),
    }  # fmt: skip
    if HEAD.exists():
        made[Aesthetic] = ({"weights": str(HEAD)}, 50)
    for kind, (given, weight) in made.items():
        assert kind(**given).weight == weight
        assert kind(**given, weight=0.3).weight == 0.3
        if issubclass(kind, ClipText | ClipQuality | Aesthetic):
            assert kind(**given, clip="a/clip").name == "a/clip"
    assert Preference().name == "yuvalkirstain/PickScore_v1"
    assert (ClipQuality().good, ClipQuality().bad) == ("Good photo.", "Bad photo.")


def test_ids_beyond_a_clips_vocabulary_are_not_known(tiny):
    clip = ClipSimilarity(f"{tiny}/clip")
    last = clip.vocab_size - 1
    assert clip.has_same_tokens(clip.tokenizer, torch.tensor([0, last]))
    assert not clip.has_same_tokens(clip.tokenizer, torch.tensor([0, last + 1]))
