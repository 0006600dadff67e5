"""Tiny pipelines with random weights, in the layouts that are found on the hub."""

import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer

torch.set_num_threads(1)  # networks this small only wait for a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # nor do the processes that tests start need one, beside the other tests

CAPTIONS = [
    "a red square on a blue background",
    "a photo of a small cat in the top left corner",
    "two dogs beside a large tree, blurry",
    "a dark picture of a green circle",
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A folder laid out as Stable Diffusion 1.5: epsilon, PNDM, padding with the end of text, legacy end-of-text id."""
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True)
    return _save(
        tmp_path_factory.mktemp("sd1"), scheduler, width=32, pad="<|endoftext|>", hidden_act="quick_gelu", eos=2
    )


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """A folder laid out as Stable Diffusion 2.1: v-prediction, DDIM, padding with "!", another width and activation."""
    scheduler = DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False)
    return _save(tmp_path_factory.mktemp("sd2"), scheduler, width=48, pad="!", hidden_act="gelu", projection_dim=16)


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def sd(request):
    """Each of the two folders."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny(sd1, tmp_path_factory):
    """The first folder with a CLIP beside its components, as whole runs need it."""
    folder = shutil.copytree(sd1, tmp_path_factory.mktemp("tiny") / "model")
    torch.manual_seed(0)
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "clip")
    return str(folder)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A folder of a causal language model that knows a few words."""
    folder = tmp_path_factory.mktemp("language_model")
    words = {word: i for i, word in enumerate("<bos> <unk> a red blue cat dog on".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures of noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip


def _save(folder, scheduler, width, pad, eos=None, **text):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 40, folder / "learned")
    tokenizer.pad_token = pad
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **text,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=width, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
