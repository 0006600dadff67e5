import itertools

import pytest

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.negative_words import NEGATIVE_WORDS
from lightning_prompts.methods.dpo_diff.neighbors import Neighbors
from lightning_prompts.methods.dpo_diff.space import Slot, Space, negative_slots, positive_slots
from lightning_prompts.methods.dpo_diff.word_sources import WordSources, fit_to_encoder


def make_space(prompt, substitutes, negative=None, empty=False):
    fixed, slots = positive_slots(prompt, substitutes, empty)
    return Space(fixed, slots, negative_slots(prompt, negative or {}))


def test_choices_replace_words_in_place():
    space = make_space("A small cat, on a Big mat.", {"cat": ["dog", "red fox"], "big": ["huge"]})
    assert [slot.words for slot in space.slots] == [("cat", "dog", "red fox"), ("Big", "huge")]
    assert space.size == 6
    assert space.texts([0, 0]) == ("A small cat, on a Big mat.", "")
    assert space.texts([2, 1]) == ("A small red fox, on a huge mat.", "")


def test_longer_phrases_take_precedence_and_parts_of_words_stay():
    space = make_space("an ice cream on ice, nice", {"ice": ["snow"], "ice cream": ["cake"]})
    assert [slot.name for slot in space.slots] == ["ice cream", "ice"]
    assert space.texts([1, 1]) == ("an cake on snow, nice", "")


@pytest.mark.parametrize(
    ("prompt", "without"),
    [
        ("a dog, blurry, red", "a dog, red"),
        ("a dog, blurry", "a dog"),
        ("blurry, a dog", "a dog"),
        ("a blurry dog", "a dog"),
        ("a dog; blurry; red", "a dog; red"),
    ],
)
def test_empty_choice_removes_its_comma(prompt, without):
    space = make_space(prompt, {"blurry": ["dark"]}, empty=True)
    (slot,) = space.slots
    assert slot.words == ("blurry", "dark", "")
    assert space.texts([2])[0] == without


def test_negative_prompt_joins_the_chosen_words_with_commas():
    space = make_space("a dark cat", {}, {"light": ["dark", "dim"], "form": ["cut off", "fused"], "none": ["dark"]})
    assert [slot.words for slot in space.slots] == [("", "dim"), ("", "cut off", "fused")]
    texts = [space.texts(choice)[1] for choice in itertools.product(range(2), range(3))]
    assert texts == ["", "cut off", "fused", "dim", "dim, cut off", "dim, fused"]


def test_protected_words_have_no_slot(tiny):
    vocabulary = load_backbone(tiny).vocabulary
    for protected, names in (([], ["small", "red", "cat"]), (["Red cat", "car"], ["small"])):
        space = WordSources(vocabulary, ["neighbors"], ["library"], empty=True, keep=protected).space(
            "a small, red cat"
        )
        assert [slot.name for slot in space.positive] == names
        assert len(space.negative) == 4


def test_duplicate_words_are_removed():
    space = make_space("a cat", {"cat": ["Cat", "dog", " dog ", "DOG"]})
    assert space.slots == (Slot("cat", ("cat", "dog")),)


def test_every_choice_fits_the_encoder_and_keeps_its_tokens(tiny):
    vocabulary = load_backbone(tiny).vocabulary
    words = {
        "cat": ["dog", "a very small cat in the corner of a picture of two dogs beside a tree"],
        "small": ["large", "2big"],
    }
    negative = {f"kind {i}": ["red", "blue square", "blurry", "in the top left corner of a photo"] for i in range(6)}
    space = fit_to_encoder(make_space("a photo of a small cat", words, negative), vocabulary)
    assert "dog" in space.slots[0].words + space.slots[1].words
    assert [len(slot.words) for slot in space.negative] == [len(space.negative[0].words)] * 6
    assert len(space.negative[0].words) > 1
    longest = [max(range(len(slot.words)), key=lambda i: len(slot.words[i])) for slot in space.slots]
    for choice in (longest, [0] * len(longest), [len(slot.words) - 1 for slot in space.slots]):
        encode_text(vocabulary.tokenizer, list(space.texts(choice)), vocabulary.length)  # raises if a text is too long
        for parts, text in zip(space.parts(choice), space.texts(choice), strict=True):
            tokens = [
                token
                for part in parts
                for token in vocabulary.tokenizer(part.text, add_special_tokens=False)["input_ids"]
            ]
            assert tokens == vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_neighbors_are_the_nearest_rows_of_the_table(tiny):
    vocabulary = load_backbone(tiny).vocabulary
    neighbors = Neighbors(vocabulary, 3)
    word = next(iter(neighbors.words))
    nearest = neighbors(word)
    table = vocabulary.table / vocabulary.table.norm(dim=1, keepdim=True)
    cosines = {
        name: float(table[token] @ table[neighbors.words[word]])
        for name, token in neighbors.words.items()
        if name != word
    }
    assert nearest == sorted(cosines, key=lambda name: -cosines[name])[:3]


def test_prompt_without_replaceable_words_is_refused(tiny):
    vocabulary = load_backbone(tiny).vocabulary
    with pytest.raises(UserError, match=r"'of the' has no word"):
        WordSources(vocabulary, ["neighbors"], []).space("of the")


def test_negative_words_are_distinct():
    words = [word for kind in NEGATIVE_WORDS.values() for word in kind]
    assert len(set(words)) == len(words) > 80
