import builtins
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_prompts.backbones import EMOJI
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.semantic_similarity import SemanticSimilarity, filter_by_similarity
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.objectives.clip import ClipSimilarity

SPACE = Space(("a ", " on a ", " mat"), (Slot("cat", ("cat", "dog", "red fox")), Slot("big", ("big", "huge"))))


@pytest.fixture
def clip():
    return ClipSimilarity(str(EMOJI / "clip"))


def test_cosines_equal_those_of_clip_text_features(clip):
    texts = ["a cat", "a dog", "a cat on a red mat"]
    features = torch.cat([clip.text_features(clip.encode([text])) for text in texts])
    torch.testing.assert_close(SemanticSimilarity(clip)(texts[0], texts), features @ features[0])


def test_cosines_do_not_depend_on_autocast(clip):
    texts = ["a cat", "a dog", "a cat on a red mat"]
    with torch.autocast("cpu", torch.bfloat16):
        result = SemanticSimilarity(clip)(texts[0], texts)
    assert torch.equal(result, SemanticSimilarity(clip)(texts[0], texts))


def test_text_reaches_similarity_one_with_itself(clip):
    texts = [f"a {size} {name}" for size in ("small", "large") for name in ("cat", "dog", "tree", "fox")]
    assert all(SemanticSimilarity(clip).reaches(1.0, text, [text]) == [True] for text in texts)
    assert SemanticSimilarity(clip).reaches(1.0, "a cat", ["a dog", "a cat"]) == [False, True]
    assert SemanticSimilarity(clip).reaches(1.0, "a cat", []) == []


@pytest.mark.exact
def test_cosines_do_not_depend_on_earlier_calls(clip, rounding):
    similarity, others = SemanticSimilarity(clip), ["a dog", "a cat on a red mat"]
    first = similarity("a cat", others)
    similarity("a tree", ["a dog", "a cat"])
    similarity("a cat", ["a cat on a red mat", "a fox beside a very large green tree", "a red square"])
    assert torch.equal(similarity("a cat", others), first)
    assert torch.equal(SemanticSimilarity(clip)("a cat", others), first)


class Encoder:
    """Count the letters of a text, as features that are not of unit length."""

    def __init__(self, name, local_files_only):
        if name != "letters":
            raise OSError(name)

    def encode(self, texts, convert_to_tensor, show_progress_bar):
        assert convert_to_tensor
        return torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts])


def test_named_encoder_replaces_clip(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    similarity = SemanticSimilarity(clip, "letters")
    one, other = (Encoder("letters", True).encode([text], True, False).float() for text in ("abba", "abb"))
    torch.testing.assert_close(
        similarity("abba", ["abb", "abba"]), torch.tensor([float(F.cosine_similarity(one, other)), 1.0])
    )
    with pytest.raises(UserError, match="'unknown' cannot be loaded"):
        SemanticSimilarity(clip, "unknown")


def test_missing_library_is_reported(clip, monkeypatch):
    def absent(name, *args, imported=builtins.__import__, **kwargs):
        if name == "sentence_transformers":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        SemanticSimilarity(clip, "letters")


def test_words_that_change_the_meaning_are_filtered_out():
    cosines = {"a dog on a big mat": 0.95, "a red fox on a big mat": 0.8, "a cat on a huge mat": 0.5}

    class Given(SemanticSimilarity):
        def __init__(self):
            pass

        def __call__(self, text, others):
            assert text == "a cat on a big mat"
            return torch.tensor([1.0 if other == text else cosines[other] for other in others])

    similarity = Given()
    kept = filter_by_similarity(SPACE, similarity, 0.9)
    assert kept == Space(("a ", " on a big mat"), (Slot("cat", ("cat", "dog")),))
    assert filter_by_similarity(SPACE, similarity, 0.5) == SPACE
    with pytest.raises(UserError, match="keeps the meaning"):
        filter_by_similarity(SPACE, similarity, 0.96)
