"""GCG, textual inversion, CLIP words, and searches that start from each other's results."""

import itertools
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from searches import fit, set_batch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text, fill_template
from lightning_prompts.callbacks import Results
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PEZ, PH2P, TextualInversion
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.search_clip import best_words
from lightning_prompts.methods.inversion.textual_inversion import pseudo_word
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import load_tokenizer
from lightning_prompts.sampling import Microbatch, SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")


def first_step(module):
    """Return the first step of a search, whose problems become the batch again."""
    set_batch(module, module.data.folder.load().values())
    return module.data.step()


# --- GCG


class RecordingGCG(GCG):
    """Record the proposals and results of each step."""

    def step(self, batch, rows):
        before, samples = self.prompt.project(), self.samples(rows, batch)
        super().step(batch, rows)
        after = self.prompt.project()
        with torch.no_grad():
            losses = [
                self.loss(rows, ids, self.prompt.table[ids], samples) for ids in map(self.prompt.ids, (before, after))
            ]
        self.steps_taken = [*getattr(self, "steps_taken", []), (before, after, *losses)]

    def _propose(self, step, rows, token_ids, gradient):
        proposed = super()._propose(step, rows, token_ids, gradient)
        self.proposals = [*getattr(self, "proposals", []), (rows, token_ids, *proposed)]
        return proposed


def test_step_only_accepts_better_candidates(tiny, image_folder, tmp_path):
    module = RecordingGCG(backbone=tiny, num_tokens=3, candidates=8, topk=16, n_replace=2, sampler=SamplerSettings(2))
    fit(module, image_folder, tmp_path, steps=6)
    changed = 0
    for before, after, loss_before, loss_after in module.steps_taken:
        moved = (before != after).any(1)
        assert ((before != after).sum(1) <= 2).all()
        assert (loss_after[moved] < loss_before[moved]).all()
        changed += int(moved.sum())
    assert changed


def test_step_with_many_candidates_is_an_exhaustive_search(tiny, image_folder, tmp_path):
    """With one position and more candidates than proposals, all tokens are evaluated."""
    module = RecordingGCG(
        backbone=tiny,
        num_tokens=1,
        candidates=400,
        topk=40,
        allowed_words=list("abcdefghijklmnop"),
        sampler=SamplerSettings(2),
    )
    fit(module, image_folder / "0.png", tmp_path, steps=1, num_noise_samples=1)
    ((before, after, *_),) = module.steps_taken
    allowed = module.prompt.allowed.nonzero()
    rows = torch.zeros(len(allowed), dtype=torch.long)
    samples = module.samples(torch.tensor([0]), first_step(module))[rows]
    with torch.no_grad():
        ids = module.prompt.ids(allowed)
        losses = module.loss(rows, ids, module.prompt.table[ids], samples)
    assert allowed[losses.argmin()] == after[0]
    assert before.shape == after.shape == (1, 1)


def test_proposals_have_the_lowest_one_hot_gradient(tiny, image_folder, tmp_path):
    module = RecordingGCG(backbone=tiny, num_tokens=2, candidates=50, topk=3, sampler=SamplerSettings(2))
    fit(module, image_folder / "0.png", tmp_path, steps=1)
    ((rows, token_ids, proposed, _),) = module.proposals
    table, allowed = module.prompt.table, module.prompt.allowed
    one_hot = F.one_hot(token_ids[0], len(table)).float().requires_grad_()
    ids = module.prompt.ids(token_ids)
    embeddings = table[ids].index_copy(1, module.prompt.positions, (one_hot @ table)[None])
    samples = module.samples(rows, first_step(module))
    (slope,) = torch.autograd.grad(module.loss(rows, ids, embeddings, samples).sum(), one_hot)
    for position in range(2):
        usable = [v for v in allowed.nonzero().flatten().tolist() if v != token_ids[0, position]]
        best = sorted(usable, key=lambda v: float(slope[position, v]))[:3]
        tokens = set(proposed[0, :, position].tolist()) - {int(token_ids[0, position])}
        assert tokens == set(best)


@pytest.mark.parametrize(("candidates", "n_replace", "prefilter"), [(30, 1, 1), (30, 2, 1), (12, 1, 3), (60, 1, 1)])
def test_no_candidate_is_evaluated_twice_in_a_step(candidates, n_replace, prefilter, tiny, image_folder, tmp_path):
    class Counting(GCG):
        def loss(self, rows, ids, *more, **how):
            if not torch.is_grad_enabled():
                evaluated.extend(
                    (self.batch[row].record.key, *text) for row, text in zip(rows.tolist(), ids.tolist(), strict=True)
                )
            return super().loss(rows, ids, *more, **how)

        def step(self, batch, rows):
            evaluated.clear()
            super().step(batch, rows)
            steps.append(list(evaluated))

    evaluated, steps = [], []
    words = list("abcdefghijklmnop")
    module = Counting(
        backbone=tiny,
        num_tokens=3,
        allowed_words=words,
        candidates=candidates,
        topk=12,
        n_replace=n_replace,
        prefilter=prefilter,
        sampler=SamplerSettings(2),
    )
    fit(module, image_folder, tmp_path, steps=3)
    possible = 3 * 12 if n_replace == 1 else candidates  # with two replacements there are more than are sampled
    for step in steps:
        assert len(set(step)) == len(step)
        assert len(step) == min(candidates, possible) * len(module.batch)


@pytest.mark.exact
@pytest.mark.parametrize("samples", [1, 3, 5])
def test_calls_do_not_depend_on_the_number_of_ranks(samples, tiny, image_folder, tmp_path, monkeypatch, rounding):
    """Only the last denoiser call is smaller than a microbatch."""
    runs = []

    class Compared(GCG):
        def _losses(self, *given):
            for ranks in (1, 2, 3):
                calls, self.microbatch.ranks = [], ranks
                with monkeypatch.context() as patch:
                    patch.setattr(Microbatch, "map", lambda self, n, work, on: self._map(torch.arange(n), work))
                    for part in ("encode", "denoise"):
                        record(patch, self.backbone, part, calls)
                    runs.append((calls, super()._losses(*given)))
            self.microbatch.ranks = 1
            return runs[-1][1]

    def record(patch, backbone, part, calls):
        call = getattr(backbone, part)
        patch.setattr(backbone, part, lambda x, *rest, **more: calls.append((part, len(x))) or call(x, *rest, **more))

    how = {
        "candidates": 9,
        "topk": 16,
        "loss_weights": LossWeights(clip=0.1),
        "microbatch": 4,
        "sampler": SamplerSettings(2),
    }
    fit(Compared(backbone=tiny, num_tokens=3, **how), image_folder, tmp_path, steps=1, num_noise_samples=samples)
    calls, losses = runs[0]
    sizes = [size for part, size in calls if part == "denoise"]
    assert set(sizes[:-1]) == {4}
    for others, other_losses in runs[1:]:
        for part in ("encode", "denoise"):
            assert [call for call in others if call[0] == part] == [call for call in calls if call[0] == part]
        assert torch.equal(other_losses, losses)


def test_prefilter_keeps_the_candidates_most_similar_to_the_clip_features(tiny, image_folder, tmp_path):
    class All(GCG):
        def _distances(self, rows, candidates):
            self.sampled = candidates
            return super()._distances(rows, candidates)

        def _propose(self, step, rows, token_ids, gradient):
            proposed = super()._propose(step, rows, token_ids, gradient)
            self.filtered = proposed[0]
            return proposed

    module = All(backbone=tiny, num_tokens=2, candidates=5, topk=8, prefilter=3, sampler=SamplerSettings(2))
    (problem,) = fit(module, image_folder / "0.png", tmp_path, steps=1)
    assert problem.unet_samples == 2 * 2 + 2 * 2 + 5 * 2
    clip, tokenizer, (feature,) = module.clip, module.vocabulary.tokenizer, module.features(torch.tensor([0]))

    def similarity(token_ids):
        text = clip.clip.get_text_features(input_ids=encode_text(tokenizer, [tokenizer.decode(token_ids)], 32))
        text = text if isinstance(text, torch.Tensor) else text.pooler_output
        return float(F.cosine_similarity(text[0], feature, dim=0))

    assert module.sampled.shape == (1, 15, 2)
    best = sorted((similarity(ids) for ids in module.sampled[0]), reverse=True)[:5]
    assert sorted((similarity(ids) for ids in module.filtered[0]), reverse=True) == pytest.approx(best, abs=1e-5)


def test_candidates_that_do_not_round_trip_are_not_evaluated(tiny, image_folder, tmp_path):
    class Broken(GCG):
        def _propose(self, step, rows, token_ids, gradient):
            candidates, sound = super()._propose(step, rows, token_ids, gradient)
            return candidates, torch.zeros_like(sound)

    module = Broken(backbone=tiny, num_tokens=2, candidates=4, sampler=SamplerSettings(2))
    (problem,) = fit(module, image_folder / "0.png", tmp_path)
    assert problem.unet_samples == 3 * 2 + 2 * 2 * 2  # three scorings and two gradients
    assert problem.validation_loss == problem.initial_validation_loss


def test_more_replacements_than_tokens_are_refused(tiny):
    with pytest.raises(UserError, match="n_replace"):
        GCG(backbone=tiny, num_tokens=2, n_replace=3)


# --- CLIP words


@pytest.fixture
def matching(tiny):
    """Create a CLIP, prompts of two tokens in its vocabulary, and features of three images."""
    vocabulary = load_backbone(tiny).vocabulary
    prompt = TokenEmbeddings(vocabulary, "a photo of {} , blurry", 2, allowed_words=tuple("abcdefghijk"))
    clip = ClipSimilarity(f"{tiny}/clip")
    return clip, prompt, clip.features(torch.rand(3, 3, 32, 32) * 2 - 1), vocabulary.tokenizer


def cosine(clip, tokenizer, feature, words):
    """Compute the cosine of an image and a text by its definition."""
    ids = encode_text(tokenizer, [fill_template("a photo of {} , blurry", words)], tokenizer.model_max_length)
    text = clip.clip.get_text_features(input_ids=ids)
    text = text if isinstance(text, torch.Tensor) else text.pooler_output
    return float(F.cosine_similarity(text[0], feature, dim=0))


def test_best_words_equal_a_plain_greedy_search(matching):
    clip, prompt, features, tokenizer = matching
    words = tokenizer.batch_decode(best_words(clip, prompt, features))
    for feature, text in zip(features, words, strict=True):
        first = max("abcdefghijk", key=lambda w: cosine(clip, tokenizer, feature, w))
        others = [w for w in "abcdefghijk" if w != first]
        second = max(others, key=lambda w: cosine(clip, tokenizer, feature, f"{first} {w}"))
        assert text.split() == [first, second]


def test_wide_beam_finds_the_best_pair(matching):
    clip, prompt, features, tokenizer = matching
    words = tokenizer.batch_decode(best_words(clip, prompt, features, beams=11, chunk=7))
    for feature, text in zip(features, words, strict=True):
        pairs = map(" ".join, itertools.permutations("abcdefghijk", 2))
        best = max(pairs, key=lambda pair: cosine(clip, tokenizer, feature, pair))
        assert cosine(clip, tokenizer, feature, text) == pytest.approx(cosine(clip, tokenizer, feature, best), abs=1e-6)


def test_words_repeat_only_when_none_are_left(tiny, matching):
    clip, _, features, _ = matching
    for count in (2, 3, 4):
        prompt = TokenEmbeddings(load_backbone(tiny).vocabulary, "{}", 3, allowed_words=tuple("abcd"[:count]))
        for beams in (1, 8):
            for words in best_words(clip, prompt, features, beams).tolist():
                assert len(set(words)) == min(count, 3)


def test_ids_of_shorter_prompts_equal_those_of_their_text(sd):
    vocabulary = load_backbone(str(sd)).vocabulary
    prompt = TokenEmbeddings(vocabulary, "a photo of {} , blurry", 4)
    token_ids = prompt.allowed.nonzero()[:8, 0].view(2, 4)
    for count in (1, 3, 4):
        words = [" ".join(text.split()) for text in vocabulary.tokenizer.batch_decode(token_ids[:, :count])]
        texts = [fill_template("a photo of {} , blurry", text) for text in words]
        encoded = encode_text(vocabulary.tokenizer, texts, vocabulary.length)
        ids = prompt.ids(token_ids[:, :count])
        end = int((ids[0] == vocabulary.tokenizer.eos_token_id).int().argmax()) + 1  # nothing after it is read
        assert torch.equal(ids[:, :end], encoded[:, :end])
        assert ids.shape == encoded.shape


# --- textual inversion


@pytest.mark.parametrize("negative", [False, True])
def test_pseudo_word_is_encoded_as_positive_or_negative_prompt(negative, tiny, image_folder, tmp_path, monkeypatch):
    """Negative prompts are encoded with all layers, whatever `clip_skip` is."""
    module = TextualInversion(backbone=tiny, num_tokens=2, sampler=SamplerSettings(2))
    (problem,) = fit(module, image_folder / "0.png", tmp_path, steps=1)
    calls, encode = [], module.backbone.encode
    monkeypatch.setattr(
        module.backbone,
        "encode",
        lambda *args, negative=False, **how: calls.append(negative) or encode(*args, negative=negative, **how),
    )
    module.encode([f"a {pseudo_word(problem)}"], negative)
    assert calls == [negative]


def test_pseudo_word_encodes_to_the_learned_embedding(tiny, image_folder, tmp_path):
    module = TextualInversion(
        backbone=tiny,
        num_tokens=2,
        optimizer=partial(torch.optim.AdamW, lr=0.1),
        template="a photo of {}",
        sampler=SamplerSettings(2),
    )
    problems = fit(module, image_folder, tmp_path, callbacks=[Results()], steps=4)
    exported = load_file(tmp_path / "embedding.safetensors")
    for row, problem in enumerate(problems):
        assert problem.token_ids is None
        assert problem.prompt == f"a photo of <{row}-{problem.key[:8]}>"
        assert torch.equal(exported[problem.key], torch.tensor(problem.embedding))
        ids, embeddings = module.prompt.ids(torch.tensor([[5, 5]])), torch.tensor(problem.embedding)
        replaced = module.prompt.table[ids].index_copy(1, module.prompt.positions, embeddings[None])
        own = module.backbone.encode(ids, replaced)[:, : module.prompt.positions[-1] + 1]
        read = module.encode([problem.prompt])[:, : module.prompt.positions[-1] + 1]
        torch.testing.assert_close(read, own)
        rows = torch.tensor([row])
        again = float(module.evaluate(rows, module.encode([problem.prompt])))
        assert problem.validation_loss == pytest.approx(again, abs=1e-6)
    assert (problems[0].validation_loss or 1) < (problems[0].initial_validation_loss or 0)
    one, other = (pseudo_word(problem) for problem in problems[:2])
    both = module.encode([f"two dogs beside {one}, a {other} and {one}"])
    ids = encode_text(module.vocabulary.tokenizer, ["two dogs beside w w , a w w and w w"], module.vocabulary.length)
    (positions,) = (ids[0] == module.vocabulary.tokenizer("w", add_special_tokens=False).input_ids[0]).nonzero(
        as_tuple=True
    )
    embedding = torch.tensor(problems[0].embedding + problems[1].embedding + problems[0].embedding)
    replaced = module.prompt.table[ids].index_copy(1, positions, embedding[None])
    torch.testing.assert_close(both, module.backbone.encode(ids, replaced))
    with pytest.raises(UserError, match=rf"has no pseudo-word <cat-01234567>; it has {one}, {other}, "):
        module.encode([f"{one} and <cat-01234567>"])
    elsewhere = module.encode([f"two dogs beside {problems[0].prompt}", "two dogs"])
    assert torch.equal(elsewhere[1:], PEZ(backbone=tiny).encode(["two dogs"]))


# --- searches that start from another


@pytest.mark.parametrize("source", [PEZ, TextualInversion])
@pytest.mark.parametrize("method", [PH2P, GCG, TextualInversion])
def test_search_starts_from_the_prompts_of_another_run(source, method, tiny, image_folder, tmp_path):
    own = {"candidates": 2} if method is GCG else {}
    earlier = fit(source(backbone=tiny, num_tokens=3, sampler=SamplerSettings(2)), image_folder, tmp_path / "first")
    starts = []

    class Recording(method):
        def init_params(self, rows):
            starts.append(super().init_params(rows))
            return starts[-1]

    module = Recording(backbone=tiny, num_tokens=4, init=str(tmp_path / "first"), sampler=SamplerSettings(2), **own)
    fit(module, image_folder, tmp_path / "second", steps=1)
    assert starts[0].shape[:2] == (3, 4)
    for row, problem in enumerate(earlier):
        assert torch.equal(starts[0][row, :3], module.embeddings_of(problem))


def test_earlier_run_without_an_image_is_refused(tiny, image_folder, tmp_path):
    fit(PEZ(backbone=tiny, num_tokens=2, sampler=SamplerSettings(2)), image_folder / "0.png", tmp_path / "first")
    module = PEZ(backbone=tiny, num_tokens=2, init=str(tmp_path / "first"), sampler=SamplerSettings(2))
    with pytest.raises(UserError, match=r"no prompt for 1\.png"):
        fit(module, image_folder, tmp_path / "second")


@pytest.mark.parametrize("other", [{"vocab_size": 99}, {"hidden_size": 64}])
def test_clip_with_other_token_embeddings_is_refused(other, tiny, image_folder, tmp_path):
    config = CLIPConfig.from_pretrained(f"{tiny}/clip")
    text, vision = {**config.text_config.to_dict(), **other}, config.vision_config.to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    load_tokenizer(f"{tiny}/clip").save_pretrained(tmp_path / "clip")
    module = PEZ(backbone=tiny, num_tokens=2, loss_weights=LossWeights(clip=1), clip=str(tmp_path / "clip"))
    advice = "give --model.loss_weights.clip 0, or name the CLIP that this text encoder was taken from as --model.clip"
    with pytest.raises(
        UserError, match=f"does not have the token embeddings of the model's CLIP text encoder; {advice}"
    ):
        fit(module, image_folder, tmp_path / "run")


def test_loss_weights_of_zero_are_refused(tiny):
    with pytest.raises(UserError, match="Both loss weights are 0"):
        PEZ(backbone=tiny, loss_weights=LossWeights(denoising=0))
