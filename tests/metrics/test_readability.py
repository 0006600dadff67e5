import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from lightning_prompts.errors import UserError
from lightning_prompts.metrics import DictionaryWords, Perplexity, SpecialCharacters, read_dictionary


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red cat", 1),
        ("A RED Café", 1),
        ("a red fferfish", 2 / 3),
        ("redcat", 0),  # whole words only
        ("red, (cat)! 🙂", 1),  # symbols are not words
        ("t-shirt don't", 1 / 2),
        ("cat cat zzz cat", 3 / 4),
        ("cat 7", 1 / 2),
    ],
)
def test_dictionary_words_equal_counts_by_hand(prompt, expected):
    assert float(DictionaryWords(["a", "Red", "cat", "café", "don't"])([prompt])) == pytest.approx(expected)


def test_dictionary_words_average_over_words(assert_adds_up):
    metric = DictionaryWords(["cat"])
    assert float(metric(["cat", "zzz yyy"])) == pytest.approx(1 / 3)
    assert_adds_up(metric, (["cat", "zzz yyy", ""],), (["cat"],), (["zzz yyy"],), ([""],))


@pytest.mark.parametrize("prompts", [[], [""], ["!?"]])
def test_dictionary_words_without_words_is_nan(prompts):
    assert math.isnan(DictionaryWords(["cat"])(prompts))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red cat", 0),
        ("cat!", 1 / 4),
        ("don't", 1 / 5),
        ("a-b_c", 2 / 5),
        ("café 42 \t", 0),
        ("cafe\u0301", 0),  # an accent of its own
        ("日本 हिन्दी", 0),
        ("🙂🙂 ok", 2 / 5),
        ("\u200b", 1),  # invisible
    ],
)
def test_special_characters_equal_counts_by_hand(prompt, expected):
    assert float(SpecialCharacters()([prompt])) == pytest.approx(expected)


def test_special_characters_average_over_characters(assert_adds_up):
    metric = SpecialCharacters()
    assert float(metric(["!", "cat"])) == pytest.approx(1 / 4)
    assert_adds_up(metric, (["!", "cat", ""],), (["!"],), (["cat"],), ([""],))


def test_dictionary_is_read(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffcat\r\n\r\nCafé \ndon't\n".encode())
    assert read_dictionary(file) == {"cat", "Café", "don't"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"", "has no words"), (b" \n", "has no words"), (b"caf\xe9", "is not UTF-8 text")],
)
def test_bad_dictionary_is_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"words.txt {reason}.*; give --dictionary .* one word per line\.$"):
        read_dictionary(tmp_path / "words.txt")


def test_folder_as_dictionary_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_dictionary(tmp_path)


# --- perplexity

PROMPTS = ["a red cat", "dog", "a cat on a blue dog zzz"]


def without_bos(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "without")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    return str(copy)


def likelihoods(folder, prompt):
    """Compute the log-probability of each scored token with a separate call of the model."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = ([] if tokenizer.bos_token is None else [tokenizer.bos_token_id]) + [
        tokenizer.convert_tokens_to_ids(word) for word in prompt.split()
    ]
    with torch.no_grad():
        scores = [(model(torch.tensor([ids[:end]])).logits[0, -1].double(), ids[end]) for end in range(1, len(ids))]
    return [float(logits[token] - logits.exp().sum().log()) for logits, token in scores]


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_equals_its_definition(language_model, tmp_path, bos):
    folder = language_model if bos else without_bos(language_model, tmp_path)
    expected_terms = [likelihood for prompt in PROMPTS for likelihood in likelihoods(folder, prompt)]
    assert len(expected_terms) == (3 + 1 + 7 if bos else 2 + 0 + 6)
    expected = math.exp(-sum(expected_terms) / len(expected_terms))
    metric = Perplexity(folder, offline=True)
    assert float(metric(PROMPTS)) == pytest.approx(expected, rel=1e-5)
    alone = [float(metric([prompt])) for prompt in (PROMPTS[0], PROMPTS[2])]
    assert expected != pytest.approx(sum(alone) / 2, rel=1e-4)  # the mean over tokens, not over prompts


def test_perplexity_adds_up(language_model, assert_adds_up):
    assert_adds_up(Perplexity(language_model), (PROMPTS,), (PROMPTS[:1],), (PROMPTS[1:],))


def test_perplexity_of_nothing_is_nan(language_model, tmp_path):
    assert math.isnan(Perplexity(language_model)([""]))
    assert math.isnan(Perplexity(without_bos(language_model, tmp_path))(["dog"]))


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(language_model):
    metric = Perplexity(language_model)
    torch.nn.init.zeros_(metric.model.lm_head.weight)
    assert float(metric(PROMPTS)) == pytest.approx(metric.model.config.vocab_size, rel=1e-5)


def test_long_prompt_is_scored_up_to_the_context(language_model):
    metric = Perplexity(language_model)
    words = ["a", "red", "cat", "on"] * 10
    context = metric.model.config.max_position_embeddings
    assert float(metric([" ".join(words)])) == pytest.approx(float(metric([" ".join(words[: context - 1])])), rel=1e-6)


def test_language_model_is_frozen_and_has_no_dropout(language_model):
    metric = Perplexity(language_model)
    assert not any(p.requires_grad for p in metric.parameters())
    before = float(metric(PROMPTS))
    metric.train()  # as a LightningModule that holds it does
    assert float(metric(PROMPTS)) == before


@pytest.mark.parametrize("defect", ["missing", "not a folder", "no tokenizer", "pickle", "a weight less", "a CLIP"])
def test_bad_language_model_is_refused(language_model, tiny, tmp_path, defect):
    folder = shutil.copytree(language_model, tmp_path / "mine")
    weights = folder / "model.safetensors"
    if defect == "missing":
        shutil.rmtree(folder)
    elif defect == "not a folder":
        shutil.rmtree(folder)
        folder.write_text("no model")
    elif defect == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif defect == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif defect == "a weight less":
        state = load_file(weights)
        state.pop("transformer.h.0.attn.c_attn.weight")
        save_file(state, weights, {"format": "pt"})
    elif defect == "a CLIP":
        shutil.rmtree(folder)
        shutil.copytree(f"{tiny}/clip", folder)
    with pytest.raises(UserError, match=r"mine' cannot be loaded \(.*\); give --language_model a folder or hub id"):
        Perplexity(str(folder), offline=True)
