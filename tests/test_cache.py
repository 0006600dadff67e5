"""Cached tensors equal computed ones, even if their files are damaged."""

import os

import pytest
import torch
from safetensors.torch import save_file
from searches import fit

from lightning_prompts.backbones import load_backbone
from lightning_prompts.cache import cache_folder, cached, fingerprint
from lightning_prompts.methods import GCG
from lightning_prompts.methods.inversion import search_clip
from lightning_prompts.methods.inversion.search_clip import word_features
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.sampling import SamplerSettings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counted(values):
    """Return a function that computes, and a list of its calls."""
    calls = []
    return lambda: calls.append(1) or torch.tensor(values), calls


def test_values_are_computed_once(folder):
    compute, calls = counted([1.0, 2.0])
    for _ in range(3):
        assert cached("words", {"clip": "a"}, compute).tolist() == [1.0, 2.0]
    assert len(calls) == 1
    assert cached("words", {"clip": "b"}, counted([3.0])[0]).tolist() == [3.0]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "other", "nan", "empty", "folder"])
def test_values_of_a_damaged_file_are_computed_again(damage, folder):
    cached("words", {"clip": "a"}, counted([1.0, 2.0])[0])
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "other":
        save_file({"words": torch.tensor([5.0])}, file, {"description": "something else"})
    elif damage == "nan":
        file.write_bytes(whole[:-8] + torch.tensor([1.0, float("nan")]).numpy().tobytes())
    else:
        file.write_bytes(whole[:-3] if damage == "cut" else b"")
    compute, calls = counted([1.0, 2.0])
    assert cached("words", {"clip": "a"}, compute).tolist() == [1.0, 2.0]
    assert len(calls) == 1


def test_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "file" / "cache"))
    assert cached("words", {"clip": "a"}, counted([1.0])[0]).tolist() == [1.0]


def test_environment_variables_set_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTNING_PROMPTS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path.home() / ".cache" / "lightning_prompts"


def test_fingerprint_depends_on_every_value():
    layer = torch.nn.Linear(3, 2)
    before = fingerprint(layer)
    assert before == fingerprint(layer)
    with torch.no_grad():
        layer.bias[1] += 1e-6
    assert fingerprint(layer) != before
    assert fingerprint(layer.to(torch.bfloat16)) != before


def test_cached_word_features_equal_computed_ones(tiny, folder, monkeypatch):
    backbone, clip = load_backbone(tiny), ClipSimilarity(os.path.join(tiny, "clip"))
    prompt = TokenEmbeddings(backbone.vocabulary, "a photo of {}", 3, blocked=("cat",))
    expected = search_clip.prompt_features(clip, prompt, prompt.allowed.nonzero(), as_text=False)
    computed = word_features(clip, prompt, as_text=False)
    torch.testing.assert_close(computed, expected, atol=1e-6, rtol=0)
    calls = []
    monkeypatch.setattr(search_clip, "prompt_features", lambda *args: calls.append(args))
    assert torch.equal(word_features(clip, prompt, as_text=False), computed)
    other = TokenEmbeddings(backbone.vocabulary, "a photo of {}", 2, blocked=("dog",))  # another length and word list
    assert word_features(clip, other, as_text=False).shape == (int(other.allowed.sum()), computed.shape[1])
    assert not calls


def test_changes_of_the_features_give_another_file(tiny, folder):
    backbone, clip = load_backbone(tiny), ClipSimilarity(os.path.join(tiny, "clip"))
    for template in ("{}", "a {}"):
        word_features(clip, TokenEmbeddings(backbone.vocabulary, template, 2), as_text=False)
    prompt = TokenEmbeddings(backbone.vocabulary, "{}", 2)
    word_features(clip, prompt, as_text=True)
    clip.clip.text_projection.weight.data[0, 0] += 1
    word_features(clip, prompt, as_text=False)
    assert len(list(folder.iterdir())) == 4


def test_features_of_a_few_words_are_not_cached(tiny, folder):
    backbone, clip = load_backbone(tiny), ClipSimilarity(os.path.join(tiny, "clip"))
    prompt = TokenEmbeddings(backbone.vocabulary, "{}", 2, words=("red", "cat"))
    assert 1 <= len(word_features(clip, prompt, as_text=False)) == int(prompt.allowed.sum()) <= 2
    assert not folder.exists()


def test_search_computes_word_features_once(tiny, image_folder, tmp_path, monkeypatch):
    """Images that join the batch later use the same features."""
    calls, original = [], search_clip.word_features
    monkeypatch.setattr(search_clip, "word_features", lambda *args: calls.append(args) or original(*args))
    module = GCG(backbone=tiny, num_tokens=2, init="clip_words", candidates=2, batch_size=1, sampler=SamplerSettings(2))
    assert len(fit(module, image_folder, tmp_path / "run", steps=1)) == 3
    assert len(calls) == 1
