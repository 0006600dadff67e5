"""Text encoders that are not searched, CLIPs with other vocabularies, and tables with too few rows."""

import logging
import shutil
from functools import partial

import diffusers
import families
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file
from searches import fit, set_batch
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from lightning_prompts import dpo_diff, metric_guidance
from lightning_prompts.backbones import BackboneSettings, load_backbone
from lightning_prompts.backbones.text_encoders import TextEncoder
from lightning_prompts.backbones.vocabulary import round_trip
from lightning_prompts.callbacks import Results
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PEZ, PH2P, ClipWords, RandomTokens, TextualInversion
from lightning_prompts.methods.dpo_diff.logits import WordChoices
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.search_clip import best_words, reads_tokens, word_features
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity, Sharpness
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"num_tokens": 2, "sampler": SamplerSettings(2), "log_images_every_n_steps": 0}


@pytest.fixture
def read(monkeypatch):
    """Record all texts that text encoders encode."""
    seen, original = [], TextEncoder.encode_text

    def spy(self, texts, *args, **kwargs):
        seen.append((self.kind, list(texts)))
        return original(self, texts, *args, **kwargs)

    monkeypatch.setattr(TextEncoder, "encode_text", spy)
    return seen


def samples_of(module, problems):
    """Return the samples of the validation, and the rows of the problems."""
    set_batch(module, problems)
    return torch.arange(len(problems)), module.samples(torch.arange(len(problems)), module.data.step())


# --- encoders that are not searched


@pytest.mark.parametrize(("family", "vocabulary"), [("flux", None), ("sd3", None), ("sd3", "t5")])
def test_textual_inversion_is_scored_by_the_loss_of_the_search(
    family, vocabulary, folders, image_folder, read, tmp_path
):
    """Encoders that are not searched read the pseudo-word as written: in the search, for scoring and for images."""
    module = TextualInversion(
        backbone=BackboneSettings(folders(family), image_size=16, vocabulary=vocabulary),
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        template="A photo of {}",
        **SMALL,
    )
    problems = fit(module, image_folder, tmp_path)
    other = "t5" if module.vocabulary.text_encoders[0].kind == "clip" else "clip"
    written = {text for kind, texts in read if kind == other for text in texts}
    assert written - {""} == {problem.prompt for problem in problems}
    again = module.validation_losses(problems)
    assert [problem.validation_loss for problem in problems] == pytest.approx(again.tolist(), abs=1e-6)
    rows, samples = samples_of(module, problems)
    module.prompt.embeddings.data = torch.tensor([problem.embedding for problem in problems])
    with torch.no_grad():
        ids, embeddings = module.prompt(rows)
        searched = module.loss(rows, ids, embeddings, samples, module.texts(rows))
        sampled = module.denoising_loss(rows, module.encode([str(problem.prompt) for problem in problems]), samples)
        spelled = module.loss(rows, ids, embeddings, samples)  # with the text of the ids instead of the pseudo-word
    torch.testing.assert_close(searched, sampled, atol=1e-6, rtol=0)
    assert not torch.allclose(spelled, sampled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_exported_embedding_gives_the_same_image_in_diffusers(family, folders, image_folder, tmp_path):
    folder = folders(family)
    module = TextualInversion(
        backbone=BackboneSettings(folder, image_size=16),
        optimizer=partial(torch.optim.AdamW, lr=0.5),
        **{**SMALL, "sampler": SamplerSettings(2, 3.0)},
    )
    (problem,) = fit(module, image_folder / "0.png", tmp_path, [Results()], steps=3)
    (file,) = (tmp_path / "embeddings").glob("*.safetensors")
    word, text, tensors = f"<{file.stem}>", f"a red {problem.prompt} on a blue background", load_file(file)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.__class__ = type("Loading", (type(pipeline), TextualInversionLoaderMixin), {})  # that of SD3 does not
    noise = torch.randn(1, *module.backbone.latent_shape)
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "height": 16, "width": 16}
    if family == "flux":
        read = [("t5xxl", pipeline.text_encoder_2, pipeline.tokenizer_2)]
    else:
        read = [
            ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
            ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
        ]
    for name, encoder, tokenizer in read:
        families.correct_end(encoder, pipeline.tokenizer)
        pipeline.load_textual_inversion(tensors[name], token=word, text_encoder=encoder, tokenizer=tokenizer)
    if family == "flux":
        how["latents"] = pipeline._pack_latents(noise, *noise.shape)
    else:
        converted = [pipeline.maybe_convert_prompt(text, tokenizer) for _, _, tokenizer in read]
        how |= {"latents": noise, "prompt_2": converted[1], "prompt_3": text}
        text = converted[0]
    theirs = pipeline(text, **how).images * 2 - 1
    ours = module.generate([f"a red {problem.prompt} on a blue background"], noise)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    plain = module.generate(["a red cat on a blue background"], noise)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, lr=0.5), partial(BatchedLBFGS, lr=0.5, max_iter=3)])
def test_encoders_that_are_not_searched_read_the_nearest_tokens(optimizer, folders, image_folder, read, tmp_path):
    """The CLIP of FLUX reads this text while T5's embeddings move; it stays the same within a step."""

    class Recording(PH2P):
        def step(self, batch, rows):
            nearest = self.prompt.texts(self.prompt.project()[rows])
            read.clear()
            super().step(batch, rows)
            reads.append(([texts for kind, texts in read if kind == "clip"], nearest))

    reads = []
    module = Recording(
        backbone=BackboneSettings(folders("flux"), image_size=16),
        optimizer=optimizer,
        template="A photo of {}",
        **SMALL,
    )
    fit(module, image_folder, tmp_path, steps=3)
    assert len(reads) == 3
    for texts, nearest in reads:
        assert texts
        assert all(set(some) <= set(nearest) for some in texts)


@pytest.mark.parametrize(("family", "method"), [("sd3", GCG), ("flux", GCG), ("sd3", PEZ), ("sdxl", PEZ)])
def test_search_and_scoring_encode_the_same_text(family, method, folders, image_folder, tmp_path):
    """CLIP's tokens lose a template's capitals, which T5 reads.

    The second CLIP of SDXL and SD3 reads "!" as padding.
    """
    module = method(backbone=BackboneSettings(folders(family), image_size=16), template="A Red {} Background!", **SMALL)
    problems = fit(module, image_folder, tmp_path)
    rows, samples = samples_of(module, problems)
    token_ids = torch.tensor([problem.token_ids for problem in problems])
    ids = module.prompt.ids(token_ids)
    with torch.no_grad():
        searched = module.loss(rows, ids, module.prompt.table[ids], samples)
        scored = module.denoising_loss(rows, module.encode([str(problem.prompt) for problem in problems]), samples)
    torch.testing.assert_close(searched, scored, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "vocabulary"), [("sdxl", None), ("sd3", None), ("sd3", "t5"), ("flux", None)])
def test_one_hot_choices_encode_as_their_text(family, vocabulary, folders):
    """DPO-Diff's gradient is computed at the encoded prompt of a candidate with the sampled words."""
    backbone = load_backbone(folders(family), vocabulary=vocabulary)
    space = Space(("A Red ", " Behind!"), (Slot("Cat", ("Cat", "Two Dogs")),), (Slot("Blurry", ("", "Blurry")),))
    choices = WordChoices(backbone.vocabulary)
    choices.set_spaces([space])
    choices.logits.data = choices.init_logits()
    for choice in ((0, 0), (1, 1)):
        noise = torch.zeros(choices.logits.shape).scatter_(2, torch.tensor(choice).view(1, 2, 1), 1e4)
        sides = zip(choices(torch.tensor([0]), noise), space.texts(choice), (False, True), strict=True)
        for choice_inputs, text, negative in sides:
            expected = backbone.encode_text([text], negative=negative)
            torch.testing.assert_close(
                backbone.encode(*choice_inputs, negative=negative), expected, atol=1e-5, rtol=1e-5
            )


# --- a CLIP with another vocabulary


def cosine(clip, feature, text):
    """Compute the cosine of an image and a text with the CLIP's own tokenizer, alone and without padding."""
    ids = torch.tensor([clip.tokenizer(text)["input_ids"]])
    hidden = clip.clip.text_model(ids).last_hidden_state[:, -1]
    return float(F.cosine_similarity(clip.clip.text_projection(hidden)[0], feature, dim=0))


@pytest.mark.parametrize(("family", "vocabulary"), [("flux", None), ("pixart", None), ("sd3", "t5")])
def test_best_words_of_a_clip_with_another_vocabulary(family, vocabulary, folders):
    folder = folders(family)
    backbone, clip = load_backbone(folder, vocabulary=vocabulary), ClipSimilarity(f"{folder}/clip")
    tokenizer = backbone.vocabulary.tokenizer
    prompt = TokenEmbeddings(backbone.vocabulary, "a photo of {} , blurry", 2)
    assert not reads_tokens(clip, prompt)
    features = clip.features(torch.rand(3, 3, 32, 32) * 2 - 1)
    words = [tokenizer.decode([i]).strip() for i in prompt.allowed.nonzero().flatten().tolist()]
    assert {"red", "two", "dogs"} <= set(words)
    alone = word_features(clip, prompt, as_text=True, chunk=5)
    for feature, token_ids in zip(features, best_words(clip, prompt, features, chunk=7).tolist(), strict=True):
        expected = [cosine(clip, feature, f"a photo of {word} , blurry") for word in words]
        assert (alone @ feature).tolist() == pytest.approx(expected, abs=1e-5)
        first = words[max(range(len(words)), key=expected.__getitem__)]
        others = [word for word in words if word != first]
        second = max(others, key=lambda word: cosine(clip, feature, f"a photo of {first} {word} , blurry"))
        assert tokenizer.decode(token_ids).split() == [first, second]


def test_clip_with_another_vocabulary_scores_candidates_without_a_gradient(folders, image_folder, caplog, tmp_path):
    """GCG's loss includes the CLIP loss, but its gradient is that of the denoising loss; this is logged once."""
    folder = folders("flux")
    plain = GCG(backbone=BackboneSettings(folder, image_size=16), candidates=4, **SMALL)
    module = GCG(
        backbone=BackboneSettings(folder, image_size=16),
        candidates=4,
        prefilter=2,
        loss_weights=LossWeights(clip=0.7),
        init="clip_words",
        **SMALL,
    )
    with caplog.at_level(logging.INFO, "lightning_prompts"):
        problems = fit(module, image_folder, tmp_path / "run")
    assert sum("only the denoising loss has a gradient that proposes them" in x for x in caplog.messages) == 1
    fit(plain, image_folder, tmp_path / "plain")
    rows, samples = samples_of(module, problems)
    ids = module.prompt.ids(module.prompt.allowed.nonzero()[:6, 0].view(3, 2))
    gradients, losses = [], []
    samples_of(plain, problems)
    for one in (plain, module):
        embeddings = one.prompt.table[ids].requires_grad_()
        losses.append(one.loss(rows, ids, embeddings, samples))
        gradients.append(torch.autograd.grad(losses[-1].sum(), embeddings)[0])
    assert torch.equal(*gradients)
    texts = module.prompt.texts(ids[:, module.prompt.positions])
    expected = [
        1 - cosine(module.clip, feature, text) for feature, text in zip(module.features(rows), texts, strict=True)
    ]
    torch.testing.assert_close(losses[1] - losses[0], 0.7 * torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [PEZ, PH2P, TextualInversion])
@pytest.mark.parametrize(("family", "vocabulary"), [("flux", None), ("pixart", None), ("sd3", "t5")])
def test_gradient_of_a_clip_with_another_vocabulary_is_refused(
    method, family, vocabulary, folders, image_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr("lightning_prompts.objectives.clip.load_clip", None)  # before it is loaded
    with pytest.raises(UserError) as error:
        method(
            backbone=BackboneSettings(folders(family), image_size=16, vocabulary=vocabulary),
            loss_weights=LossWeights(clip=0.1),
            **SMALL,
        )
    instead = (
        "" if family == "pixart" else ", or search the CLIP encoder's tokens with --model.backbone.vocabulary clip"
    )
    assert str(error.value) == (
        f"{method.__name__} needs the gradient of the CLIP loss, and the CLIP '{folders(family)}/clip' does not have "
        f"the token embeddings of the model's T5 text encoder; give --model.loss_weights.clip 0{instead}."
    )
    monkeypatch.undo()
    if instead:  # the advice works
        fit(
            method(
                backbone=BackboneSettings(folders(family), image_size=16, vocabulary="clip"),
                loss_weights=LossWeights(clip=0.1),
                **SMALL,
            ),
            image_folder / "0.png",
            tmp_path,
        )


def test_search_without_any_gradient_is_refused(folders):
    with pytest.raises(
        UserError, match=r"GCG needs the gradient .* give --model.loss_weights.denoising above 0, or search"
    ):
        GCG(
            backbone=BackboneSettings(folders("flux"), image_size=16),
            loss_weights=LossWeights(denoising=0, clip=1),
            **SMALL,
        )


# --- tables of another length than the tokenizer


@pytest.fixture
def longer(folders, tmp_path):
    """Create an SDXL whose two text encoders have 7 and 3 rows more than their tokenizers have tokens."""
    folder = shutil.copytree(folders("sdxl"), tmp_path / "longer")
    for part, kind, more in (("text_encoder", CLIPTextModel, 7), ("text_encoder_2", CLIPTextModelWithProjection, 3)):
        encoder = kind.from_pretrained(folder / part)
        encoder.resize_token_embeddings(encoder.config.vocab_size + more, mean_resizing=False)
        encoder.save_pretrained(folder / part)
    return str(folder)


@pytest.fixture
def shorter(folders, tmp_path):
    """Create a Stable Diffusion whose tokenizer has an added token, for which its text encoder has no row."""
    folder = shutil.copytree(folders("sd-turbo"), tmp_path / "shorter")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<sks>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder)


def test_rows_without_a_token_are_never_in_results(longer, folders, image_folder, tmp_path):
    vocabulary, expected = (load_backbone(folder).vocabulary for folder in (longer, folders("sdxl")))
    assert [encoder.rows for encoder in vocabulary.text_encoders] == [561, 557]
    assert vocabulary.table.shape == (557, 80)
    assert torch.equal(vocabulary.allowed(), F.pad(expected.allowed(), (0, 3)))
    for method in (PH2P, PEZ, GCG, RandomTokens, ClipWords, TextualInversion):
        module = method(backbone=BackboneSettings(longer, image_size=16), **SMALL)
        module.prompt.table[554:] = 0  # nearest to everything
        problems = fit(module, image_folder / "0.png", tmp_path / method.__name__)
        assert all(max(problem.token_ids or [0]) < 554 for problem in problems)
    backbone = load_backbone(folders("flux"))
    table, allowed = backbone.vocabulary.table, backbone.vocabulary.allowed()
    assert (len(table), len(backbone.vocabulary.tokenizer), len(allowed)) == (90, 62, 90)
    assert not allowed[59:].any()  # extra ids and padding


def test_tokens_that_two_encoders_read_differently_are_not_allowed(folders):
    """SDXL's second tokenizer pads with "!", and reads it as padding."""
    vocabulary = load_backbone(folders("sdxl")).vocabulary
    one, other = (encoder.tokenizer for encoder in vocabulary.text_encoders)
    (mark,) = one("!", add_special_tokens=False)["input_ids"]
    assert other("!", add_special_tokens=False)["input_ids"] != [mark]
    ids = vocabulary.allowed().nonzero()
    assert [mark] not in ids.tolist()
    assert all(round_trip(tokenizer, ids)[1].all() for tokenizer in (one, other))


def test_tokens_without_a_row_are_refused(shorter, image_folder, tmp_path):
    backbone = load_backbone(shorter)
    assert (len(backbone.vocabulary.tokenizer), backbone.vocabulary.rows) == (555, 554)
    sentence = (
        r"The text '.*<sks>.*' contains the token '<sks>', for which the text encoder's table of 554 rows has no "
        "embedding; "
    )
    how = {"backbone": backbone, "device": "cpu"}
    for search in (
        lambda: backbone.encode_text(["a red <sks> cat"]),
        lambda: GCG(backbone=backbone, template="a <sks> {}", num_tokens=2),
        lambda: GCG(backbone=backbone, init="a <sks>", num_tokens=2),
        lambda: metric_guidance("a red <sks> cat", Sharpness(), **how),
        lambda: dpo_diff("a red <sks> cat", negative=[], positive=["neighbors"], **how),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            search()
        assert ". " not in str(error.value)
        assert "\n" not in str(error.value)
    (problem,) = fit(GCG(backbone=backbone, num_tokens=2, sampler=SamplerSettings(1)), image_folder / "0.png", tmp_path)
    assert max(problem.token_ids) < 554
