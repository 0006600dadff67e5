"""Values that a model's files do not state, compared with the defaults of diffusers' pipelines."""

import diffusers
import families
import pytest
import torch
from families import assert_refused, edit

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["a red square on a blue background", "two dogs and a Cat"]


def loaded(folder, **how):
    """Load the backbone and diffusers' pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return load_backbone(str(folder), **{"image_size": 16, **how}), pipeline


def encode_with_pipeline(backbone, pipeline):
    """Encode prompts and negative prompts with the pipeline, as rows (2, R, D)."""
    how = {} if isinstance(pipeline, diffusers.StableDiffusionPipeline) else {"prompt_2": None}
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        how["prompt_3"] = None
    result = pipeline.encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **how
    )
    if len(result) == 2:
        return result
    return backbone.join(result[0], result[2]), backbone.join(result[1], result[3])


def assert_equals_pipeline(backbone, pipeline, guidance=3.0):
    """Assert that encode_with_pipeline prompts and images equal those of the pipeline."""
    prompt, negative = backbone.encode_text(TEXTS), backbone.encode_text([""], negative=True)
    expected = encode_with_pipeline(backbone, pipeline)
    torch.testing.assert_close(prompt, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(negative.expand_as(expected[1]), expected[1], atol=1e-5, rtol=1e-5)
    noise = torch.randn(2, *backbone.latent_shape)
    how = {"num_inference_steps": 2, "guidance_scale": guidance, "height": 16, "width": 16, "output_type": "pt"}
    theirs = pipeline(TEXTS, latents=noise, **how).images
    with torch.no_grad():
        ours = backbone.decode(backbone.sample(prompt, negative, noise, 2, guidance)) / 2 + 0.5
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("value", ["absent", True, False, None])
def test_force_zeros_for_empty_prompt_is_read(value, tmp_path):
    folder = families.save("sdxl", tmp_path)
    if value != "absent":
        edit(folder / "model_index.json", lambda index: index.update(force_zeros_for_empty_prompt=value))
    backbone, pipeline = loaded(folder)
    assert backbone.zero_empty == (value in ("absent", True))
    assert bool(backbone.encode_text([""], negative=True).any()) != backbone.zero_empty
    assert_equals_pipeline(backbone, pipeline)


def test_empty_texts_among_others_are_zeros(tmp_path):
    backbone = load_backbone(str(families.save("sdxl", tmp_path)), image_size=16)
    vocabulary, texts = backbone.vocabulary, ["blurry", "", "dark", " "]
    ids = encode_text(vocabulary.tokenizer, texts, vocabulary.length)
    plain = backbone.encode_text(texts)
    expected = plain * torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1)
    for given in ({}, {"embeddings": vocabulary.table[ids]}):
        torch.testing.assert_close(backbone.encode(ids, **given), plain)
        torch.testing.assert_close(backbone.encode(ids, **given, negative=True), expected)
    torch.testing.assert_close(backbone.encode_text(texts, negative=True), expected)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_force_zeros_affects_only_sdxl(family, tmp_path):
    folder = families.save(family, tmp_path)
    edit(folder / "model_index.json", lambda index: index.update(force_zeros_for_empty_prompt=True))
    backbone, pipeline = loaded(folder)
    assert not backbone.zero_empty
    assert_equals_pipeline(backbone, pipeline)


def test_safety_checker_may_be_absent(tmp_path):
    folder = families.save("sd1", tmp_path)
    for key in ("requires_safety_checker", "safety_checker", "feature_extractor", "image_encoder"):
        edit(folder / "model_index.json", lambda index, key=key: index.pop(key, None))
    assert_equals_pipeline(*loaded(folder))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_use_attention_mask_is_read_as_by_the_pipeline(family, mask, tmp_path):
    """Only Stable Diffusion's pipeline respects it; sd1 pads with the end-of-text token and sd2 with a word."""
    folder = families.save(family, tmp_path)
    plain = load_backbone(str(folder)).encode_text(TEXTS)
    for file in folder.glob("text_encoder*/config.json"):
        edit(file, lambda config: config.update(use_attention_mask=mask))
    backbone, pipeline = loaded(folder)
    assert_equals_pipeline(backbone, pipeline)
    actual = backbone.encode_text(TEXTS)
    assert torch.allclose(actual, plain, atol=1e-4) == (not mask or family not in ("sd1", "sd2"))
    texts = ["a red cat", "! a !"] if family in ("sd1", "sd2") else ["a red cat"]  # the padding of sd2
    ids = encode_text(backbone.vocabulary.tokenizer, texts, backbone.vocabulary.length)
    expected = backbone.encode_text(texts)
    torch.testing.assert_close(backbone.encode(ids, backbone.vocabulary.table[ids]), expected, atol=1e-5, rtol=1e-5)


VAE = {
    "nothing": {},
    "mean alone": {"latents_mean": [1.0, -1.0, 0.5, 0.0]},
    "both": {"latents_mean": [1.0, -1.0, 0.5, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0]},
    "zero mean": {"latents_mean": [0.0] * 4, "latents_std": [2.0, 0.5, 1.0, 3.0], "scaling_factor": 0.7},
    "shift": {"shift_factor": 0.4, "scaling_factor": 1.3},
}


LATENT_CASES = [(family, case) for family in ("sd1", "sdxl") for case in VAE] + [("sd3", "shift")]


@pytest.mark.parametrize(("family", "case"), LATENT_CASES)
def test_latent_statistics_are_used_as_by_the_pipeline(family, case, tmp_path):
    """Only SDXL's pipeline uses mean and deviation, if both are set; only flow-matching pipelines use the shift.

    They also need it, so SD3 has a single case.
    """
    folder = families.save(family, tmp_path)
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    edit(folder / "vae/config.json", lambda config: [config.pop(key, None) for key in keys])
    edit(folder / "vae/config.json", lambda config: config.update(VAE[case]))
    backbone, pipeline = loaded(folder)
    assert_equals_pipeline(backbone, pipeline)
    mean, std = torch.zeros(4), torch.ones(4)
    if family == "sdxl" and len(VAE[case]) > 1 and case != "shift":
        mean, std = torch.tensor(VAE[case]["latents_mean"]), torch.tensor(VAE[case]["latents_std"])
    elif family == "sd3":
        mean += VAE[case]["shift_factor"]
    images, scale = torch.rand(1, 3, 16, 16) * 2 - 1, VAE[case].get("scaling_factor", 0.18215)
    expected = (pipeline.vae.encode(images).latent_dist.mean - mean.view(-1, 1, 1)) * scale / std.view(-1, 1, 1)
    torch.testing.assert_close(backbone.encode_image(images), expected)


@pytest.mark.parametrize("eos", ["absent", 2, "own"])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_end_of_text_id_is_corrected_in_old_configs(family, eos, tmp_path):
    """The id decides the position of the pooled vector."""
    folder = families.save(family, tmp_path)
    for file in folder.glob("text_encoder*/config.json"):
        if eos == "absent":
            edit(file, lambda config: config.pop("eos_token_id", None))
        elif eos == 2 and "vocab_size" in file.read_text() and "t5" not in file.read_text():
            edit(file, lambda config: config.update(eos_token_id=2))
    assert_equals_pipeline(*loaded(folder))


DENOISERS = {"sd1": "unet", "sdxl": "unet", "sd3": "transformer", "pixart": "transformer"}


@pytest.mark.parametrize("family", DENOISERS)
def test_sample_size_may_be_a_list(family, tmp_path):
    folder = families.save(family, tmp_path)
    file = folder / DENOISERS[family] / "config.json"
    expected = load_backbone(str(folder))
    edit(file, lambda config: config.update(sample_size=[8, 8]))
    backbone = load_backbone(str(folder))
    assert backbone.image_size == expected.image_size == 16
    noise, prompt = torch.randn(1, *backbone.latent_shape), expected.encode_text(["a cat"])
    with torch.no_grad():
        ours, theirs = (model.sample(prompt, prompt, noise, 2, 1.0) for model in (backbone, expected))
    assert torch.equal(ours, theirs)
    edit(file, lambda config: config.update(sample_size=[8, 12]))
    assert_refused("was trained on 8 x 12 latents, but only square images are supported", folder)
    if DENOISERS[family] == "unet":
        assert load_backbone(str(folder), image_size=16).latent_shape == (4, 8, 8)


def test_missing_sample_size_is_refused(tmp_path):
    folder = families.save("sd1", tmp_path)
    edit(folder / "unet/config.json", lambda config: config.pop("sample_size"))
    assert_refused("does not state the size of its images; give --model.backbone.image_size", folder)
    assert load_backbone(str(folder), image_size=16).image_size == 16


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 128), ("0.8.1", 128), ("0.9.0", 16), (None, 16)])
def test_sample_size_of_old_configs_is_raised(version, size, tmp_path):
    """Stable Diffusion's pipeline sets 64 latents for files before 0.9 that state fewer.

    This model has two pixels per latent.
    """
    folder = families.save("sd1", tmp_path)
    edit(folder / "unet/config.json", lambda config: config.pop("_diffusers_version"))
    if version:
        edit(folder / "unet/config.json", lambda config: config.update(_diffusers_version=version))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert load_backbone(str(folder)).image_size == size == pipeline.unet.config.sample_size * pipeline.vae_scale_factor
