"""The family of models in examples/aura_flow, as a package of its own adds it."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaTokenizerFast, UMT5Config, UMT5EncoderModel

from lightning_prompts import entry_points, invert
from lightning_prompts.backbones import Backbone, load_backbone, registry
from lightning_prompts.backbones.base import _FAMILIES
from lightning_prompts.backbones.embedding_files import pack_embedding, read_embedding
from lightning_prompts.commands.plugins import import_plugins
from lightning_prompts.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples/aura_flow"
POINT = EntryPoint("aura_flow", "aura_flow:AuraFlow", registry.ENTRY_POINTS)
SHORT = {"num_tokens": 3, "steps": 3, "num_noise_samples": 2, "num_validation_samples": 2,
         "sampler": {"num_inference_steps": 2}}  # fmt: skip


def llama():
    """Return a Llama tokenizer of the captions' words, which does not add the start token that it has."""
    words = sorted({f"▁{word.strip(',')}" for caption in families.CAPTIONS for word in caption.split()})
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz,.!-'", *map("".join, merges)]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    with TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return LlamaTokenizerFast.from_pretrained(
            folder, pad_token="<s>", padding_side="right", add_bos_token=False, add_eos_token=True
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny AuraFlow with random weights."""
    torch.manual_seed(0)
    tokenizer = llama()
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer) + 5, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    ))  # fmt: skip
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer, encoder, families.vae(scaling_factor=0.13025), transformer, families.flow(shift=1.73)
    )
    path = tmp_path_factory.mktemp("aura_flow") / "model"
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Declare the example's family for one test, as its installation does."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(entry_points, "entry_points", lambda group: [POINT] if group == POINT.group else [])
    registry._import_others.cache_clear()
    yield
    registry._import_others.cache_clear()
    _FAMILIES.pop("AuraFlowPipeline", None)
    sys.modules.pop("aura_flow", None)


@pytest.fixture
def pipeline(folder):
    """Return diffusers' own pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["folder", "pipeline"])
def backbone(request, folder, pipeline):
    """Return the backbone of the folder and that of the loaded pipeline."""
    return load_backbone(folder) if request.param == "folder" else Backbone.from_pipeline(pipeline)


def test_encoded_prompts_equal_the_pipelines(backbone, pipeline):
    expected, _, negative, _ = pipeline.encode_prompt(families.TEXTS, "a dark picture")
    torch.testing.assert_close(backbone.encode_text(families.TEXTS), expected)
    torch.testing.assert_close(backbone.encode_text(["a dark picture"] * 2, negative=True), negative)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampled_images_equal_the_pipelines(guidance, backbone, pipeline):
    noise = torch.randn(2, *backbone.latent_shape)
    how = {"height": 16, "width": 16, "guidance_scale": guidance, "num_inference_steps": 3}
    expected = pipeline(families.TEXTS, latents=noise, output_type="pt", **how).images
    with torch.no_grad():
        latents = backbone.sample(backbone.encode_text(families.TEXTS), backbone.encode_text([""]), noise, 3, guidance)
        images = backbone.decode(latents)
    torch.testing.assert_close(images / 2 + 0.5, expected, atol=1e-4, rtol=1e-4)
    assert images.std() > 0.01


def test_encoded_tokens_equal_their_encoded_text(backbone):
    vocabulary = backbone.vocabulary
    ids = vocabulary.encode_text(["a red cat", ""])
    encoded = backbone.encode_text(["a red cat", ""])
    torch.testing.assert_close(backbone.encode(ids), encoded)
    torch.testing.assert_close(backbone.encode(ids, vocabulary.table[ids]), encoded)
    assert not torch.allclose(backbone.encode(ids, vocabulary.table[ids.flip(0)])[0], encoded[0])
    assert vocabulary.empty(ids).tolist() == [False, True]


@pytest.mark.parametrize(("method", "own"), [("pez", {}), ("ph2p", {"restart_every": 2})])
def test_methods_run_on_the_family(method, own, folder, tmp_path):
    """Both methods take gradients through all of the model, and use no CLIP."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photo.png")
    result = invert(tmp_path / "photo.png", method=method, backbone=folder, **SHORT, **own)
    assert result.prompt
    assert result.images[0].size == (16, 16)
    losses = [actual["validation_loss"] for actual in result.record.history]
    assert losses == sorted(losses, reverse=True)


def test_embedding_files_use_the_key_of_the_family(folder, tmp_path):
    backbone, embedding = load_backbone(folder), torch.randn(2, 32)
    (tmp_path / "fox.safetensors").write_bytes(pack_embedding(embedding, backbone, "<fox>"))
    assert load_file(tmp_path / "fox.safetensors").keys() == {"pile_t5xl"}
    assert torch.equal(read_embedding(tmp_path / "fox.safetensors", backbone), embedding)
    with pytest.raises(UserError, match=r"is an embedding, which --model\.init takes"):
        load_backbone(str(tmp_path / "fox.safetensors"))
    save_file({"t5xxl": embedding}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"holds t5xxl of width 32, and the model .* needs pile_t5xl"):
        read_embedding(tmp_path / "other.safetensors", backbone)


def test_vocabulary_of_the_family_is_a_setting(folder):
    assert load_backbone(folder, vocabulary="pile_t5").vocabulary.text_encoders[0].kind == "pile_t5"
    with pytest.raises(UserError, match=r"vocabulary must be pile_t5 for the model .*, got 't5'; change it"):
        load_backbone(folder, vocabulary="t5")


def test_code_in_the_docs_equals_the_example():
    """The code of the docs' section is that of the example, which the other tests run."""
    section = (EXAMPLE.parents[1] / "docs/extending.md").read_text()
    section = section.partition("## A family of models")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (declaration,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    assert code in (EXAMPLE / "aura_flow.py").read_text()
    assert declaration in (EXAMPLE / "pyproject.toml").read_text()


def test_family_is_unknown_until_installed_or_a_plugin(folder, monkeypatch):
    monkeypatch.setattr(entry_points, "entry_points", lambda group: [])
    with pytest.raises(UserError, match="is a AuraFlowPipeline; only StableDiffusionPipeline"):
        load_backbone(folder)
    import_plugins(["--plugin", "aura_flow"])
    assert type(load_backbone(folder)).__name__ == "AuraFlow"
