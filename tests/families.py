"""Tiny pipelines of every family, with random weights, in the layouts of the hub.

They have the irregularities of published models: T5's table has more rows than its tokenizer has tokens and no token
for "a"; CLIP's tokenizers come without tokenizer.json and their text encoders' configs have the end-of-text id 2, which
no tokenizer has; keys that model_index.json has got later are absent.
"""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.sampling_loop import generators_of
from lightning_prompts.emoji.tokenizer import CONTEXT
from lightning_prompts.errors import UserError

EXTRA, PADDED = (
    3,
    28,
)  # T5's extra tokens, and rows of its table without a token; published models have 100 and 28
CAPTIONS = [
    "a red square on a blue background",
    "a photo of a small cat in the top left corner",
    "two dogs beside a large tree, blurry",
    "a dark picture of a green circle",
]
TEXTS = ["a red square on a blue background", "two dogs and a Cat"]
NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip


@cache
def tokenizer_of_captions():
    """Build CLIP's tokenizer with 40 merges that were learned from the captions.

    The merges are in a file because the trainer breaks ties differently from process to process.
    """
    merges = [line.split() for line in (Path(__file__).parent / "merges.txt").read_text().splitlines()[1:]]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    vocab = {token: id for id, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text((Path(__file__).parent / "merges.txt").read_text())
        return CLIPTokenizerFast(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=CONTEXT)


def clip(width, pad="<|endoftext|>", new=False, kind=CLIPTextModel, **text):
    """Return a CLIP's tokenizer and text encoder, whose config has the ids of old files unless `new`."""
    tokenizer = copy.deepcopy(tokenizer_of_captions())
    tokenizer.pad_token = pad
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=tokenizer.bos_token_id if new else 0,
        eos_token_id=tokenizer.eos_token_id if new else 2, pad_token_id=tokenizer.pad_token_id if new else 1, **text,
    )  # fmt: skip
    return tokenizer, kind(config)


def unigram(pieces):
    """Return a T5 tokenizer of pieces and their scores.

    It is read from a file, since arguments differ between transformers 4 and 5.
    """
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in range(EXTRA)])
    with TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return T5TokenizerFast.from_pretrained(folder, extra_ids=EXTRA)


def t5(width):
    """Return a T5 tokenizer with the captions' words and letters, and a T5 encoder.

    Its table has rows without a token.
    """
    words = dict.fromkeys(word.strip(",") for caption in CAPTIONS for word in caption.split() if len(word) > 1)
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, **{f"▁{word}": -2.0 for word in words}, "▁": -3.0}
    pieces |= dict.fromkeys("abcdefghijklmnopqrstuvwxyz,.!-'", -4.0)
    pieces |= {f"<extra_id_{i}>": 0.0 for i in reversed(range(EXTRA))}
    config = T5Config(
        vocab_size=len(pieces) + PADDED,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return unigram(pieces), T5EncoderModel(config)


def vae(**config):
    """Return an autoencoder with two pixels per latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, **config,
    )  # fmt: skip


def unet(width, **config):
    """Return a UNet for images of 16 pixels."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **config,
    )


def stable_diffusion(folder, scheduler, width, pipeline="StableDiffusionPipeline", time_cond=None, **text):
    """Build a pipeline with one CLIP and a UNet."""
    tokenizer, encoder = clip(width, **text)
    return getattr(diffusers, pipeline)(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet(width, time_cond_proj_dim=time_cond),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder, scheduler, **autoencoder):
    """Build a pipeline with two CLIPs that pad differently, a pooled vector, and sizes."""
    one, first = clip(32)
    two, second = clip(48, "!", kind=CLIPTextModelWithProjection, projection_dim=24)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True, **autoencoder),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=one,
        tokenizer_2=two,
        unet=unet(80, **added),
        scheduler=scheduler,
    )


def sd3(folder, scheduler):
    """Build a flow-matching pipeline with two CLIPs and a T5."""
    one, first = clip(32, kind=CLIPTextModelWithProjection, projection_dim=24)
    two, second = clip(48, "!", kind=CLIPTextModelWithProjection, projection_dim=40)
    three, third = t5(96)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        scheduler,
        vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        first,
        one,
        second,
        two,
        third,
        three,
    )


def flux(folder, scheduler, guidance=True):
    """Build a guidance-distilled pipeline with a CLIP's pooled vector and a T5."""
    one, first = clip(32)
    two, second = t5(48)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler,
        vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        first,
        one,
        second,
        two,
        transformer,
    )


def pixart(scheduler):
    """Build a pipeline with a T5 whose padding is masked."""
    tokenizer, encoder = t5(32)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(tokenizer, encoder, vae(), transformer, scheduler)


def flow(**config):
    """Return a flow-matching scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


BUILD = {
    "sd1": lambda folder: stable_diffusion(
        folder,
        diffusers.PNDMScheduler(**NOISE, set_alpha_to_one=False, skip_prk_steps=True),
        32,
        hidden_act="quick_gelu",
    ),
    "sd2": lambda folder: stable_diffusion(
        folder,
        diffusers.DDIMScheduler(**NOISE, set_alpha_to_one=False, prediction_type="v_prediction", clip_sample=False),
        48,
        pad="!",
        hidden_act="gelu",
        projection_dim=16,
        new=True,
    ),
    "sd-turbo": lambda folder: stable_diffusion(
        folder, diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"), 48, pad="!"
    ),
    "lcm": lambda folder: stable_diffusion(
        folder, diffusers.LCMScheduler(**NOISE), 32, "LatentConsistencyModelPipeline", 16
    ),
    "sdxl": lambda folder: sdxl(folder, diffusers.EulerDiscreteScheduler(**NOISE)),
    "playground": lambda folder: sdxl(
        folder,
        diffusers.EDMDPMSolverMultistepScheduler(),
        scaling_factor=0.5,
        latents_mean=[-1.6, 1.9, -1.4, 2.5],
        latents_std=[8.5, 5.9, 6.5, 5.2],
    ),
    "sd3": lambda folder: sd3(folder, flow(shift=3.0)),
    "flux": lambda folder: flux(folder, flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)),
    "flux-schnell": lambda folder: flux(folder, flow(shift=1.0), guidance=False),
    "pixart": lambda folder: pixart(
        diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++")
    ),
}


def edit(file, change):
    """Change the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def save(family, folder):
    """Save a family's pipeline and return its folder."""
    torch.manual_seed(0)
    pipeline = BUILD[family](folder)
    pipeline.save_pretrained(folder / "model")
    for tokenizer in (folder / "model").glob("tokenizer*"):
        without_tokenizer_json(tokenizer)
    index = json.loads((folder / "model/model_index.json").read_text())
    index = {name: value for name, value in index.items() if name not in NEWER}
    (folder / "model/model_index.json").write_text(json.dumps(index))
    if family == "sdxl":  # the default is true
        edit(folder / "model/model_index.json", lambda index: index.pop("force_zeros_for_empty_prompt"))
    return folder / "model"


NEWER = ("feature_extractor", "image_encoder", "requires_safety_checker", "safety_checker")
"""Optional keys of model_index.json."""


def without_tokenizer_json(folder):
    """Replace the tokenizer.json of a CLIP tokenizer with vocab.json and merges.txt, as old transformers wrote."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    if model["type"] == "BPE":
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (folder / "tokenizer.json").unlink()


def save_image_processor(folder, size=32, mean=0.5, std=0.5):
    """Write the preprocessor_config.json of a CLIP that takes pixels in [-1, 1], as this project's own CLIPs do."""
    config = {"size": {"shortest_edge": size}, "crop_size": size, "image_mean": [mean] * 3, "image_std": [std] * 3}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))


def save_with_clip(family, folder):
    """Save a family's pipeline with a CLIP beside its components, as complete runs require."""
    model = save(family, folder)
    torch.manual_seed(0)
    tokenizer, text = clip(32)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    own = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(own).save_pretrained(model / "clip")
    save_image_processor(model / "clip")
    tokenizer.save_pretrained(model / "clip")
    without_tokenizer_json(model / "clip")
    return str(model)


def correct_end(encoder, tokenizer):
    """Let a CLIP text encoder pool at the end of the text.

    With the end-of-text id of an old config, transformers pools at an added token.
    """
    for part in encoder.modules():
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = tokenizer.eos_token_id


def latents_of(pipeline, noise, guidance):
    """Sample latents (B, C, h, w) of TEXTS with a pipeline."""
    how = {"height": 16, "width": 16, "guidance_scale": guidance, "num_inference_steps": 3, "output_type": "latent"}
    if isinstance(pipeline, diffusers.FluxPipeline):
        packed = pipeline._pack_latents(noise, *noise.shape[:1], noise.shape[1], *noise.shape[2:])
        sampled = pipeline(TEXTS, latents=packed, **how).images
        return pipeline._unpack_latents(sampled, 16, 16, 2)
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        how |= {"use_resolution_binning": False, "clean_caption": False}
    if isinstance(pipeline, diffusers.LatentConsistencyModelPipeline):
        how["generator"] = generators_of(noise)  # it adds noise at each step; ours depends on the row
    return pipeline(TEXTS, latents=noise, **how).images


def assert_refused(match, name, **how):
    """Assert that a model is refused in one sentence; return the message."""
    with pytest.raises(UserError, match=match) as error:
        load_backbone(str(name), **how)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text
    return text
