"""Skipped layers of the text encoders, compared with diffusers' pipelines."""

import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import families
import pytest
import torch
from families import assert_refused
from safetensors import safe_open

from lightning_prompts import invert, metric_guidance
from lightning_prompts.backbones import BackboneSettings, load_backbone
from lightning_prompts.backbones.embedding_files import pack_embedding
from lightning_prompts.backbones.prompt_embeds_files import pack_prompt_embeds
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.commands.main import main
from lightning_prompts.data.images import content_key, load_image
from lightning_prompts.objectives import Sharpness
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["a red square on a blue background", "two dogs and a cat"]  # since T5 encodes the decoded tokens of the CLIPs
MOST = {"sd1": 2, "sd2": 2, "sdxl": 1, "sd3": 1, "lcm": 2}  # of two layers; SDXL and SD3 begin at the last but one
CELLS = [(family, skip) for family, most in MOST.items() for skip in range(1, most + 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: str(families.save(family, tmp_path_factory.mktemp(family))) for family in (*MOST, "flux", "pixart")}


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 looks for the norm where transformers 4 has it
        object.__setattr__(
            encoder, "text_model", SimpleNamespace(final_layer_norm=getattr(encoder, "final_layer_norm", None))
        )
    return pipeline


@pytest.mark.parametrize(("family", "skip"), CELLS)
def test_embeddings_and_images_equal_the_pipelines(family, skip, folders):
    backbone, pipeline = load_backbone(folders[family], clip_skip=skip, image_size=16), pipeline_of(folders[family])
    more = {"sdxl": {"prompt_2": None}, "sd3": {"prompt_2": None, "prompt_3": None}}.get(family, {})
    result = pipeline.encode_prompt(
        TEXTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=["blurry", "dark"],
        clip_skip=skip,
        **more,
    )
    prompt, negative = (
        result if len(result) == 2 else (backbone.join(result[0], result[2]), backbone.join(result[1], result[3]))
    )
    torch.testing.assert_close(backbone.encode_text(TEXTS), prompt, atol=1e-5, rtol=1e-5)
    # diffusers skips no layer of a negative prompt
    torch.testing.assert_close(backbone.encode_text(["blurry", "dark"], negative=True), negative, atol=1e-5, rtol=1e-5)
    vocabulary = backbone.vocabulary
    ids = encode_text(vocabulary.tokenizer, TEXTS, vocabulary.length)
    torch.testing.assert_close(backbone.encode(ids), prompt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.encode(ids, vocabulary.table[ids]), prompt, atol=1e-5, rtol=1e-5)
    negative_ids = encode_text(vocabulary.tokenizer, ["blurry", "dark"], vocabulary.length)
    torch.testing.assert_close(
        backbone.encode(negative_ids, vocabulary.table[negative_ids], negative=True), negative, atol=1e-5, rtol=1e-5
    )
    plain = load_backbone(folders[family], image_size=16)
    assert not torch.allclose(plain.encode_text(TEXTS), prompt, atol=1e-3)
    assert torch.equal(plain.encode_text(["dark"], negative=True), plain.encode_text(["dark"]))
    if family == "lcm":  # its sampler adds noise
        return
    noise = torch.randn(2, *backbone.latent_shape)
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    theirs = pipeline(TEXTS, latents=noise, clip_skip=skip, **how).images
    with torch.no_grad():
        latents = backbone.sample(backbone.encode_text(TEXTS), backbone.encode_text([""], negative=True), noise, 2, 3.0)
        ours = backbone.decode(latents) / 2 + 0.5
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("negative", [False, True])
def test_other_text_encoders_read_the_text_that_is_given(negative, folders):
    """The CLIPs read it beside the tokens of T5, cut to their length, and skip a layer unless it is negative."""
    backbone = load_backbone(folders["sd3"], vocabulary="t5", clip_skip=1, image_size=16)
    vocabulary, rows = backbone.vocabulary, backbone.text_encoders[0].length
    searched, given = ["a red cat", "two dogs"], ["two dogs and a cat " * 8, ""]
    ids = encode_text(vocabulary.tokenizer, searched, vocabulary.length)
    own, other = backbone.encode_text(searched, negative), backbone.encode_text(given, negative)
    torch.testing.assert_close(backbone.encode(ids, negative=negative), own)
    hidden, pooled = backbone.split(backbone.encode(ids, vocabulary.table[ids], given, negative))
    torch.testing.assert_close(hidden[:, :rows], other[:, :rows])
    torch.testing.assert_close(hidden[:, rows:], backbone.split(own)[0][:, rows:])
    torch.testing.assert_close(pooled, backbone.split(other)[1])
    assert not torch.allclose(other, backbone.encode_text(given, not negative), atol=1e-3)


def test_gradient_through_the_remaining_layers_equals_finite_differences(folders):
    backbone = load_backbone(folders["sd1"], clip_skip=1).double()
    ids = encode_text(backbone.vocabulary.tokenizer, TEXTS, backbone.vocabulary.length)
    x = backbone.text_encoders[0].encoder.get_input_embeddings().weight.detach()[ids].requires_grad_()
    weight = torch.randn(backbone.encode(ids).shape, dtype=torch.float64)

    def value(x):
        return (backbone.encode(ids, x) * weight).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    direction = torch.randn_like(x) * x.std()
    with torch.no_grad():
        slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_clip_skip_is_refused_for_families_without_it(family, folders):
    assert_refused(
        "--model.backbone.clip_skip is not supported by the .*, got 1; leave it out",
        folders[family],
        clip_skip=1,
    )


@pytest.mark.parametrize("family", MOST)
def test_clip_skip_beyond_the_layers_is_refused(family, folders):
    for skip in (-1, 0, MOST[family] + 1):
        assert_refused(
            f"--model.backbone.clip_skip must be between 1 and {MOST[family]}, .*got {skip}",
            folders[family],
            clip_skip=skip,
        )


def test_command_refuses_invalid_clip_skip(capsys, tmp_path):
    for value in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as stop:
            main(f"fit --run {tmp_path} --model PH2P --data.images x.png --model.backbone.clip_skip {value}".split())
        assert stop.value.code == 2
        assert "--model.backbone.clip_skip" in capsys.readouterr().err


def metadata_of(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("skip", [None, 1])
def test_exported_files_state_clip_skip(skip, folders, tmp_path):
    backbone = load_backbone(folders["sd1"], clip_skip=skip)
    expected = {"clip_skip": "1"} if skip else {}
    token = metadata_of(pack_embedding(backbone.vocabulary.table[5:7], backbone, "<x>"), tmp_path)
    prompt = metadata_of(pack_prompt_embeds({"x": backbone.encode_text(["a cat"])}, ["a cat"], backbone), tmp_path)
    for actual in (token, prompt):
        assert {key: value for key, value in actual.items() if key == "clip_skip"} == expected


def test_runs_record_clip_skip_and_have_their_own_keys(tiny, image_folder, tmp_path):
    """Runs without skipped layers have the same keys as before the setting existed."""
    how = {"sampler": SamplerSettings(1), "steps": 1, "device": "cpu"}
    backbone = BackboneSettings(tiny, image_size=16)
    noisy = {"method": "ph2p", "num_noise_samples": 1, "num_validation_samples": 1, "num_tokens": 2}
    plain = invert(image_folder / "0.png", backbone=backbone, **noisy, **how)
    skipping = replace(backbone, clip_skip=1)
    skipped = invert(image_folder / "0.png", backbone=skipping, **noisy, **how, folder=tmp_path / "run")
    image = load_image(image_folder / "0.png", 16, "crop", (255, 255, 255))
    assert plain.record.key == content_key([image], {"backbone": tiny, "template": "{}"})
    assert skipped.record.key == content_key([image], {"backbone": tiny, "template": "{}", "clip_skip": 1})
    assert json.loads((tmp_path / "run/result.json").read_text())["settings"]["backbone"]["clip_skip"] == 1
    keys = {
        metric_guidance("a red cat", Sharpness(), seeds=1, **how, backbone=replace(backbone, clip_skip=skip)).record.key
        for skip in (None, 1, 2)
    }
    assert len(keys) == 3
