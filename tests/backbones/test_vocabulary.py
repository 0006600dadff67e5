import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTokenizerFast, T5TokenizerFast

from lightning_prompts.backbones.vocabulary import (
    allowed_tokens,
    contains_blocked,
    encode_text,
    fill_template,
    fillers,
    nearest_tokens,
    round_trip,
    template_ids,
)
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer
from lightning_prompts.errors import UserError

MERGES = Path(__file__).parents[2].parent / "shared" / "data" / "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED = MERGES.parent / "published"
TEMPLATES = ["{}", "a photo of {} background", "a photo of {}, oil on canvas!", "#{}'s 'cat", "  ({}) ", "2024 {} 7"]
CAPTIONS = [
    "a photo of a cat on a green background",
    "two dogs and a cat don't run in 2024",
    "a painting of the red house, the blue house and the sea",
    "café in the snow 🐈 🐈 ☕",
    "the dog sees the sea; the cat sees the dog!",
]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return train_tokenizer(CAPTIONS * 4, 120, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    if not MERGES.exists():
        pytest.skip(f"CLIP's merges are not at {MERGES}")
    folder = tmp_path_factory.mktemp("clip")
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    order = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in order] + [chr(256 + i) for i in range(256 - len(order))]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m.split()) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


@pytest.fixture(scope="session")
def clip_allowed(clip):
    return allowed_tokens(clip)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reference(embeddings, table, allowed, metric):
    """Compute all differences in double precision."""
    x, rows = embeddings.double(), table.double()
    if metric == "cosine":
        allowed = allowed & (rows.norm(dim=-1) > 0)
        similar = x @ rows.T / rows.norm(dim=-1) / x.norm(dim=-1, keepdim=True)
        return similar.nan_to_num(nan=-torch.inf).masked_fill(~allowed, -torch.inf).argmax(-1)
    distance = torch.stack([(rows - e).square().sum(-1) for e in x.reshape(-1, x.shape[-1])])
    return distance.masked_fill(~allowed, torch.inf).argmin(-1).reshape(x.shape[:-1])


# --- nearest_tokens


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
@pytest.mark.parametrize("scale", [1e-3, 0.4, 1e3])
def test_nearest_tokens_equal_brute_force(metric, chunk, scale):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(301, 24, generator=g) * scale
    allowed = torch.rand(301, generator=g) < 0.5
    embeddings = torch.randn(3, 5, 24, generator=g)
    result = nearest_tokens(embeddings, table, allowed, metric, chunk)
    assert result.shape == (3, 5)
    assert result.dtype == torch.long
    assert torch.equal(result, reference(embeddings, table, allowed, metric))


def test_nearest_tokens_are_exact_where_a_product_is_not():
    g = torch.Generator().manual_seed(1)
    table = 1000 + torch.randn(500, 64, generator=g) * 1e-2  # |v|² is 6e7 and two distances differ by 1e-4
    embeddings = 1000 + torch.randn(2, 4, 64, generator=g) * 1e-2
    allowed = torch.ones(500, dtype=torch.bool)
    naive = (table.square().sum(-1) - 2 * embeddings @ table.T).argmin(-1)
    expected = reference(embeddings, table, allowed, "euclidean")
    assert not torch.equal(naive, expected)
    assert torch.equal(nearest_tokens(embeddings, table, allowed, chunk=99), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_tokens_do_not_depend_on_the_matmul_precision(metric, monkeypatch):
    g = torch.Generator().manual_seed(2)
    table = torch.randn(2000, 48, generator=g)
    embeddings = torch.randn(8, 8, 48, generator=g) * 0.3
    allowed = torch.ones(2000, dtype=torch.bool)
    expected = reference(embeddings, table, allowed, metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_tokens(embeddings, table, allowed, metric, 300), expected)
    exact = torch.Tensor.__matmul__
    coarse = lambda a, b: exact(a.bfloat16().float(), b.bfloat16().float())  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)  # as torch.set_float32_matmul_precision("medium") allows
    assert torch.equal(nearest_tokens(embeddings, table, allowed, metric, 300), expected)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_ties_go_to_the_lowest_id(chunk):
    g = torch.Generator().manual_seed(3)
    table = torch.randint(-1, 2, (400, 3), generator=g).float()  # 27 different rows
    embeddings = torch.randint(-1, 2, (10, 6, 3), generator=g) / 2
    allowed = torch.rand(400, generator=g) < 0.7
    expected = reference(embeddings, table, allowed, "euclidean")
    assert torch.equal(nearest_tokens(embeddings, table, allowed, "euclidean", chunk), expected)
    same = torch.randn(1, 33, generator=g).expand(100, 33)
    x = torch.randn(4, 4, 33, generator=g)
    for metric in ("euclidean", "cosine"):
        assert nearest_tokens(x, same, torch.arange(100) > 41, metric, chunk).eq(42).all()
    multiples = torch.randint(-9, 10, (33,), generator=g) * torch.arange(1.0, 101).unsqueeze(1)  # exact in float32
    assert nearest_tokens(x, multiples, torch.arange(100) > 6, "cosine", chunk).eq(7).all()
    assert nearest_tokens(multiples[9:10] / 10, multiples, torch.arange(100) > 6, "cosine", chunk).eq(7).all()


def test_cosine_ignores_length_and_zero_rows():
    table = torch.tensor([[0.0, 0.0], [10.0, 10.0], [1.0, 0.0], [-1.0, -1.0]])
    embeddings = torch.tensor([[[0.9, 0.8], [3.0, 0.1], [-1.0, -2.0], [0.0, 0.0]]])
    allowed = torch.ones(4, dtype=torch.bool)
    assert nearest_tokens(embeddings, table, allowed, "cosine").tolist() == [[1, 2, 3, 1]]
    assert nearest_tokens(embeddings, table, allowed).tolist() == [[2, 2, 3, 0]]
    allowed[1:] = False
    with pytest.raises(UserError, match="No token is allowed"):
        nearest_tokens(embeddings, table, allowed, "cosine")


def test_nearest_tokens_take_half_precision_and_have_no_gradient():
    table = torch.nn.Parameter(torch.eye(6, dtype=torch.float16))
    result = nearest_tokens(torch.eye(6).flip(0).bfloat16().requires_grad_(), table, torch.ones(6, dtype=torch.bool))
    assert result.tolist() == [5, 4, 3, 2, 1, 0]
    assert not result.requires_grad


def test_nearest_tokens_of_a_few_prompts_need_one_product():
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **kwargs or {})

    table, allowed = torch.randn(1000, 8), torch.rand(1000) < 0.5
    with Record():
        nearest_tokens(torch.randn(4, 8, 8), table, allowed)
    assert names.count("mm.default") == names.count("nonzero.default") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allowed": torch.zeros(5, dtype=torch.bool)}, "No token is allowed"),
        ({"allowed": torch.ones(6, dtype=torch.bool)}, "6 entries and the token embeddings have 5 rows"),
        ({"metric": "dot"}, "'dot' is unknown"),
        ({"embeddings": torch.full((1, 1, 2), torch.nan)}, "not finite"),
        ({"embeddings": torch.full((1, 1, 2), 1e30)}, "exceed 1e18"),
    ],
)
def test_invalid_inputs_of_nearest_tokens_are_refused(changes, message):
    given = {"embeddings": torch.ones(1, 1, 2), "table": torch.ones(5, 2), "allowed": torch.ones(5, dtype=torch.bool)}
    with pytest.raises(UserError, match=message):
        nearest_tokens(**{**given, **changes})


# --- allowed_tokens


def test_allowed_tokens_are_visible_word_final_text(small):
    allowed = allowed_tokens(small)
    tokens = small.convert_ids_to_tokens(range(len(small)))
    assert allowed.shape == (len(small),)
    assert allowed.dtype == torch.bool
    usable = {tokens[i] for i in allowed.nonzero().flatten().tolist()}
    assert {"cat</w>", "a</w>", "!</w>", "7</w>"} <= usable
    assert all(token.endswith("</w>") for token in usable)
    assert not usable & {"A</w>", "cat", "Ġ</w>", "Ā</w>", "<|startoftext|>", "<|endoftext|>"}  # Ā is byte 0
    assert any("🐈" in small.decode(i) for i in allowed.nonzero().flatten().tolist())


def test_added_tokens_are_not_allowed(small, tmp_path):
    small.save_pretrained(tmp_path)
    more = CLIPTokenizerFast.from_pretrained(tmp_path)
    more.add_tokens(["sks"])
    allowed = allowed_tokens(more)
    assert more("sks")["input_ids"][1:-1] == [len(more) - 1]
    assert len(allowed) == len(more)
    assert not allowed[-1]
    assert torch.equal(allowed[:-1], allowed_tokens(small))


def test_mask_has_the_length_of_the_table(small):
    """Rows without a token are not allowed; tokens without a row are not in the mask."""
    own = allowed_tokens(small)
    assert torch.equal(allowed_tokens(small, rows=len(small) + 28), torch.cat([own, torch.zeros(28, dtype=torch.bool)]))
    assert torch.equal(allowed_tokens(small, rows=len(small) - 90), own[:-90])
    last = small.decode(own.nonzero()[-1]).strip()
    assert allowed_tokens(small, words=["a", last], rows=len(small) - 90).nonzero().flatten().tolist() == ids_of(
        small, "a"
    )
    table = torch.zeros(len(small) + 28, 4)
    table[: len(small)] = 1 + torch.rand(len(small), 4)
    result = nearest_tokens(torch.zeros(1, 3, 4), table, allowed_tokens(small, rows=len(table)))
    assert own[result].all()


def test_text_without_an_embedding_is_refused(small):
    assert encode_text(small, ["a cat"], 8, rows=len(small)).shape == (1, 8)
    with pytest.raises(
        UserError, match=r"'a cat' contains the token '<\|endoftext\|>', for which the .* table of 9 rows has no"
    ):
        encode_text(small, ["a cat"], 8, rows=9)
    with pytest.raises(UserError, match="contains the token"):
        template_ids(small, "{} cat", 2, rows=9)


@pytest.mark.parametrize("name", ["flux-dev/tokenizer_2", "sd3/tokenizer_3"])
def test_t5_vocabulary_leaves_out_rows_without_a_token(name):
    """T5 has 32128 rows and 32100 tokens, none of which is the letter a."""
    if not PUBLISHED.exists():
        pytest.skip(f"The published tokenizers are not at {PUBLISHED}")
    t5 = T5TokenizerFast.from_pretrained(PUBLISHED / name)
    allowed = allowed_tokens(t5, rows=32128)
    assert (len(t5), len(allowed)) == (32100, 32128)
    assert not allowed[32000:].any()  # extra ids, and rows without a token
    assert 21_900 < int(allowed.sum()) < 22_000
    assert [len(ids_of(t5, word)) for word in fillers(t5)] == [1, 1]
    usable = allowed.nonzero().flatten()
    rows = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(6))[:8000]].view(-1, 8)
    for template in TEMPLATES:
        assert_template(t5, template, rows, 512)


def test_blocked_substrings_and_word_lists_limit_the_tokens(small):
    free, cat, dog = allowed_tokens(small), ids_of(small, "cat")[0], ids_of(small, "dog")[0]
    blocked = allowed_tokens(small, blocked=["CA", "two words"])
    assert free[cat]
    assert not blocked[cat]
    assert blocked[dog]
    excluded = (free & ~blocked).nonzero().flatten().tolist()
    assert excluded == [i for i in free.nonzero().flatten().tolist() if "ca" in small.decode(i)]
    only = allowed_tokens(small, words=["Cat", "dog", "dog", "unheardofword", ""])
    assert only.nonzero().flatten().tolist() == sorted([cat, dog])
    assert allowed_tokens(small, blocked=["do"], words=["cat", "dog"]).nonzero().flatten().tolist() == [cat]


def test_settings_that_leave_no_token_are_refused(small):
    n = int(allowed_tokens(small).sum())
    with pytest.raises(UserError, match=rf"Of the {n} .* words \(1 given, which are 0 of these\) leaves none"):
        allowed_tokens(small, words=["unheardofword"])
    with pytest.raises(
        UserError, match=r"words \(2 given, which are 2 of these\) with the setting blocked \(1 given\)"
    ):
        allowed_tokens(small, blocked=["t"], words=["cat", "two"])
    with pytest.raises(UserError, match=r"words \(0 given"):
        allowed_tokens(small, words=[])
    with pytest.raises(UserError, match="blocked word ' ' is empty"):
        allowed_tokens(small, blocked=["cat", " "])
    with pytest.raises(UserError, match=r"blocked is the text 'cat'.*\['cat'\]"):
        allowed_tokens(small, blocked="cat")


# --- round_trip


def test_tokens_that_merge_in_text_do_not_round_trip(small):
    tokens = small.convert_ids_to_tokens(range(len(small)))
    cat, c, a, t = ids_of(small, "cat")[0], *(tokens.index(token) for token in ("c", "a", "t</w>"))
    ids = torch.tensor([[cat, cat, cat], [c, a, t], [cat, cat, c], [cat, cat, small.eos_token_id]])
    texts, same = round_trip(small, ids)
    assert texts[:3] == ["cat cat cat", "cat", "cat cat c"]
    assert same.tolist() == [True, False, False, False]
    assert same.dtype == torch.bool


def test_round_trip_of_empty_inputs(small):
    assert round_trip(small, torch.empty(0, 3, dtype=torch.long))[0] == []
    texts, same = round_trip(small, torch.empty(2, 0, dtype=torch.long))
    assert texts == ["", ""]
    assert same.tolist() == [True, True]


def test_tokens_of_a_sentence_round_trip_with_other_spaces(small):
    ids = ids_of(small, CAPTIONS[1])
    texts, same = round_trip(small, torch.tensor([ids]))
    assert texts == ["two dogs and a cat don 't run in 2 0 2 4"]
    assert same.all()


# --- contains_blocked


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a NUDE body", "nude"),
        ("denuded hills", "Nude"),
        ("a nu de body", "nude"),
        ("don 't look", "don't"),
        ("in 2 0 2 4 5", "2024"),
        ("a t - shirt", "T-shirt"),
        ("an ice   cream van", "ice cream"),
        ("ｎｕｄｅ", "nude"),
        ("nu\u200bde nu\u00adde nu\x01de", "nude"),
        ("STRASSE", "straße"),
        ("what ? ! ?", "?!"),
        ("cafe\u0301", "CAFÉ"),
    ],
)
def test_blocked_words_are_recognized(text, word):
    assert contains_blocked(text, ["zebra", word])


@pytest.mark.parametrize(
    ("text", "word"), [("glass exit", "sex"), ("a cream ice", "ice cream"), ("nu", "nude"), ("a+b", "a.b"), ("", "a")]
)
def test_other_words_are_not_blocked(text, word):
    assert not contains_blocked(text, [word])


def test_empty_blocked_word_is_refused():
    assert not contains_blocked("a cat", [])
    with pytest.raises(UserError, match="is empty"):
        contains_blocked("a cat", ["\u200b"])


def test_blocked_word_of_several_tokens_is_recognized(small):
    ids = ids_of(small, "zebra")
    assert len(ids) > 1
    texts, _ = round_trip(small, torch.tensor([ids]))
    assert contains_blocked(texts[0], ["Zebra"])


# --- encode_text


def test_encode_text_pads_as_the_tokenizer_does(small):
    ids = encode_text(small, ["a cat", "", "a dog sees the sea"], CONTEXT)
    assert ids.dtype == torch.long
    assert ids.shape == (3, CONTEXT)
    expected = small(["a cat", "", "a dog sees the sea"], padding="max_length", max_length=CONTEXT)["input_ids"]
    assert ids.tolist() == expected
    assert encode_text(small, [], 9).shape == (0, 9)


def test_encode_text_refuses_long_texts(small):
    fits = " ".join(["cat"] * (CONTEXT - 2))
    assert encode_text(small, [fits], CONTEXT)[0, -1] == small.eos_token_id
    with pytest.raises(UserError, match=f"has {CONTEXT + 1} tokens .* takes {CONTEXT}; shorten it"):
        encode_text(small, ["cat", fits + " cat"], CONTEXT)


# --- templates


def assert_template(tokenizer, template, rows, length):
    """Assert that word-final tokens at the positions are the tokens of the filled template."""
    ids, positions = template_ids(tokenizer, template, rows.shape[1])
    assert ids.shape == (length,)
    assert positions.shape == rows.shape[1:]
    inserted = ids.repeat(len(rows), 1)
    inserted[:, positions] = rows
    texts, same = round_trip(tokenizer, rows)
    assert same.all(), [t for t, s in zip(texts, same.tolist(), strict=True) if not s][:5]
    assert torch.equal(encode_text(tokenizer, [fill_template(template, text) for text in texts], length), inserted)


@pytest.mark.parametrize("template", TEMPLATES)
def test_inserted_tokens_equal_those_of_the_written_text(small, template):
    usable = allowed_tokens(small).nonzero().flatten()
    rows = usable[torch.randint(len(usable), (300, 5), generator=torch.Generator().manual_seed(4))]
    assert_template(small, template, rows, CONTEXT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_template_positions_are_contiguous(small, side):
    small.padding_side = side
    try:
        ids, positions = template_ids(small, "a photo of {} background", 3, 20)
    finally:
        small.padding_side = "right"
    assert ids.shape == (20,)
    assert len(set(positions.diff().tolist())) == 1
    a = ids_of(small, "a")[0]
    assert ids[positions].tolist() == [a] * 3
    rest = ids.tolist()[: int(positions[0])] + ids.tolist()[int(positions[-1]) + 1 :]
    assert [i for i in rest if i not in small.all_special_ids] == ids_of(small, "a photo of background")


@pytest.mark.parametrize(
    ("template", "tokens", "message"),
    [
        ("a photo", 2, "has 0 pairs of braces; write {} exactly once"),
        ("{} and {}", 2, "has 2 pairs"),
        ("a {word} cat", 2, "has 0 pairs"),
        ("pre{}", 2, "touch a letter"),
        ("{}7", 2, "touch a letter"),
        ("{}", 0, "at least 1 token, got 0"),
        ("the cat {}", 31, f"has 35 tokens .* 31 of the prompt.*takes {CONTEXT}; use at most 28 prompt tokens"),
        ("cat " * 40 + "{}", 1, f"has 43 tokens .*takes {CONTEXT}; shorten the template"),
    ],
)
def test_invalid_templates_are_refused(small, template, tokens, message):
    with pytest.raises(UserError, match=message):
        template_ids(small, template, tokens)


def test_tokenizer_without_a_length_needs_one(small, tmp_path):
    small.save_pretrained(tmp_path)
    loaded = CLIPTokenizerFast.from_pretrained(tmp_path, model_max_length=None)
    loaded.model_max_length = int(1e30)
    with pytest.raises(UserError, match="give the length"):
        template_ids(loaded, "{}", 2)
    assert template_ids(loaded, "{}", 2, 8)[1].tolist() == [1, 2]


def test_fill_template_inserts_the_text():
    assert fill_template("a photo of {}, oil", " red cat ") == "a photo of red cat , oil"
    assert fill_template("{}", "red {} cat") == "red {} cat"
    assert fill_template("a {} b", "") == "a b"


# --- CLIP's own vocabulary


def test_clip_vocabulary_equals_the_published_one(clip):
    assert (len(clip), clip.bos_token_id, clip.eos_token_id) == (49408, 49406, 49407)
    assert clip("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_allowed_tokens_of_clip_are_computed_quickly(clip, clip_allowed):
    start = time.perf_counter()
    blocked = allowed_tokens(clip, blocked=[f"word{i}" for i in range(400)] + ["nude", "gun"])
    seconds = time.perf_counter() - start
    assert seconds < 15  # 2 s on an idle machine
    assert 34_000 < int(clip_allowed.sum()) < 34_303  # tokens that survive alone, including special and invisible ones
    tokens = clip.convert_ids_to_tokens(range(49408))
    assert all(tokens[i].endswith("</w>") for i in clip_allowed.nonzero().flatten().tolist())
    assert not clip_allowed[
        [49406, 49407, 39802, 9844, 1001, 8621]
    ].any()  # U+FFFD, U+200B, U+FE0F, a blank Braille sign
    assert clip_allowed[[320, 1125, 2368]].all()
    excluded = {clip.decode(i) for i in (clip_allowed & ~blocked).nonzero().flatten().tolist()}
    assert {"nude", "nudes", "gun", "gunner", "begun"} <= excluded
    assert all("nude" in text or "gun" in text for text in excluded)
    some = allowed_tokens(clip, words=["cat", "sunflower", "Photo", "sunflowerfield"])
    assert some.nonzero().flatten().tolist() == sorted([2368, 1125, ids_of(clip, "sunflower")[0]])


def test_round_trip_failures_of_clip_are_detected(clip):
    ids = torch.tensor([[6808, 31978, 23644, 32441, 41003, 16125], [320, 1125, 539, 320, 2368, 2368]])
    texts, same = round_trip(clip, ids)
    assert texts == ["critical murraycaneleroy brandi xiv", "a photo of a cat cat"]
    assert len(ids_of(clip, texts[0])) == 7
    assert same.tolist() == [False, True]


def test_every_allowed_clip_token_round_trips(clip, clip_allowed):
    usable = clip_allowed.nonzero().flatten()
    shuffled = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(5))]
    assert_template(clip, "a photo of {}, 'oil' #2", shuffled[: len(usable) // 8 * 8].reshape(-1, 8), 77)


def test_projection_to_clip_tokens_is_exact_and_fast(clip_allowed):
    g = torch.Generator().manual_seed(6)
    table = torch.randn(49408, 768, generator=g) * 0.014  # the lengths of CLIP's rows
    embeddings = torch.randn(2, 8, 768, generator=g) * 0.02
    start = time.perf_counter()
    result = nearest_tokens(embeddings, table, clip_allowed)
    seconds = time.perf_counter() - start
    assert seconds < 10  # 0.2 s on an idle machine
    assert torch.equal(result, reference(embeddings, table, clip_allowed, "euclidean"))
    assert torch.equal(
        nearest_tokens(embeddings, table, clip_allowed, "cosine"), reference(embeddings, table, clip_allowed, "cosine")
    )
