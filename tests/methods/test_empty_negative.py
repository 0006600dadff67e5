"""The empty negative prompt of SDXL is zeros, both for gradients and for the evaluation of candidates."""

from functools import partial

import diffusers
import families
import pytest
import torch

from lightning_prompts import dpo_diff, metric_guidance, seed_invariance
from lightning_prompts.backbones import load_backbone
from lightning_prompts.engine.batch import Row
from lightning_prompts.methods import DPODiff, MetricGuidance, SeedInvariance, TextualInversion
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.objectives import Sharpness
from lightning_prompts.optimizers import AdamOnLion
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a small cat on a blue background"
SPACE = Space(
    ("a ", " on a blue background"),
    (Slot("small", ("small cat", "large dog")),),
    (Slot("light", ("", "dark", "blurry")), Slot("form", ("", "corner", "top left", "photo"))),
)
CHOICES = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 2), (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_with_clip("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, image_size=16)


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def method(backbone):
    method = DPODiff(backbone=backbone, sampler=SamplerSettings(3, 3.0), seeds=1, schedule="fix-1", gradient_share=1.0)
    method.prompt.set_spaces([SPACE])
    method.prompt.logits.data = method.prompt.init_logits()
    method.batch.rows = [Row(Problem("key", PROMPT))]
    method.trainer = type("Trainer", (), {"datamodule": type("Data", (), {"seed": 0})})
    return method


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_gradient_and_candidates_use_the_same_prompt_embeds(choice, method, pipeline, monkeypatch):
    """With one-hot weights, the relaxed prompts equal the candidate's, which equal those of diffusers' pipeline."""
    gumbel, relaxed, candidates = torch.zeros(method.prompt.logits.shape), [], []
    gumbel[0].scatter_(1, torch.tensor(choice).unsqueeze(1), 1e4)
    monkeypatch.setattr(method, "gumbel", lambda rows, step: gumbel)
    monkeypatch.setattr(
        method,
        "shortcut_loss",
        lambda rows, positive, negative, calls: (relaxed.extend([positive, negative]), torch.zeros(1))[1],
    )
    monkeypatch.setattr(
        method.sampler,
        "sample_and_score",
        lambda positive, negative, *rest: (candidates.extend([positive, negative]), (torch.zeros(1), {}))[1],
    )
    method.shortcut(torch.tensor([0]), 0)
    prompt, negative = SPACE.texts(choice)
    noise = torch.randn(1, 1, *method.backbone.latent_shape)
    method.evaluate([(prompt, negative)], noise, torch.zeros(1, 16))
    for one, other in zip(relaxed, candidates, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert bool(relaxed[1].any()) == bool(negative)
    expected = pipeline.encode_prompt(prompt, device="cpu", negative_prompt=negative or None)
    torch.testing.assert_close(candidates[0], method.backbone.join(expected[0], expected[2]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(candidates[1], method.backbone.join(expected[1], expected[3]), atol=1e-5, rtol=1e-5)
    theirs = pipeline(
        prompt,
        negative_prompt=negative or None,
        latents=noise[0],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close(method.generate([prompt], noise[0], negative) / 2 + 0.5, theirs, atol=2e-5, rtol=0)


def test_empty_and_other_negative_prompts_may_share_a_batch(method):
    """Only the rows of empty negative prompts are zeros."""
    method.prompt.set_spaces([SPACE, SPACE])
    method.prompt.logits.data = method.prompt.init_logits()
    gumbel = torch.zeros(method.prompt.logits.shape)
    gumbel[0, :, 0], gumbel[1, :, 1] = 1e4, 1e4
    _, negative = method.prompt(torch.tensor([0, 1]), gumbel)
    negative_embeds = method.backbone.encode(*negative, negative=True)
    assert not negative_embeds[0].any()
    torch.testing.assert_close(
        negative_embeds[1:], method.encode(["dark, corner"], negative=True), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        method.encode(["", "dark, corner"], negative=True), negative_embeds, atol=1e-5, rtol=1e-5
    )
    (gradient,) = torch.autograd.grad(negative_embeds.square().sum(), method.prompt.logits)
    assert gradient.isfinite().all()
    assert not gradient[0].any()


def test_textual_inversion_encodes_empty_negative_prompts_as_zeros(backbone, pipeline):
    """Its own `encode`, which reads pseudo-words, passes every other text to the model."""
    method = TextualInversion(backbone=backbone, num_tokens=2)
    expected = pipeline.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(method.encode([""])[0], backbone.join(expected[0], expected[2])[0], atol=1e-5, rtol=1e-5)
    assert method.encode([""]).any()
    assert not method.encode([""], negative=True).any()


def test_unconditional_searches_start_from_zeros(backbone, pipeline):
    problems = [Problem("key", PROMPT)]
    metric = MetricGuidance(
        backbone=backbone, objective=Sharpness(), sampler=SamplerSettings(3, 3.0), unconditional=True
    )
    initial = metric.initial(problems)
    expected = pipeline.encode_prompt(PROMPT, device="cpu")
    torch.testing.assert_close(initial[:, 0], backbone.join(expected[0], expected[2]), atol=1e-5, rtol=1e-5)
    assert not initial[:, 1].any()
    one_row = SeedInvariance(backbone=backbone, sampler=SamplerSettings(3, 3.0), unconditional=True, one_row=True)
    one_row.prompt.set_initial(initial)
    start = one_row.prompt.init_params(initial)
    assert start.shape == (1, 2, 1, initial.shape[-1])
    assert not start[:, 1].any()
    assert start[:, 0].any()
    one_row.prompt.rows.data = start
    assert not one_row.prompt(torch.tensor([0]))[:, 1].any()


def test_searches_from_zeros_stay_finite(backbone):
    how = {"backbone": backbone, "sampler": SamplerSettings(2, 3.0), "device": "cpu"}
    moved = metric_guidance(
        "a red cat",
        Sharpness(),
        unconditional=True,
        steps=3,
        seeds=1,
        grad_steps=2,
        optimizer=partial(AdamOnLion, lr=0.1),
        **how,
    )
    invariant = seed_invariance(
        "a red cat",
        unconditional=True,
        one_row=True,
        steps=3,
        seeds=1,
        seeds_per_step=1,
        optimizer=partial(AdamOnLion, lr=0.1),
        **how,
    )
    for result in (moved, invariant):
        assert result.negative_prompt_embeds.isfinite().all()
    assert moved.negative_prompt_embeds.any()
    result = dpo_diff(
        "a red cat",
        positive=[],
        negative=["library"],
        budget=6,
        population=2,
        seeds=1,
        schedule="fix-0",
        gradient_share=0.5,
        **how,
    )
    assert result.details.loss_after[0] <= result.details.loss_before[0]
