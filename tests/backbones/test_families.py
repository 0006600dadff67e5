"""Every family compared with its diffusers pipeline."""

import io
import json
import shutil
from types import SimpleNamespace

import diffusers
import families
import pytest
import sentencepiece
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from families import TEXTS, assert_refused, latents_of

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.errors import UserError


@pytest.fixture(scope="module", params=families.BUILD)
def family(request, tmp_path_factory):
    """Return the name of a family and its folder."""
    return request.param, families.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def backbone(family):
    return load_backbone(str(family[1]), image_size=16)


@pytest.fixture
def pipeline(family):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(family[1])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampled_latents_equal_the_pipelines(guidance, backbone, pipeline):
    noise = torch.randn(2, *backbone.latent_shape)
    expected = latents_of(pipeline, noise, guidance)
    with torch.no_grad():
        empty = backbone.encode_text([""])
        negative = torch.zeros_like(empty) if backbone.zero_empty else empty
        latents = backbone.sample(backbone.encode_text(TEXTS), negative, noise, 3, guidance)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert latents.std() > 0.1


def test_encoded_tokens_equal_their_encoded_text(backbone, family):
    for kind in {text_encoder.kind for text_encoder in backbone.text_encoders}:
        other = load_backbone(str(family[1]), vocabulary=kind, image_size=16)
        vocabulary = other.vocabulary
        ids = encode_text(vocabulary.tokenizer, ["a red cat", ""], vocabulary.length)
        encoded = other.encode_text(["a red cat", ""])
        torch.testing.assert_close(other.encode(ids), encoded)
        torch.testing.assert_close(other.encode(ids, vocabulary.table[ids]), encoded)
        torch.testing.assert_close(encoded, backbone.encode_text(["a red cat", ""]))
        assert not torch.allclose(other.encode(ids, vocabulary.table[ids.flip(0)])[0], encoded[0])


def test_sentencepiece_vocabulary_is_read(tmp_path):
    """Some T5 encoders come with spiece.model and no tokenizer.json."""
    folder = families.save("pixart", tmp_path)
    (folder / "tokenizer/tokenizer.json").unlink()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(families.CAPTIONS),
        model_writer=trained,
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer/spiece.model").write_bytes(trained.getvalue())
    (folder / "tokenizer/tokenizer_config.json").write_text('{"extra_ids": 0}')
    vocabulary = load_backbone(str(folder)).vocabulary
    expected = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    texts = ["a small cat, two dogs", "a red  square"]
    ids = encode_text(vocabulary.tokenizer, texts, 20)
    assert [row[: row.index(0)] for row in ids.tolist()] == [[*expected.encode(text), 1] for text in texts]


def slope(function, x, direction, eps):
    with torch.no_grad():
        return (function(x + eps * direction) - function(x - eps * direction)).item() / (2 * eps)


def test_gradient_to_the_tokens_equals_finite_differences(backbone):
    """Check the gradient of the denoising loss through all text encoders that take the tokens."""
    backbone.double()
    vocabulary = backbone.vocabulary
    ids = encode_text(vocabulary.tokenizer, ["a red cat"], vocabulary.length)
    weights = [text_encoder.encoder.get_input_embeddings().weight for text_encoder in vocabulary.text_encoders]
    x = torch.cat(weights, dim=1)[ids].detach().requires_grad_()
    latents, noise = torch.randn(2, 1, *backbone.latent_shape, dtype=torch.float64)
    timesteps = torch.tensor([600])
    noisy, target = backbone.add_noise(latents, noise, timesteps), backbone.target(latents, noise, timesteps)

    def loss(x):
        return (backbone.denoise(noisy, timesteps, backbone.encode(ids, x), 2.0) - target).square().mean()

    (gradient,) = torch.autograd.grad(loss(x), x)
    for part in gradient.split([weight.shape[1] for weight in weights], dim=2):
        assert part.abs().sum() > 0
    direction = torch.randn_like(x) * x.std()
    eps, tolerance = (1e-3, 1e-2) if vocabulary.text_encoders[0].kind == "t5" else (1e-4, 1e-5)  # T5 has float32 within
    assert (gradient * direction).sum().item() == pytest.approx(slope(loss, x, direction, eps), rel=tolerance)


def test_gradient_to_the_encoded_prompt_equals_finite_differences(backbone, family):
    """Check the gradient of sampled latents after three steps with respect to all rows, including the pooled vector."""
    backbone.double()
    noise, weight = torch.randn(2, 1, *backbone.latent_shape, dtype=torch.float64)
    with torch.no_grad():
        x, empty = backbone.encode_text(["a red cat"]), backbone.encode_text([""])

    def value(x, grad_steps=0):
        return (backbone.sample(x, empty, noise, 3, 3.0, grad_steps) * weight).sum()

    (gradient,) = torch.autograd.grad(value(x.requires_grad_(), 3), x)
    direction = torch.randn_like(x) * x.std() * (x != 0).any(2, keepdim=True)  # zeros are PixArt's padding
    eps, tolerance = (
        (1e-4, 1e-5) if family[0] in ("sd1", "sd2", "lcm") else (3e-2, 1e-2)
    )  # the other schedulers use float32 internally, whose rounding a smaller difference would not exceed
    assert (gradient * direction).sum().item() == pytest.approx(slope(value, x, direction, eps), rel=tolerance)
    hidden, pooled = backbone.split(gradient)
    assert hidden.abs().sum() > 0
    assert pooled is None or pooled.abs().sum() > 0


def test_searchable_rows_are_those_that_differ_between_prompts(backbone):
    encoded = torch.randn(2, *backbone.encode_text(TEXTS).shape)
    hidden, pooled = backbone.split(encoded)
    if pooled is None:
        assert not backbone.pooled_width
        assert torch.equal(hidden, encoded)
    else:
        assert pooled.shape[2:] == (backbone.pooled_width,)
        again = backbone.split(backbone.join(hidden, pooled))
        assert torch.equal(again[0], hidden)
        assert torch.equal(again[1], pooled)
    rows = encoded.shape[2]
    some, everything = (backbone.searchable_rows(encoded, pooled) for pooled in (False, True))
    one, other = backbone.encode_text(TEXTS)
    assert not (one != other).any(1)[~everything].any()  # the start of the text
    assert int((everything != some).sum()) == rows - hidden.shape[2]


def test_wide_pooled_vectors_take_several_rows(backbone):
    class Wide(type(backbone)):
        pooled_width = 11

    backbone.__class__ = Wide
    hidden, pooled = torch.randn(2, 3, 4), torch.randn(2, 11)
    joined = backbone.join(hidden, pooled)
    assert joined.shape == (2, 6, 4)
    assert torch.equal(backbone.split(joined)[1], pooled)
    assert backbone.searchable_rows(joined, False).tolist() == [i >= backbone.fixed_rows and i < 3 for i in range(6)]


def test_predict_x0_inverts_noise_and_target(backbone):
    backbone.double()
    latents, noise = torch.randn(2, 3, *backbone.latent_shape, dtype=torch.float64)
    timesteps = torch.tensor([10, 500, 999])
    noisy, target = backbone.add_noise(latents, noise, timesteps), backbone.target(latents, noise, timesteps)
    torch.testing.assert_close(backbone.predict_x0(noisy, target, timesteps), latents)
    scale = 1 / backbone.scheduler.config.get("sigma_data", 1.0)  # EDM gives the denoiser latents of variance 1
    first = backbone.add_noise(latents, noise, torch.tensor([0] * 3))
    torch.testing.assert_close(first, scale * latents, atol=0.2, rtol=0)


def test_flow_noise_equals_the_schedulers(tmp_path):
    backbone = load_backbone(str(families.save("sd3", tmp_path)))
    scheduler, (latents, noise) = backbone.scheduler, torch.randn(2, 1, *backbone.latent_shape)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        expected = scheduler.scale_noise(latents, t.view(1), noise)
        torch.testing.assert_close(backbone.add_noise(latents, noise, t.view(1)), expected)


@pytest.mark.parametrize(
    "config", [{}, {"base_image_seq_len": 100, "max_image_seq_len": 5000, "base_shift": 0.3, "max_shift": 2.0}]
)
def test_noise_levels_shift_with_the_image_size_as_in_the_pipeline(config, tmp_path):
    folder = str(families.save("flux", tmp_path))
    for size in (16, 64, 1024):
        backbone = load_backbone(folder, image_size=size)
        latents = torch.zeros(1, *backbone.latent_shape)
        tokens = diffusers.FluxPipeline._pack_latents(latents, *latents.shape).shape[1]
        backbone.scheduler = SimpleNamespace(config={"use_dynamic_shifting": True, **config})
        expected = calculate_shift(tokens, *config.values())
        assert backbone.timestep_options(4)["mu"] == pytest.approx(expected)
        backbone.scheduler = SimpleNamespace(config=config)
        assert "mu" not in backbone.timestep_options(4)


DEFAULTS = {
    "sd1": (50, 7.5),
    "sd2": (50, 7.5),
    "sd-turbo": (1, 1.0),
    "lcm": (4, 8.5),
    "sdxl": (50, 5.0),
    "playground": (50, 5.0),
    "sd3": (28, 7.0),
    "flux": (28, 3.5),
    "flux-schnell": (4, 1.0),
    "pixart": (20, 4.5),
}


def test_default_steps_and_guidance_are_those_of_the_pipeline(backbone, family):
    assert (backbone.default_steps, backbone.default_guidance) == DEFAULTS[family[0]]
    assert backbone.guided(3.0) == (family[0] not in ("lcm", "flux", "flux-schnell"))
    assert backbone.guided(1.01) == backbone.guided(3.0)
    assert not backbone.guided(1.0)


def test_encoded_and_decoded_images_equal_the_pipelines(backbone, pipeline):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents, config = backbone.encode_image(images), pipeline.vae.config
    shift = torch.tensor(config.latents_mean or config.shift_factor or 0.0).view(-1, 1, 1)
    scale = config.scaling_factor / torch.tensor(config.latents_std or 1.0).view(-1, 1, 1)
    expected = (pipeline.vae.encode(images).latent_dist.mean - shift) * scale
    torch.testing.assert_close(latents, expected)
    expected = pipeline.vae.decode(latents / scale + shift).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode(latents), expected)


def test_half_precision_gives_finite_gradients(family):
    backbone = load_backbone(str(family[1]), dtype="bfloat16", image_size=16)
    dtypes = {parameter.dtype for parameter in backbone.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32} if family[0] == "sd3" else {torch.bfloat16}  # diffusers keeps some
    x, noise = backbone.encode_text(TEXTS[:1]).float().requires_grad_(), torch.randn(1, *backbone.latent_shape)
    images = backbone.decode(backbone.sample(x, backbone.encode_text([""]), noise, 2, 3.0, 2))
    assert images.dtype == torch.float32
    images.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


# Refused models


def edit_index(folder, change):
    """Change the model_index.json of a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def copy(family, tmp_path):
    return shutil.copytree(family[1], tmp_path / "copy")


def test_every_component_is_required(copy, family):
    index = json.loads((copy / "model_index.json").read_text())
    parts = [
        part
        for part, value in index.items()
        if isinstance(value, list) and value[0] and not part.startswith(("tok", "sch"))
    ]
    for part in parts:
        edit_index(copy, lambda index, part=part: index.update({part: [None, None]}))
        if family[0] == "sd3" and part == "text_encoder_3":
            backbone = load_backbone(str(copy))
            assert not backbone.encode_text(["a cat"])[0, 77:-1].any()
            with pytest.raises(UserError, match="has no t5 text encoder"):
                load_backbone(str(copy), vocabulary="t5")
        else:
            with pytest.raises(UserError, match=f"has no {part}, which every"):
                load_backbone(str(copy))
        edit_index(copy, lambda index, part=part: index.update({part: ["x", "OtherClass"]}))
        with pytest.raises(UserError, match=f"The {part} of the model .* is a .*; only"):
            load_backbone(str(copy))
        (copy / "model_index.json").write_text(json.dumps(index))


def parts(folder):
    """Return the components of a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    return [part for part, value in index.items() if isinstance(value, list) and value[0]]


def unreadable(folder, part):
    """Return the message about an unreadable component."""
    return rf"The {part} of the model {str(folder)!r} cannot be read \(.+\); download or save the model again\.$"


def test_missing_component_is_refused(copy):
    for part in parts(copy):
        (copy / part).rename(copy / "elsewhere")
        if part.startswith(("scheduler", "tokenizer")):
            assert_refused(unreadable(copy, part), copy)
        else:
            assert_refused(
                rf"{str(copy)!r} has no {part}/\w+\.safetensors; download or save the whole model again", copy
            )
        (copy / "elsewhere").rename(copy / part)
    load_backbone(str(copy))


def loop(file):
    file.unlink()
    file.symlink_to(file.name)


def in_shards(text):
    """Write an index in place of weights."""
    return lambda file: (file.unlink(), file.with_name(f"{file.name}.index.json").write_text(text))


WEIGHTS = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "begun": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "empty": lambda file: file.write_bytes(b""),
    "loop": loop,
    "shards: empty": in_shards(""),
    "shards: no json": in_shards("{"),
    "shards: list": in_shards("[]"),
    "shards: null": in_shards("null"),
    "shards: none": in_shards("{}"),
    "shards: gone": in_shards('{"metadata": {}, "weight_map": {"x": "gone.safetensors"}}'),
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_broken_weights_are_refused(copy, how):
    for file in list(copy.rglob("*.safetensors")):
        content, part = file.read_bytes(), file.parent.name
        WEIGHTS[how](file)
        assert_refused(f"{str(copy)!r} has no {part}/" if how == "loop" else unreadable(copy, part), copy)
        file.unlink(missing_ok=True)
        file.with_name(f"{file.name}.index.json").unlink(missing_ok=True)
        file.write_bytes(content)
    load_backbone(str(copy))


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")
@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_broken_configs_are_refused(copy, text):
    unread = {
        "added_tokens.json",
        "special_tokens_map.json",
        "vocab.json",
    }  # old versions write them beside tokenizer.json, and they are not read
    for file in [file for file in copy.rglob("*.json") if file.name not in unread]:
        content = file.read_text()
        file.write_text(text)
        if file.name == "model_index.json":
            assert_refused(rf"The model_index\.json of the model {str(copy)!r} does not describe a pipeline", copy)
        else:
            assert_refused(unreadable(copy, file.parent.name), copy)
        file.write_text(content)
    load_backbone(str(copy))


def test_folder_that_links_to_itself_is_refused(family, tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "model")
    assert_refused("neither 'emoji' nor an existing folder", tmp_path / "model")


OTHERS = {
    "CLIPTextModel": ("pixart", "text_encoder"),
    "CLIPTextModelWithProjection": ("pixart", "text_encoder"),
    "T5EncoderModel": ("sd1", "text_encoder"),
    "UNet2DConditionModel": ("pixart", "transformer"),
    "SD3Transformer2DModel": ("flux", "transformer"),
    "FluxTransformer2DModel": ("sd3", "transformer"),
    "PixArtTransformer2DModel": ("sd3", "transformer"),
    "AutoencoderKL": ("sd1", "unet"),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Return a component of another class for each class."""
    folders = {name: families.save(name, tmp_path_factory.mktemp("other")) for name in ("sd1", "sd3", "flux", "pixart")}
    return {kind: folders[name] / part for kind, (name, part) in OTHERS.items()}


def test_components_of_another_class_are_refused(copy, others):
    index = json.loads((copy / "model_index.json").read_text())
    for part in parts(copy):
        if not part.startswith(("scheduler", "tokenizer")):
            (copy / part).rename(copy / "elsewhere")
            shutil.copytree(others[index[part][1]], copy / part)
            assert_refused(unreadable(copy, part), copy)
            shutil.rmtree(copy / part)
            (copy / "elsewhere").rename(copy / part)
    load_backbone(str(copy))


@pytest.mark.parametrize(
    ("one", "part", "other", "theirs"),
    [
        ("sd1", "text_encoder", "sd2", "text_encoder"),
        ("sd2", "unet", "sdxl", "unet"),
        ("sdxl", "text_encoder", "sd2", "text_encoder"),
        ("sd3", "text_encoder_3", "flux", "text_encoder_2"),
        ("flux", "text_encoder_2", "pixart", "text_encoder"),
        ("flux", "text_encoder", "sd2", "text_encoder"),
        ("pixart", "text_encoder", "flux", "text_encoder_2"),
    ],
)
def test_components_of_different_models_are_refused(one, part, other, theirs, tmp_path):
    folders = {name: families.save(name, tmp_path / name) for name in (one, other)}
    shutil.rmtree(folders[one] / part)
    shutil.copytree(folders[other] / theirs, folders[one] / part)
    with pytest.raises(
        UserError,
        match=r"The .* of the model .* are \d+ wide, but its denoiser takes \d+, so they come from different models",
    ):
        load_backbone(str(folders[one]))


def test_scheduler_can_be_replaced(family):
    name, folder = family
    fits, other = "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
    if name in ("sd3", "flux", "flux-schnell"):
        fits, other = "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler"
    if name == "flux":
        fits = "FlowMatchEulerDiscreteScheduler"  # the only family that shifts its noise levels by the image size
    elif name == "playground":
        fits, other = "EDMEulerScheduler", "EulerDiscreteScheduler"
    backbone = load_backbone(str(folder), scheduler=fits, image_size=16)
    assert type(backbone.scheduler).__name__ == fits
    noise = torch.randn(1, *backbone.latent_shape)
    with torch.no_grad():
        empty = backbone.encode_text([""])
        assert backbone.sample(empty, empty, noise, 3, 1.0).isfinite().all()
    for wrong in (other, "AutoencoderKL", "Heun"):
        with pytest.raises(
            UserError, match=f"The scheduler '{wrong}' does not fit this model, whose own is .*; use one of"
        ):
            load_backbone(str(folder), scheduler=wrong)


def test_image_size_must_be_a_multiple(family):
    with pytest.raises(
        UserError, match=r"--model.backbone.image_size must be a multiple of \d+ for the model .*, got 15"
    ):
        load_backbone(str(family[1]), image_size=15)
