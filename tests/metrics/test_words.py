import pytest

from lightning_prompts.metrics import WordRecall
from lightning_prompts.metrics.words import all_words, content_words


def recall(prompts, captions, synonyms=None):
    return float(WordRecall(synonyms)(prompts, captions))


SYNONYMS = {"cat": ("kitten",), "red": ("crimson", "scarlet"), "large": ("big", "huge"), "blurry": ()}


@pytest.mark.parametrize(
    ("prompt", "caption", "expected"),
    [
        ("red cat", "a red cat", 1),
        ("cat", "a red cat", 1 / 2),
        ("", "a red cat", 0),
        ("RED! CAT?", "a red, cat.", 1),
        ("crimson kitten", "a red cat", 1),
        ("red cat", "a scarlet kitten", 1),
        ("scarlet", "a crimson kitten on a blue background", 1 / 3),  # of crimson, kitten and blue
        ("category redder", "a red cat", 0),  # whole words only
        ("a on the background", "a red cat on a background", 0),  # words without content do not count
        ("blurry", "a blurry large cat", 1 / 3),
        ("cat cat cat", "a cat and a dog", 1 / 2),
        ("t-shirt", "a t-shirt", 1),
        ("'cat' -red-", "a red cat", 1),  # quoted or dashed
    ],
)
def test_word_recall_equals_counts_by_hand(prompt, caption, expected):
    assert recall([prompt], [caption], SYNONYMS) == pytest.approx(expected)


def test_word_recall_without_synonyms_needs_the_word_itself():
    assert recall(["kitten"], ["a cat"]) == 0


def test_word_recall_averages_over_words():
    assert recall(["red", ""], ["a red cat", "a dog"]) == pytest.approx(1 / 3)
    metric = WordRecall()
    metric.update(["red"], ["a red cat"])
    metric.update([""], ["a dog"])
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_word_recall_of_nothing_is_zero():
    assert recall([], []) == 0
    assert recall(["cat"], ["a"]) == 0


def test_word_recall_needs_a_caption_per_prompt():
    with pytest.raises(ValueError, match="zip"):
        recall(["cat", "dog"], ["a cat"])


def test_word_recall_of_two_ranks_averages_over_words():
    one, other = WordRecall(), WordRecall()
    one.update(["red"], ["a red cat"])
    other.update([""], ["a dog"])
    one.merge_state(other)
    assert float(one.compute()) == pytest.approx(1 / 3)


def test_all_words_splits_a_text():
    assert all_words("A t-shirt - don't 'say' 3D, ok? 🙂") == ["a", "t-shirt", "don't", "say", "3d", "ok"]


def test_content_words_leaves_out_function_words():
    assert content_words("A small café, don't; on the RED background") == ["small", "café", "don't", "red"]
