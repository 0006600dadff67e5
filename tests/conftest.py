"""Fixtures: tiny pipelines with random weights, in the layouts of the Hugging Face hub."""

import logging
import os
import shutil
import signal
from pathlib import Path

import families
import pytest
import torch
from inputs import noise
from rounding import rounding_by_shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # a second thread slows networks this small down
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Keep caches out of the user's folders, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def benchmarks(monkeypatch):
    """Let the scripts in benchmarks/ be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Restore the handler of Ctrl-C, which Lightning disables after the first SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def float64():
    """Allow a CLIP to be checked in float64.

    Transformers 4 creates its mask in float32, which cannot hold the lowest float64.
    """
    try:
        from transformers.modeling_attn_mask_utils import AttentionMaskConverter
    except ImportError:  # later versions create it in the precision of the network
        yield
        return
    original = AttentionMaskConverter._make_causal_mask

    def mask(shape, dtype, *args, **options):
        return original(shape, torch.float32 if dtype == torch.float64 else dtype, *args, **options).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionMaskConverter, "_make_causal_mask", staticmethod(mask))
        yield


@pytest.fixture(autouse=True)
def silent():
    """Undo the logging setup of the command line, which would affect other tests in the same process."""
    logging.getLogger("lightning_prompts").setLevel(logging.NOTSET)


@pytest.fixture
def rounding():
    """Make layers round by the shape of each call, see `rounding_by_shape`."""
    with rounding_by_shape():
        yield


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Return a folder in the layout of Stable Diffusion 1.5.

    It has epsilon prediction, PNDM, padding with the end of text, and the legacy end-of-text id.
    """
    return families.save("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """Return a folder in the layout of Stable Diffusion 2.1.

    It has v-prediction, DDIM, padding with "!", and another width and activation.
    """
    return families.save("sd2", tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def sd(request):
    """Return each of the two folders."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny(sd1, tmp_path_factory):
    """Return the first folder with a CLIP beside its components, as whole runs need it."""
    folder = shutil.copytree(sd1, tmp_path_factory.mktemp("tiny") / "model")
    torch.manual_seed(0)
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder / "clip")
    families.save_image_processor(folder / "clip")
    CLIPTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(folder / "clip")
    return str(folder)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Return a folder with a causal language model that has a few words."""
    folder = tmp_path_factory.mktemp("language_model")
    words = {word: i for i, word in enumerate("<bos> <unk> a red blue cat dog on".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image_folder(tmp_path):
    """Return a folder with three images of noise."""
    folder = tmp_path / "image_folder"
    folder.mkdir()
    for i in range(3):
        noise(seed=i).save(folder / f"{i}.png")
    return folder
