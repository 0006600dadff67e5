"""Checkpoints in one file, in the layout that people have them."""

import json
import re
import shutil

import families
import pytest
import torch
from families import refused
from hub import forget_connections
from safetensors.torch import load_file, save_file

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.hub import CLIPS, SHORT_NAMES
from lightning_prompts.main import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries

# The names of weights in the original code, as in diffusers' scripts convert_diffusers_to_original_stable_diffusion.py and
# convert_diffusers_to_original_sdxl.py (https://github.com/huggingface/diffusers/tree/main/scripts).
UNET = {
    r"^time_embedding\.linear_1": "time_embed.0", r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0", r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0", r"^conv_norm_out": "out.0", r"^conv_out": "out.2",
    r"^mid_block\.attentions\.0": "middle_block.1", r"^mid_block\.resnets\.0": "middle_block.0", r"^mid_block\.resnets\.1": "middle_block.2",
    r"\.norm1(?=\.\w+$)": ".in_layers.0", r"\.conv1": ".in_layers.2", r"\.norm2(?=\.\w+$)": ".out_layers.0", r"\.conv2": ".out_layers.3",
    r"\.time_emb_proj": ".emb_layers.1", r"\.conv_shortcut": ".skip_connection",
}  # fmt: skip
VAE = {
    r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut", r"mid_block\.attentions\.0": "mid.attn_1",
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2", r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_([qkv])": r"attn_1.\1", r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block", r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
}  # fmt: skip
OPEN_CLIP = {
    r"^embeddings\.position_embedding\.weight": "positional_embedding", r"^embeddings\.token_embedding": "token_embedding",
    r"^final_layer_norm": "ln_final", r"^encoder\.layers": "transformer.resblocks", r"layer_norm(\d)": r"ln_\1",
    r"fc1": "c_fc", r"fc2": "c_proj", r"self_attn": "attn",
}  # fmt: skip


def renamed(key, names):
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def unet_key(key, layers=1):
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)", key)
    rest = key[found.end() :] if found else key
    if found:
        way, block, what, layer = found[1], int(found[2]), found[3], int(found[4])
        first = (layers + 1) * block + (way == "down")
        start = {"down": "input_blocks", "up": "output_blocks"}[way]
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
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)", key)
    if found:
        what = {"resnets": "block", "upsamplers.0": "upsample"}[found[2]]
        key = f"decoder.up.{blocks - 1 - int(found[1])}.{what}{key[found.end() :]}"
    key = renamed(key, VAE)
    return key, value[..., None, None] if ".attn_1." in key and value.ndim == 2 else value


def clip_weights(folder):
    """Without the prefix that only some versions of transformers write."""
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


def original(family, folder):
    """The weights of a pipeline's folder in the original layout."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    weights = {f"model.diffusion_model.{unet_key(key)}": value for key, value in unet.items()}
    weights |= {f"first_stage_model.{key}": value for key, value in (vae_weight(*item) for item in vae.items())}
    weights |= TEXTS[family](folder)
    weights |= {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}  # what is there and not read
    return {key: value.contiguous() for key, value in weights.items()}


@pytest.fixture(scope="module", params=TEXTS)
def model(request, tmp_path_factory):
    """A family's name, its folder, the same without weights, and the same in a file."""
    place = tmp_path_factory.mktemp(request.param)
    folder = families.save(request.param, place)
    config = shutil.copytree(folder, place / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(original(request.param, folder), place / "file.safetensors")
    return request.param, folder, config, place / "file.safetensors"


def same(one, other):
    for (key, value), (other_key, other_value) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(value, other_value), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_is_the_folder(model, dtype):
    _, folder, config, file = model
    one = load_backbone(str(folder), dtype, image_size=16)
    other = load_backbone(str(file), dtype, image_size=16, config=str(config))
    same(one, other)
    assert other.name == str(file)
    noise = torch.randn(1, *one.latent_shape)
    told, again = (backbone.encode_text(["a red square"]) for backbone in (one, other))
    torch.testing.assert_close(
        told, again, atol=1e-6, rtol=1e-6
    )  # SDXL's projection lies otherwise in memory and rounds otherwise
    with torch.no_grad():
        drawn = [backbone.decode(backbone.sample(told, told, noise, 2, 3.0)) for backbone in (one, other)]
    assert torch.equal(*drawn)


# Its configuration


def test_configuration_comes_from_the_hub(model, hub, tiny, monkeypatch, request, capsys):
    family, folder, _, file = model
    monkeypatch.setitem(SHORT_NAMES, SHORT[family], "owner/model")
    match = (
        f"The file '{file}' holds weights alone, and the configuration of 'owner/model' is missing, in whose place --model.config can "
        r"name another model or folder: .*has not been downloaded completely, and this run is offline; run .*prefetch"
    )
    refused(match, file, offline=True)
    refused("holds weights alone, and .* neither a folder nor on the Hugging Face hub", file)
    hub.push("owner/model", folder)
    hub.push(CLIPS[768], f"{tiny}/clip")
    main(["prefetch", str(file)])
    assert "safetensors" not in capsys.readouterr().out.partition(f"{CLIPS[768]}:")[0]
    assert not any(path.startswith("/owner/model") and path.endswith(".safetensors") for _, path in hub.asked)
    forget_connections()
    attempts = request.getfixturevalue("attempts")
    same(load_backbone(str(file), offline=True), load_backbone(str(folder)))
    # As old versions of huggingface_hub do not look whether all is there, the loader does.
    incomplete = r"has not been downloaded completely|has no text_encoder/model\.safetensors; fetch"
    refused(incomplete, "owner/model", offline=True)
    assert not attempts


def test_configuration_of_another_model(model, hub, tmp_path):
    family, folder, config, file = model
    hub.push("owner/model", folder)
    same(load_backbone(str(file), config="owner/model"), load_backbone(str(folder)))
    refused(f"'{folder}' has a configuration and is no file; leave out --model.config", folder, config=str(config))
    refused("is neither 'emoji' nor an existing folder", file, config="nowhere")
    (tmp_path / "empty").mkdir()
    refused(f"'{tmp_path}/empty' has no model_index.json", file, config=str(tmp_path / "empty"))
    for other in {"sd1": "sdxl", "sd2": "sd1", "sdxl": "sd2"}[family], "flux":
        wrong = families.save(other, tmp_path / other)
        refused(
            rf"The networks of the model '{file}' cannot be read \(.+\); fetch it again or give a model that describes",
            file,
            config=str(wrong),
        )


# What is refused


@pytest.mark.parametrize(
    "part", ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.weight", "{text}"]
)
def test_weight_that_is_missing(model, tmp_path, part):
    family, _, config, file = model
    weights = load_file(file)
    text = {
        "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "sd2": "cond_stage_model.model.ln_final.bias",
        "sdxl": "conditioner.embedders.1.model.text_projection",
    }
    del weights[part.format(text=text[family])]
    save_file(weights, tmp_path / "less.safetensors")
    refused(
        r"less.safetensors' cannot be read \(the \w+ lacks 1 weights such as [\w.]+\)",
        tmp_path / "less.safetensors",
        config=str(config),
    )


@pytest.mark.parametrize("start", ["model.diffusion_model.", "first_stage_model."])
def test_network_that_is_missing(model, tmp_path, start):
    """All of its weights."""
    _, _, config, file = model
    save_file(
        {key: value for key, value in load_file(file).items() if not key.startswith(start)},
        tmp_path / "less.safetensors",
    )
    refused(
        r"The networks of the model '.*less.safetensors' cannot be read \(.+\); fetch",
        tmp_path / "less.safetensors",
        config=str(config),
    )


def test_files_that_are_none(model, tmp_path):
    _, _, config, file = model
    content = file.read_bytes()
    for name, data, match in (
        ("pickle.ckpt", content, r"not called \.safetensors, and pickle weights .* refused because they can run code"),
        ("short.safetensors", content[:-100], r"short\.safetensors' cannot be read \(.+\); fetch it again"),
        ("empty.safetensors", b"", r"empty\.safetensors' cannot be read \(.+\); fetch it again"),
        ("zip.safetensors", b"PK" * 500, r"zip\.safetensors' cannot be read \(.+\); fetch it again"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(match, tmp_path / name, config=str(config))
    weights = {key: value for key, value in load_file(file).items() if key.startswith("model.diffusion_model.")}
    save_file(weights, tmp_path / "unet.safetensors")
    refused(r"unet\.safetensors' has no text encoder of Stable Diffusion 1, 2 or XL", tmp_path / "unet.safetensors")


def test_a_search(model, pictures, tmp_path, attempts):
    _, _, config, file = model
    run = tmp_path / "run"
    args = ["fit", "--run", str(run), "--trainer.accelerator", "cpu", "--model", "PEZ", "--model.backbone", str(file)]
    args += ["--model.config", str(config), "--model.image_size", "16", "--model.offline", "true"]
    args += ["--model.tokens", "2", "--model.sampling_steps", "2", "--data.images", str(pictures / "0.png")]
    main([*args, "--data.steps", "2", "--data.samples", "1", "--data.validation_samples", "2"])
    main(["test", "--run", str(run)])
    assert json.loads((run / "result.json").read_text())["problems"][0]["prompt"]
    assert not attempts
