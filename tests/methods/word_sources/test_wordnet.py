import sys

import pytest

from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff import wordnet
from lightning_prompts.methods.dpo_diff.wordnet import WordNet


@pytest.fixture(scope="module")
def words():
    """Load the database of this machine."""
    try:
        return WordNet()
    except UserError as error:
        pytest.skip(str(error))


def test_synonyms_share_a_meaning(words):
    assert "automobile" in words.synonyms("car")
    assert words.synonyms("car")[:2] == ["auto", "automobile"]  # in the order of meanings
    assert "car" not in words.synonyms("car")
    assert "ice cream" not in words.synonyms("ice cream")
    assert "hot dog" in words.synonyms("hotdog")  # words of several parts have spaces


def test_antonyms_include_those_of_similar_words(words):
    assert words.antonyms("small")[:1] == ["large"]
    assert "wet" in words.antonyms("dry")
    assert "bloodless" in words.antonyms("crimson")  # of what crimson is similar to


def test_unknown_words_have_no_synonyms_or_antonyms(words):
    assert words.synonyms("qwrtz") == words.antonyms("qwrtz") == []


def test_count_limits_the_synonyms(words):
    assert len(WordNet(count=3).synonyms("dog")) == 3
    assert WordNet(count=3).synonyms("dog") == words.synonyms("dog")[:3]


def test_missing_wordnet_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet, "PLACES", (str(tmp_path),))
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(UserError, match="wordnet-base"):
        WordNet()
    with pytest.raises(UserError, match=r"no data\.noun"):
        WordNet(str(tmp_path))


@pytest.mark.parametrize("folder", [None, "."])
def test_missing_nltk_is_reported(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"needs nltk, .*; run `pip install 'lightning-prompts\[wordnet\]'`\.$"):
        WordNet(folder)
