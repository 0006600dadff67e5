"""Backbones of loaded diffusers pipelines, and families that are defined elsewhere."""

import json
import sys
from types import ModuleType

import diffusers
import families
import pytest
import torch
from families import TEXTS, latents_of
from safetensors.torch import save_file

from lightning_prompts import entry_points, invert
from lightning_prompts.backbones import Backbone, TextEncoderSpec, load_backbone, registry, save_memory
from lightning_prompts.backbones.base import _FAMILIES
from lightning_prompts.backbones.embedding_files import pack_embedding, read_embedding
from lightning_prompts.backbones.hub import files_in, model_files
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_prompts.errors import UserError
from lightning_prompts.sampling import SamplerSettings


@pytest.fixture(scope="module", params=families.BUILD)
def folder(request, tmp_path_factory):
    return families.save(request.param, tmp_path_factory.mktemp(request.param))


def load_pipeline(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def state(pipeline):
    """Return everything about a pipeline's components that a search could change."""
    values = {}
    for name, component in pipeline.components.items():
        values[name] = id(component)
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                hooks = [
                    id(hook) for kind in (module._forward_hooks, module._forward_pre_hooks) for hook in kind.values()
                ]
                checkpointing = getattr(module, "gradient_checkpointing", None)
                values[name, path] = (module.training, hooks, "forward" in vars(module), checkpointing)
            tensors = {**dict(component.named_parameters()), **dict(component.named_buffers())}
            for path, x in tensors.items():
                values[name, path, "tensor"] = (
                    id(x),
                    x.data_ptr(),
                    x.dtype,
                    x.device,
                    x.stride(),
                    x.requires_grad,
                    x.grad,
                )
                values[name, path, "values"] = (x._version, x.detach().double().sum().item())
        if hasattr(component, "config"):
            values[name, "config"] = dict(component.config) if name == "scheduler" else str(component.config)
        if name.startswith("tokenizer") and component is not None:
            values[name, "tokens"] = (component.model_max_length, component("A Cat!")["input_ids"], len(component))
    return values


def outputs_of(backbone, noise):
    """Compute encoded prompts, a prediction, latents, images, and a gradient."""
    embeds = backbone.encode_text(TEXTS)
    negative = backbone.encode_text([""], negative=True)
    ids = backbone.vocabulary.encode_text(TEXTS)
    rows = backbone.vocabulary.table[ids].requires_grad_()
    output = backbone.denoise(noise, torch.tensor([700, 20]), backbone.encode(ids, rows))
    (slope,) = torch.autograd.grad(output.square().sum(), rows)
    with torch.no_grad():
        latents = backbone.sample(embeds, negative, noise, 3, 3.0)
        images = backbone.decode(latents)
        return [embeds, negative, output.detach(), slope, latents, images, backbone.encode_image(images)]


def test_equals_the_saved_model_and_leaves_the_pipeline_as_it_was(folder):
    pipeline, expected = load_pipeline(folder), load_backbone(str(folder), image_size=16)
    pipeline.text_encoder.train()
    pipeline.vae.requires_grad_(False)
    noise = torch.randn(2, *expected.latent_shape)
    latents = latents_of(pipeline, noise, 3.0)
    before = state(pipeline)
    backbone = Backbone.from_pipeline(pipeline, image_size=16)
    for ours, theirs in zip(outputs_of(backbone, noise), outputs_of(expected, noise), strict=True):
        assert torch.equal(ours, theirs)
    assert (backbone.default_steps, backbone.default_guidance) == (expected.default_steps, expected.default_guidance)
    assert backbone.scheduler.config == expected.scheduler.config
    assert backbone.name == str(folder)
    assert not any(weight.requires_grad for weight in backbone.parameters())
    own = {weight.data_ptr() for weight in backbone.parameters()}
    assert {w.data_ptr() for w in pipeline.text_encoder.parameters()} <= own  # no second copy in memory
    save_memory(backbone, ["gradient_checkpointing", "vae_tiling", "cpu_offload"])
    outputs_of(backbone, noise)
    backbone.offloaded = False
    backbone.double()
    assert state(pipeline) == before
    assert torch.equal(latents_of(pipeline, noise, 3.0), latents)


def test_options_equal_those_of_load_backbone(tmp_path):
    folder = families.save("sdxl", tmp_path)
    how = {"image_size": 32, "clip_skip": 1, "scheduler": "DDIMScheduler"}
    backbone, expected = Backbone.from_pipeline(load_pipeline(folder), **how), load_backbone(str(folder), **how)
    assert type(backbone.scheduler) is diffusers.DDIMScheduler
    for ours, theirs in zip(
        *(outputs_of(each, torch.ones(2, 4, 16, 16)) for each in (backbone, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)
    half = load_pipeline(folder).to(torch.float16)
    backbone = Backbone.from_pipeline(half)
    assert backbone.denoiser.dtype == half.vae.dtype == torch.float16
    assert backbone.vae.dtype == torch.float32  # as its config asks for
    with pytest.raises(UserError, match="scheduler 'PNDMScheduler2' does not fit this model"):
        Backbone.from_pipeline(half, scheduler="PNDMScheduler2")


def test_invert_takes_a_pipeline(tiny, image_folder):
    image, pipeline = sorted(image_folder.iterdir())[0], load_pipeline(tiny)
    before, how = state(pipeline), {"method": "pez", "steps": 2, "sampler": SamplerSettings(2), "device": "cpu"}
    actual, expected = (invert(image, backbone=backbone, **how) for backbone in (pipeline, tiny))
    assert actual.prompt == expected.prompt
    assert actual.record.validation_loss == expected.record.validation_loss
    assert torch.equal(actual.embedding, expected.embedding)
    assert state(pipeline) == before


def assert_refused(match, pipeline, kind=Backbone, **how):
    with pytest.raises(UserError, match=match) as error:
        kind.from_pipeline(pipeline, **how)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_other_pipelines_are_refused(sd1):
    pipeline = load_pipeline(sd1)
    assert_refused("takes a loaded diffusers pipeline, got str", "sd15")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert_refused(
        r"is a StableDiffusionImg2ImgPipeline, and only .*StableDiffusionPipeline.* are supported; give one", other
    )
    assert_refused(
        "is a StableDiffusionPipeline, and only StableDiffusionXLPipeline are supported", pipeline, StableDiffusionXL
    )
    assert_refused("clip_skip must be between 1 and", pipeline, StableDiffusion, clip_skip=9)
    unet, pipeline.unet = pipeline.unet, None
    assert_refused("The unet of the StableDiffusionPipeline is missing, and only UNet2DConditionModel", pipeline)
    pipeline.unet = unet
    vae, pipeline.vae = pipeline.vae, diffusers.AutoencoderTiny()
    assert_refused("The vae of the StableDiffusionPipeline is a AutoencoderTiny, and only AutoencoderKL", pipeline)
    pipeline.vae, pipeline.scheduler = vae, diffusers.CMStochasticIterativeScheduler()
    assert_refused(
        "noise levels of this CMStochasticIterativeScheduler are not supported; choose another scheduler", pipeline
    )


def test_quantized_and_offloaded_pipelines_are_refused(sd1):
    hooked, quantized, offloaded = load_pipeline(sd1), load_pipeline(sd1), load_pipeline(sd1)
    network = hooked.text_encoder
    forward = network.forward
    network.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as accelerate does
    assert_refused(
        "The text_encoder of the .* is offloaded or has other hooks .*; load the pipeline without them", hooked
    )
    network.forward = forward  # and as it leaves a network when its hooks are removed
    assert Backbone.from_pipeline(hooked).text_encoders[0].encoder.forward.__self__ is not network
    hooked.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_refused("The unet of the .* is (quantized|offloaded)", hooked)
    kind = type("Quantized", (torch.nn.Parameter,), {})
    quantized.unet.conv_in.weight = kind(quantized.unet.conv_in.weight.detach())
    assert_refused(
        "The unet of the StableDiffusionPipeline is quantized, which is not supported; load it in float32", quantized
    )
    adapted = load_pipeline(sd1)
    adapted.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    assert_refused(
        "The unet of the StableDiffusionPipeline has an IP-Adapter, which is not supported; unload it", adapted
    )
    offloaded.vae.to("meta")
    assert_refused("The vae of the StableDiffusionPipeline is offloaded", offloaded)


class OtherPipeline(diffusers.DiffusionPipeline):
    """A pipeline whose components have other names."""

    def __init__(self, text_encoder_9, tokenizer_9, prior, vae, scheduler):
        super().__init__()
        self.register_modules(
            text_encoder_9=text_encoder_9, tokenizer_9=tokenizer_9, prior=prior, vae=vae, scheduler=scheduler
        )


@pytest.fixture
def other_family(monkeypatch):
    """Define a family as another package would."""
    monkeypatch.setitem(_FAMILIES, "OtherPipeline", None)
    monkeypatch.delitem(_FAMILIES, "OtherPipeline")

    class Other(StableDiffusion):
        pipelines = ("OtherPipeline",)
        text_encoder_specs = (TextEncoderSpec("text_encoder_9", "CLIPTextModel", embedding_key="clip_nine"),)
        denoiser_spec = ("prior", "UNet2DConditionModel")

    yield Other
    _FAMILIES.pop("OtherPipeline", None)


def test_family_of_another_package_is_supported(sd1, other_family, tmp_path):
    pipeline = load_pipeline(sd1)
    other = OtherPipeline(pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, pipeline.vae, pipeline.scheduler)
    other.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["_class_name"] = "OtherPipeline"
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    backbone, again = load_backbone(str(tmp_path / "model")), Backbone.from_pipeline(other)
    noise = torch.ones(2, *backbone.latent_shape)
    expected = outputs_of(load_backbone(str(sd1)), noise)
    for model in (backbone, again):
        assert type(model) is other_family
        for ours, theirs in zip(outputs_of(model, noise), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert {"prior/config.json", "text_encoder_9/*.safetensors"} <= set(model_files())
    assert "prior/diffusion_pytorch_model.safetensors" in files_in(tmp_path / "model")
    file = tmp_path / "embedding.safetensors"
    file.write_bytes(pack_embedding(torch.ones(2, 32), backbone, "<x>"))
    assert read_embedding(file, backbone).shape == (2, 32)
    save_file({"clip_nine": torch.ones(3, 32)}, file)
    assert read_embedding(file, backbone).shape == (3, 32)


def test_families_are_found_by_entry_points(monkeypatch):
    """Families of installed packages are imported when a model is looked up."""
    module = ModuleType("other_package")

    def load():
        class Later(StableDiffusion):
            pipelines = ("LaterPipeline",)

        module.Later = Later

    point = type("Point", (), {"name": "later", "value": "other_package:Later", "load": staticmethod(load)})
    monkeypatch.setattr(
        entry_points, "entry_points", lambda group: [point] if group == "lightning_prompts.families" else []
    )
    registry._import_others.cache_clear()
    try:
        assert registry.families()["LaterPipeline"] is module.Later
        point.load = staticmethod(lambda: sys.modules["missing_package"])
        registry._import_others.cache_clear()
        with pytest.raises(
            UserError, match=r"The family 'later' \(other_package:Later\) cannot be imported \(KeyError: "
        ):
            registry.families()
    finally:
        registry._import_others.cache_clear()
        _FAMILIES.pop("LaterPipeline", None)
