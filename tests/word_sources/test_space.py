import itertools

import pytest

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.negative_words import NEGATIVE_WORDS
from lightning_prompts.methods.dpo_diff.neighbors import Neighbors
from lightning_prompts.methods.dpo_diff.space import Slot, Space, negative_slots, positive_slots
from lightning_prompts.methods.dpo_diff.word_sources import WordSources, fit_to_encoder


def space(prompt, substitutes, negative=None, empty=False):
    fixed, slots = positive_slots(prompt, substitutes, empty)
    return Space(fixed, slots, negative_slots(prompt, negative or {}))


def test_words_are_put_where_the_others_stood():
    found = space("A small cat, on a Big mat.", {"cat": ["dog", "red fox"], "big": ["huge"]})
    assert [slot.words for slot in found.slots] == [("cat", "dog", "red fox"), ("Big", "huge")]
    assert found.size == 6
    assert found.texts([0, 0]) == ("A small cat, on a Big mat.", "")
    assert found.texts([2, 1]) == ("A small red fox, on a huge mat.", "")


def test_longer_phrases_go_first_and_parts_of_words_stay():
    found = space("an ice cream on ice, nice", {"ice": ["snow"], "ice cream": ["cake"]})
    assert [slot.name for slot in found.slots] == ["ice cream", "ice"]
    assert found.texts([1, 1]) == ("an cake on snow, nice", "")


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
def test_empty_choice_takes_its_comma_with_it(prompt, without):
    found = space(prompt, {"blurry": ["dark"]}, empty=True)
    (slot,) = found.slots
    assert slot.words == ("blurry", "dark", "")
    assert found.texts([2])[0] == without


def test_negative_prompt_has_commas_between_what_is_chosen():
    found = space("a dark cat", {}, {"light": ["dark", "dim"], "form": ["cut off", "fused"], "none": ["dark"]})
    assert [slot.words for slot in found.slots] == [("", "dim"), ("", "cut off", "fused")]
    texts = [found.texts(choice)[1] for choice in itertools.product(range(2), range(3))]
    assert texts == ["", "cut off", "fused", "dim", "dim, cut off", "dim, fused"]


def test_kept_words_have_no_slot(tiny):
    tower = load_backbone(tiny).vocabulary
    for keep, names in (([], ["small", "red", "cat"]), (["Red cat", "car"], ["small"])):
        found = WordSources(tower, ["neighbors"], ["library"], empty=True, keep=keep).space("a small, red cat")
        assert [slot.name for slot in found.positive] == names
        assert len(found.negative) == 4


def test_words_are_there_once():
    found = space("a cat", {"cat": ["Cat", "dog", " dog ", "DOG"]})
    assert found.slots == (Slot("cat", ("cat", "dog")),)


def test_every_choice_fits_and_is_read_as_it_was_put_together(tiny):
    tower = load_backbone(tiny).vocabulary
    words = {
        "cat": ["dog", "a very small cat in the corner of a picture of two dogs beside a tree"],
        "small": ["large", "2big"],
    }
    negative = {f"kind {i}": ["red", "blue square", "blurry", "in the top left corner of a photo"] for i in range(6)}
    found = fit_to_encoder(space("a photo of a small cat", words, negative), tower)
    assert "dog" in found.slots[0].words + found.slots[1].words
    assert [len(slot.words) for slot in found.negative] == [len(found.negative[0].words)] * 6
    assert len(found.negative[0].words) > 1
    longest = [max(range(len(slot.words)), key=lambda i: len(slot.words[i])) for slot in found.slots]
    for choice in (longest, [0] * len(longest), [len(slot.words) - 1 for slot in found.slots]):
        encode_text(tower.tokenizer, list(found.texts(choice)), tower.length)  # raises where there is no room
        for parts, text in zip(found.parts(choice), found.texts(choice), strict=True):
            tokens = [
                token for part in parts for token in tower.tokenizer(part.text, add_special_tokens=False)["input_ids"]
            ]
            assert tokens == tower.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_neighbors_are_the_nearest_rows_of_the_table(tiny):
    tower = load_backbone(tiny).vocabulary
    near = Neighbors(tower, 3)
    word = next(iter(near.words))
    found = near(word)
    table = tower.table / tower.table.norm(dim=1, keepdim=True)
    cosines = {
        name: float(table[token] @ table[near.words[word]]) for name, token in near.words.items() if name != word
    }
    assert found == sorted(cosines, key=lambda name: -cosines[name])[:3]


def test_prompt_without_replaceable_words_is_refused(tiny):
    tower = load_backbone(tiny).vocabulary
    with pytest.raises(UserError, match=r"'of the' has no word"):
        WordSources(tower, ["neighbors"], []).space("of the")


def test_negative_words_are_distinct():
    words = [word for kind in NEGATIVE_WORDS.values() for word in kind]
    assert len(set(words)) == len(words) > 80
