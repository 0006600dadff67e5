"""Checkpoints in one file, in their original layout."""

import json
import logging
import re
import shutil

import diffusers
import families
import pytest
import torch
from families import assert_refused
from hub import forget_connections
from safetensors.torch import load_file, save_file
from searches import pez_command

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.hub import CLIPS, SHORT_NAMES
from lightning_prompts.backbones.single_file import SD2_BIAS
from lightning_prompts.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries

# The names of weights in the original code, as in diffusers' scripts convert_diffusers_to_original_stable_diffusion.py
# and convert_diffusers_to_original_sdxl.py (https://github.com/huggingface/diffusers/tree/main/scripts).
UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0",
    r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.resnets\.1": "middle_block.2",
    r"\.norm1(?=\.\w+$)": ".in_layers.0",
    r"\.conv1": ".in_layers.2",
    r"\.norm2(?=\.\w+$)": ".out_layers.0",
    r"\.conv2": ".out_layers.3",
    r"\.time_emb_proj": ".emb_layers.1",
    r"\.conv_shortcut": ".skip_connection",
}
VAE = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_([qkv])": r"attn_1.\1",
    r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
}
OPEN_CLIP = {
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^embeddings\.token_embedding": "token_embedding",
    r"^final_layer_norm": "ln_final",
    r"^encoder\.layers": "transformer.resblocks",
    r"layer_norm(\d)": r"ln_\1",
    r"fc1": "c_fc",
    r"fc2": "c_proj",
    r"self_attn": "attn",
}


def renamed(key, names):
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def unet_key(key, layers=1):
    match = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)", key)
    rest = key[match.end() :] if match else key
    if match:
        direction, block, what, layer = match[1], int(match[2]), match[3], int(match[4])
        first = (layers + 1) * block + (direction == "down")
        start = {"down": "input_blocks", "up": "output_blocks"}[direction]
        if what == "downsamplers":
            return f"{start}.{first + layers}.0{rest.replace('.conv', '.op')}"
        if what == "upsamplers":  # the first of the up blocks has no attention
            return f"{start}.{first + layers}.{1 if block == 0 else 2}{rest}"
        rest = f"{start}.{first + layer}.{int(what == 'attentions')}{rest}"
        if what == "attentions":
            return rest
    elif "mid_block.attentions" in key:
        return renamed(key, {r"^mid_block\.attentions\.0": "middle_block.1"})
    return renamed(rest, UNET)


def vae_weight(key, value, blocks=2):
    match = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)", key)
    if match:
        what = {"resnets": "block", "upsamplers.0": "upsample"}[match[2]]
        key = f"decoder.up.{blocks - 1 - int(match[1])}.{what}{key[match.end() :]}"
    key = renamed(key, VAE)
    return key, value[..., None, None] if ".attn_1." in key and value.ndim == 2 else value


def clip_weights(folder):
    """Remove the prefix that only some versions of transformers write."""
    return {key.removeprefix("text_model."): value for key, value in load_file(folder / "model.safetensors").items()}


def open_clip(folder, prefix):
    weights = clip_weights(folder)
    original = {}
    for key, value in weights.items():
        if key == "text_projection.weight":
            original["text_projection"] = value.T.contiguous()
        elif ".q_proj." in key:
            three = [weights[key.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
            name = renamed(key, OPEN_CLIP).replace(".q_proj.", ".in_proj_")
            original[name] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", key):
            original[renamed(key, OPEN_CLIP)] = value
    return {prefix + key: value for key, value in original.items()}


def plain_clip(folder, prefix):
    return {f"{prefix}text_model.{key}": value for key, value in clip_weights(folder).items()}


TEXTS = {
    "sd1": lambda folder: plain_clip(folder / "text_encoder", "cond_stage_model.transformer."),
    "sd2": lambda folder: open_clip(folder / "text_encoder", "cond_stage_model.model."),
    "sdxl": lambda folder: (
        plain_clip(folder / "text_encoder", "conditioner.embedders.0.transformer.")
        | open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model.")
    ),
}
SHORT = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


def original(family, folder, layers=1):
    """Convert the weights of a pipeline's folder to the original layout."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    weights = {f"model.diffusion_model.{unet_key(key, layers)}": value for key, value in unet.items()}
    weights |= {f"first_stage_model.{key}": value for key, value in (vae_weight(*item) for item in vae.items())}
    weights |= TEXTS[family](folder)
    weights |= {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}  # present, but not read
    return {key: value.contiguous() for key, value in weights.items()}


@pytest.fixture(scope="module", params=TEXTS)
def model(request, tmp_path_factory):
    """Return a family's name, its folder, a copy of the folder without weights, and the model in one file."""
    parent = tmp_path_factory.mktemp(request.param)
    folder = families.save(request.param, parent)
    config = shutil.copytree(folder, parent / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(original(request.param, folder), parent / "file.safetensors")
    return request.param, folder, config, parent / "file.safetensors"


def assert_same_weights(one, other):
    for (key, value), (other_key, other_value) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(value, other_value), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_file_equals_the_folder(model, dtype):
    _, folder, config, file = model
    one = load_backbone(str(folder), dtype, image_size=16)
    other = load_backbone(str(file), dtype, image_size=16, config=str(config))
    assert_same_weights(one, other)
    assert other.name == str(file)
    noise = torch.randn(1, *one.latent_shape)
    prompt_embeds, again = (backbone.encode_text(["a red square"]) for backbone in (one, other))
    torch.testing.assert_close(
        prompt_embeds, again, atol=1e-6, rtol=1e-6
    )  # SDXL's projection has another memory layout, and so rounds otherwise
    with torch.no_grad():
        images = [
            backbone.decode(backbone.sample(prompt_embeds, prompt_embeds, noise, 2, 3.0)) for backbone in (one, other)
        ]
    assert torch.equal(*images)


# Its configuration


def test_configuration_comes_from_the_hub(model, hub, tiny, monkeypatch, request, capsys, tmp_path):
    family, folder, _, file = model
    if family == "sd2":  # must state its prediction type
        file = tmp_path / "file.safetensors"
        save_file(load_file(model[3]), file, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    monkeypatch.setitem(SHORT_NAMES, SHORT[family], "owner/model")
    match = (
        f"The file '{file}' holds only weights and needs the configuration of 'owner/model', or of another model or "
        "folder given as "
        r"--model.backbone.config: .*has not been downloaded completely, and this run is offline; run .*prefetch"
    )
    assert_refused(match, file, offline=True)
    assert_refused("holds only weights and .* neither a folder nor on the Hugging Face hub", file)
    hub.push("owner/model", folder)
    hub.push(CLIPS[768], f"{tiny}/clip")
    main(["prefetch", str(file)])
    assert "safetensors" not in capsys.readouterr().out.partition(f"{CLIPS[768]}:")[0]
    assert not any(path.startswith("/owner/model") and path.endswith(".safetensors") for _, path in hub.asked)
    forget_connections()
    attempts = request.getfixturevalue("attempts")
    assert_same_weights(load_backbone(str(file), offline=True), load_backbone(str(folder)))
    # Old versions of huggingface_hub do not check for missing files, so the loader does.
    incomplete = r"has not been downloaded completely|has no text_encoder/model\.safetensors; download"
    assert_refused(incomplete, "owner/model", offline=True)
    assert not attempts


def test_configuration_may_come_from_another_model(model, hub, tmp_path):
    family, folder, config, file = model
    hub.push("owner/model", folder)
    assert_same_weights(load_backbone(str(file), config="owner/model"), load_backbone(str(folder)))
    assert_refused(
        f"'{folder}' is not a single file and has its own configuration; leave out --model.backbone.config",
        folder,
        config=str(config),
    )
    assert_refused("is neither 'emoji' nor an existing folder", file, config="nowhere")
    (tmp_path / "empty").mkdir()
    assert_refused(f"'{tmp_path}/empty' has no model_index.json", file, config=str(tmp_path / "empty"))
    for other in {"sd1": "sdxl", "sd2": "sd1", "sdxl": "sd2"}[family], "flux":
        wrong = families.save(other, tmp_path / other)
        assert_refused(
            rf"The networks of the model '{file}' cannot be read \(.+\); download it again, or give the model that "
            r"describes",
            file,
            config=str(wrong),
        )


# Refused files


@pytest.mark.parametrize(
    "part", ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.weight", "{text}"]
)
def test_missing_weight_is_refused(model, tmp_path, part):
    family, _, config, file = model
    weights = load_file(file)
    text = {
        "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "sd2": "cond_stage_model.model.ln_final.bias",
        "sdxl": "conditioner.embedders.1.model.text_projection",
    }
    del weights[part.format(text=text[family])]
    save_file(weights, tmp_path / "less.safetensors")
    assert_refused(
        r"less.safetensors' cannot be read \(the \w+ lacks weights such as [\w.]+, 1 in all\)",
        tmp_path / "less.safetensors",
        config=str(config),
    )


@pytest.mark.parametrize(
    ("prefix", "remaining"),
    [
        ("model.diffusion_model.", r"an autoencoder \(VAE\) and a text encoder"),
        ("first_stage_model.", "a UNet and a text encoder"),
        ("c", r"a UNet and an autoencoder \(VAE\)"),
    ],
)
def test_missing_network_is_refused(model, tmp_path, prefix, remaining):
    """Every weight of the component is required."""
    _, _, config, file = model
    save_file(
        {key: value for key, value in load_file(file).items() if not key.startswith(prefix)},
        tmp_path / "less.safetensors",
    )
    assert_refused(
        rf"less.safetensors' is {remaining} alone; give Stable Diffusion 1, 2 or XL with text encoder, UNet and "
        "autoencoder",
        tmp_path / "less.safetensors",
        config=str(config),
    )


def test_undescribed_weights_are_refused(model, tmp_path):
    """The guidance embedding of a consistency model, for example, would otherwise be ignored."""
    _, _, config, file = model
    more = {"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(32, 16)}
    save_file(load_file(file) | more, tmp_path / "more.safetensors")
    assert_refused(
        r"cannot be read \(its UNet has weights that its configuration does not describe, 1 in all\); download it "
        r"again, or give the model that describes it",
        tmp_path / "more.safetensors",
        config=str(config),
    )


def test_broken_files_are_refused(model, tmp_path):
    _, _, config, file = model
    content = file.read_bytes()
    for name, data, match in (
        (
            "pickle.ckpt",
            content,
            r"does not end in \.safetensors, and pickle weights .* refused because they can run code",
        ),
        ("short.safetensors", content[:-100], r"short\.safetensors' cannot be read \(.+\); download it again"),
        ("empty.safetensors", b"", r"empty\.safetensors' cannot be read \(.+\); download it again"),
        ("zip.safetensors", b"PK" * 500, r"zip\.safetensors' cannot be read \(.+\); download it again"),
    ):
        (tmp_path / name).write_bytes(data)
        assert_refused(match, tmp_path / name, config=str(config))


UNET_IN, CLIP_KEY = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"
SD1_KEYS = [CLIP_KEY, UNET_IN, "first_stage_model.x"]
SD2_KEYS = ["cond_stage_model.model.ln_final.bias", UNET_IN, "first_stage_model.x"]
SDXL_KEYS = ["conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x", UNET_IN, "first_stage_model.x"]
KINDS = {
    "a LoRA": ["lora_unet_mid_block.lora_down.weight", "lora_unet_mid_block.alpha"],
    "a LoRA ": ["unet.mid_block.to_q.lora_A.weight"],
    "a LoRA  ": ["lycoris.hada_w1_a"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "FLUX": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"],
    "FLUX ": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.decoder.conv_in.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.x", "text_encoders.clip_l.x"],
    "Playground v2.5, an EDM model": [*SDXL_KEYS, "edm_mean", "edm_std"],
    "CosXL, an EDM model": [*SDXL_KEYS, "edm_vpred.sigma_max"],
    "an unCLIP model": [*SD2_KEYS, "model.diffusion_model.label_emb.0.0.weight"],
    "the refiner of SDXL": [
        "conditioner.embedders.0.model.x",
        "model.diffusion_model.label_emb.0.0.weight",
        UNET_IN,
        "first_stage_model.x",
    ],
    "a UNet alone": [UNET_IN, "model.diffusion_model.out.2.bias"],
    "a UNet alone ": ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    "an autoencoder (VAE) alone": ["first_stage_model.decoder.conv_in.weight"],
    "an autoencoder (VAE) alone ": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "a text encoder alone": ["text_model.final_layer_norm.bias"],
    "a text encoder alone ": ["cond_stage_model.model.ln_final.bias"],
    "an embedding, which --model.init takes": ["clip_l", "clip_g"],
    "of an unknown kind": ["\x1b[31mweights\n", "n" * 10_000],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_named(kind, tmp_path):
    save_file({key: torch.zeros(4, 4, 3, 3) for key in KINDS[kind]}, tmp_path / "file.safetensors")
    text = assert_refused(
        rf"file\.safetensors' is {re.escape(kind.strip())}; give Stable Diffusion", tmp_path / "file.safetensors"
    )
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.parametrize("keys", [SD1_KEYS, SD2_KEYS, SDXL_KEYS], ids=["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (9, "an inpainting model"),
        (8, "an InstructPix2Pix model"),
        (5, "a depth-to-image model"),
        (7, "an upscaler"),
        (6, "a model with 6 input channels"),
    ],
)
def test_denoisers_with_other_input_channels_are_refused(keys, channels, kind, tmp_path):
    save_file({key: torch.zeros(32, channels, 3, 3) for key in keys}, tmp_path / "file.safetensors")
    assert_refused(rf"is {kind}; give", tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    "name", ["model.ckpt", "model.txt", "short.safetensors", "empty.safetensors", "folder", "none.safetensors"]
)
def test_command_line_mistakes_give_one_sentence(name, image_folder, tmp_path, capsys, attempts):
    """Each mistake gives one sentence and exit code 2."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name != "none.safetensors":
        path.write_bytes(b"" if "empty" in name else b"\x1b[31m and some more bytes")
    given = ["fit", "--run", str(tmp_path / "run"), "--model", "PEZ", "--model.backbone", str(path)]
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--data.images", str(image_folder / "0.png")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: The ")
    assert error.strip().isprintable()
    assert name in error


# Prediction types


def with_stated_prediction(model, tmp_path, keys=(), metadata=None):
    """Write the file with empty tensors and metadata that state its prediction type."""
    file = tmp_path / "stated.safetensors"
    save_file(load_file(model[3]) | {key: torch.tensor([]) for key in keys}, file, metadata)
    return file


def zero_snr(alphas):
    """Rescale so that the last one is 0: algorithm 1 of arXiv 2305.08891."""
    root = alphas.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


V, EPSILON = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("keys", "metadata", "prediction", "zero"),
    [
        (["v_pred"], None, "v_prediction", False),
        (["v_pred", "ztsnr"], None, "v_prediction", True),
        (["v_pred", "ztsnr"], EPSILON, "v_prediction", True),
        (["ztsnr"], V, "v_prediction", True),
        (["ztsnr"], EPSILON, "epsilon", False),
        ([], V, "v_prediction", False),
        ([], EPSILON, "epsilon", False),
        ([], {"modelspec.prediction_type": "\x1b"}, None, False),
        ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
        ([], {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    ],
)
def test_stated_prediction_type_overrides_the_scheduler_config(
    model, tmp_path, caplog, keys, metadata, prediction, zero
):
    """The rest of the scheduler config is kept."""
    _, folder, config, _ = model
    with caplog.at_level(logging.INFO, "lightning_prompts"):
        actual = load_backbone(
            str(with_stated_prediction(model, tmp_path, keys, metadata)), image_size=16, config=str(config)
        )
    plain = load_backbone(str(folder), image_size=16)
    assert actual.prediction_type == (prediction or plain.prediction_type)
    assert_same_weights(actual.denoiser, plain.denoiser)
    own = actual.scheduler.config
    assert ("overrides its configuration" in caplog.text) == (actual.prediction_type != plain.prediction_type or zero)
    if zero:
        assert own.rescale_betas_zero_snr
        assert own.timestep_spacing == "trailing"
        expected = zero_snr(plain.alphas_cumprod)
        torch.testing.assert_close(actual.alphas_cumprod[:-1].double(), expected[:-1], atol=1e-6, rtol=1e-4)
        assert 0 <= float(actual.alphas_cumprod[-1]) < 1e-7
        actual.scheduler.set_timesteps(10)
        assert int(actual.scheduler.timesteps[0]) == 999
        assert not own.get("clip_sample")
    else:
        assert type(actual.scheduler) is type(plain.scheduler)
        assert dict(own) == {**plain.scheduler.config, "prediction_type": actual.prediction_type}
        assert torch.equal(actual.alphas_cumprod, plain.alphas_cumprod)


def test_sampling_with_zero_terminal_snr_equals_the_pipelines(tmp_path):
    """Compare with diffusers' pipeline and the scheduler that its documentation recommends."""
    folder = families.save("sdxl", tmp_path)
    file = tmp_path / "file.safetensors"
    save_file(original("sdxl", folder) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, file)
    ours = load_backbone(str(file), image_size=16, config=str(folder))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *ours.latent_shape)
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "height": 16, "width": 16}
    theirs = pipeline("a red square", latents=noise, **how).images
    with torch.no_grad():
        latents = ours.sample(ours.encode_text(["a red square"]), ours.encode_text([""]), noise, 4, 1.0)
    torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=1e-4)
    other = load_backbone(str(file), image_size=16, config=str(folder), scheduler="DDIMScheduler")
    assert other.scheduler.config.rescale_betas_zero_snr
    assert float(other.alphas_cumprod[-1]) < 1e-7


SPREADS = {"v": (0.2, "sd21", "v_prediction"), "epsilon": (0.03, "sd21-base", "epsilon"), "undecided": (0, None, None)}


@pytest.mark.parametrize("case", SPREADS)
def test_prediction_type_of_stable_diffusion_2_is_detected(case, hub, tmp_path, monkeypatch, capsys):
    """The prediction type is detected as in ComfyUI, from the standard deviation of a bias."""
    spread, short, prediction = SPREADS[case]
    torch.manual_seed(0)
    pipeline = families.BUILD["sd2"](tmp_path)
    pipeline.unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=8,
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    bias = pipeline.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
    torch.nn.init.normal_(bias, std=1)
    with torch.no_grad():
        bias.mul_(spread / bias.std(correction=0))
    folders = {}
    for name, kind in (("sd21", "v_prediction"), ("sd21-base", "epsilon")):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
        pipeline.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
        monkeypatch.setitem(SHORT_NAMES, name, f"owner/{name}")
        hub.push(f"owner/{name}", folders[name])
    file = tmp_path / "file.safetensors"
    weights = original("sd2", folders["sd21"], layers=2)
    assert SD2_BIAS in weights
    save_file(weights, file)
    if short is None:
        assert_refused(
            r"is a Stable Diffusion 2 and does not state whether it predicts epsilon or v; set "
            r"--model\.backbone\.config to",
            file,
        )
        with pytest.raises(SystemExit):
            main(["prefetch", str(file)])
        assert "set --model.backbone.config to sd21-base" in capsys.readouterr().err
    else:
        result = load_backbone(str(file))
        assert result.prediction_type == prediction
        assert_same_weights(result.denoiser, load_backbone(str(folders[short])).denoiser)
    for name, kind in (
        ("sd21", "v_prediction"),
        ("sd21-base", "epsilon"),
    ):  # a given value takes precedence over a guess
        assert load_backbone(str(file), config=name).prediction_type == kind
    save_file(weights, file, {"modelspec.prediction_type": "epsilon"})  # and a stated value over both
    assert load_backbone(str(file)).prediction_type == "epsilon"
    assert load_backbone(str(file), config="sd21").prediction_type == "epsilon"


def test_old_text_encoder_names_are_read(tmp_path):
    """The first files of Stable Diffusion 1 have names without `text_model.`."""
    folder = families.save("sd1", tmp_path)
    weights, prefix = original("sd1", folder), "cond_stage_model.transformer."
    old = {key.replace(f"{prefix}text_model.", prefix): value for key, value in weights.items()}
    old[f"{prefix}embeddings.position_ids"] = torch.arange(32)[None]
    save_file(old, tmp_path / "old.safetensors")
    for dtype in ("float32", "bfloat16"):
        one = load_backbone(str(folder), dtype)
        other = load_backbone(str(tmp_path / "old.safetensors"), dtype, config=str(folder))
        assert_same_weights(one, other)
        assert torch.equal(one.encode_text(["a red square"]), other.encode_text(["a red square"]))
    del old[f"{prefix}final_layer_norm.bias"]
    save_file(old, tmp_path / "old.safetensors")
    assert_refused(
        r"the CLIPTextModel lacks weights such as [\w.]*final_layer_norm\.bias, 1 in all",
        tmp_path / "old.safetensors",
        config=str(folder),
    )


def test_search_runs_offline_on_a_single_file(model, image_folder, tmp_path, attempts):
    _, _, config, file = model
    run = tmp_path / "run"
    loading = f"--model.backbone.config {config} --model.backbone.image_size 16 --model.backbone.offline true".split()
    main([*pez_command(run, file, image_folder / "0.png"), *loading])
    main(["test", "--run", str(run)])
    assert json.loads((run / "result.json").read_text())["problems"][0]["prompt"]
    assert not attempts
