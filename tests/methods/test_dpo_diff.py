import itertools
import json
import math
import re
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.commands.main import main
from lightning_prompts.engine.batch import Row
from lightning_prompts.engine.checkpoint import PromptCheckpoint
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, DPODiff
from lightning_prompts.methods.dpo_diff.logits import WordChoices
from lightning_prompts.methods.dpo_diff.schedule import calls_before_gradient, linear_plan
from lightning_prompts.methods.dpo_diff.semantic_similarity import filter_by_similarity
from lightning_prompts.methods.dpo_diff.space import Slot, Space
from lightning_prompts.objectives.spherical import spherical_distance
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import SEARCH

pytestmark = pytest.mark.filterwarnings("ignore")

SPACE = Space(
    ("a ", " ", " on a blue background"),
    (Slot("small", ("small", "large", "dark")), Slot("cat", ("cat", "dog", "two dogs", "green circle"))),
    (Slot("light", ("", "dark", "blurry")), Slot("form", ("", "corner", "top left", "photo"))),
)


@pytest.fixture
def choices(tiny):
    module = WordChoices(load_backbone(tiny).vocabulary)
    module.set_spaces([SPACE])
    module.logits.data = module.init_logits()
    return module


def test_one_hot_logits_encode_the_text_of_the_choice(choices):
    for choice in itertools.product(*(range(len(slot.words)) for slot in SPACE.slots)):
        noise = torch.zeros(choices.logits.shape)
        noise[0].scatter_(1, torch.tensor(choice).unsqueeze(1), 1e4)
        with torch.no_grad():
            sides = choices(torch.tensor([0]), noise)
        for (ids, embeddings, texts), text in zip(sides, SPACE.texts(choice), strict=True):
            assert texts == [text]
            expected = encode_text(choices.vocabulary.tokenizer, [text], choices.vocabulary.length)
            assert torch.equal(ids, expected)
            assert torch.equal(embeddings, choices.table[expected])


def test_only_words_of_the_sampled_length_are_mixed(choices):
    noise = torch.zeros(choices.logits.shape)
    noise[0, 1, 2] = 3  # "two dogs"; "green circle" may have as many tokens, the others do not
    (ids, embeddings, _), _ = choices(torch.tensor([0]), noise)
    counts = [len(choices.tokens(word)) for word in SPACE.slots[1].words]
    same_length = [i for i, count in enumerate(counts) if count == counts[2]]
    weights = (choices.logits[0, 1] + noise[0, 1])[same_length].softmax(0)
    words = torch.stack([choices.table[choices.tokens(SPACE.slots[1].words[i])] for i in same_length])
    start = 1 + len(choices.tokens("a small "))
    expected = torch.einsum("w,wtd->td", weights, words)
    torch.testing.assert_close(embeddings[0, start : start + counts[2]], expected)
    assert ids[0, start : start + counts[2]].tolist() == choices.tokens("two dogs")


def test_words_are_sampled_from_the_softmax_of_the_logits(tiny):
    module = DPODiff(backbone=tiny, sampler=SamplerSettings(4), schedule="fix-1")
    module.prompt.set_spaces([SPACE])
    module.prompt.logits.data = module.prompt.init_logits()
    module.prompt.logits.data[0, 1, :4] = torch.tensor([0.0, 1.0, 2.0, 0.5])
    module.batch.rows = [Row(Problem("some", ""))]
    module.trainer = type("Trainer", (), {"datamodule": type("Data", (), {"seed": 0})})
    choices = torch.tensor([module.draw_choice(0, 1, attempt) for attempt in range(4000)])
    expected = torch.tensor([0.0, 1.0, 2.0, 0.5]).softmax(0)
    shares = torch.bincount(choices[:, 1], minlength=4) / len(choices)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_init_keep_prob_is_the_probability_of_the_original_word(choices, probability):
    choices.logits.data = choices.init_logits(probability)
    weights = choices.perturbed(torch.tensor([0]), torch.zeros_like(choices.logits)).softmax(2)
    torch.testing.assert_close(weights[0, :, 0].detach(), torch.full((len(SPACE.slots),), probability))


# With many words, a uniform choice keeps the original word more often than with these probabilities, so its logit
# starts below 0.
@pytest.mark.parametrize("probability", [0.02, 0.15, 0.6])
def test_step_without_a_gradient_keeps_the_initial_probability(probability, attached):
    module = attached(init_keep_prob=probability)
    module.optimizers = module.configure_optimizers
    before = module.prompt.logits.detach().clone()
    module.descend(0 * module.prompt.logits.sum(), torch.tensor([0]))
    torch.testing.assert_close(module.prompt.logits.detach(), before)
    weights = module.prompt.perturbed(torch.tensor([0]), torch.zeros_like(before)).softmax(2)
    torch.testing.assert_close(weights[0, :, 0].detach(), torch.full((len(SPACE.slots),), probability))


def test_logits_stay_in_the_range_of_the_released_code(attached):
    module = attached(init_keep_prob=0.02, lr=50.0)
    module.optimizers = module.configure_optimizers
    initial = module.prompt.init_logits(0.02)
    for sign in (1, -1):
        module.descend(sign * module.prompt.logits.sum(), torch.tensor([0]))
        bound = initial.clamp(max=0) if sign == 1 else torch.full_like(initial, 3)
        torch.testing.assert_close(module.prompt.logits.detach(), bound)


def test_step_is_rmsprop_with_momentum_on_a_clipped_gradient(attached):
    """As in the released code: alpha 0.99, momentum 0.5 and gradients in [-0.025, 0.025], written out."""
    module = attached(init_keep_prob=None, lr=0.01)
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.prompt.logits.data.fill_(1.5)  # far from both ends of the range that logits stay in
    slopes = torch.linspace(-0.1, 0.1, module.prompt.logits.numel()).view_as(module.prompt.logits)
    expected, square, buffer = module.prompt.logits.detach().clone(), 0, 0
    for scale in (1.0, 0.1, -2.0):
        module.descend((scale * slopes * module.prompt.logits).sum().view(1), torch.tensor([0]))
        gradient = (scale * slopes).clamp(-0.025, 0.025)
        square = 0.99 * square + 0.01 * gradient.square()
        buffer = 0.5 * buffer + gradient / (square.sqrt() + 1e-8)
        expected -= 0.01 * buffer
    torch.testing.assert_close(module.prompt.logits.detach(), expected)


# --- the shortcut text gradient


def slow_shortcut(backbone, sides, noise, guidance, before, start=None, grad_steps=1, steps=5):
    """Run a slow DDIM (eta 0).

    Return the latents before call `before`, or from those, the image after `grad_steps` more calls.
    """
    scheduler = DDIMScheduler.from_config(backbone.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = noise if start is None else start
    alphas = scheduler.alphas_cumprod.double()
    calls = range(before) if start is None else range(before, before + grad_steps)
    for i in calls:
        t = scheduler.timesteps[i]
        positive, negative = (backbone.denoise(latents, t.expand(len(latents)), side) for side in sides)
        output = negative + guidance * (positive - negative) if guidance > 1 else positive
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        if backbone.prediction_type == "epsilon":
            x0, epsilon = (latents - s * output) / a, output
        else:
            x0, epsilon = a * latents - s * output, a * output + s * latents
        last = int(t) - scheduler.config.num_train_timesteps // steps
        b = alphas[last] if last >= 0 else scheduler.final_alpha_cumprod.double()
        latents = b.sqrt() * x0 + (1 - b).sqrt() * epsilon
    return latents if start is None else backbone.decode(x0)


@pytest.mark.parametrize(
    ("before", "grad_steps", "guidance"), [(2, 1, 3.0), (0, 1, 3.0), (1, 3, 3.0), (0, 5, 3.0), (2, 1, 1.0)]
)
def test_shortcut_gradient_equals_finite_differences(before, grad_steps, guidance, sd):
    backbone = load_backbone(str(sd)).double()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, clip_sample=False)
    choices = WordChoices(backbone.vocabulary)
    choices.set_spaces([SPACE])
    choices.logits.data = choices.init_logits()
    choices.logits.data = choices.logits.data.double()
    noise = torch.randn(2, *backbone.latent_shape, dtype=torch.float64)
    weights = torch.randn(3, backbone.image_size, backbone.image_size, dtype=torch.float64)
    gumbel = torch.randn(choices.logits.shape, dtype=torch.float64)

    def sides_at(logits):
        choices.logits.data = logits.detach()
        return [backbone.encode(*side).repeat_interleave(2, 0) for side in choices(torch.tensor([0]), gumbel)]

    at, direction = choices.logits.data.clone(), torch.randn_like(choices.logits)
    positive, negative = sides_at(at)
    latents = backbone.sample(positive, negative, noise, 5, guidance, grad_steps, before + grad_steps)
    value = (backbone.decode(latents) * weights).sum()
    (gradient,) = torch.autograd.grad(value, choices.logits)
    with torch.no_grad():
        start = slow_shortcut(backbone, sides_at(at), noise, guidance, before)

        def loss(logits):
            return float(
                (slow_shortcut(backbone, sides_at(logits), noise, guidance, before, start, grad_steps) * weights).sum()
            )

        assert float(value.detach()) == pytest.approx(loss(at), rel=1e-5)
        slope = (loss(at + 1e-5 * direction) - loss(at - 1e-5 * direction)) / 2e-5
    assert abs(slope) > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_gradient_through_all_steps_equals_plain_autograd(sd):
    backbone = load_backbone(str(sd)).double()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, clip_sample=False)
    noise = torch.randn(2, *backbone.latent_shape, dtype=torch.float64)
    ids = encode_text(backbone.text_encoders[0].tokenizer, ["a small cat", "dark"], backbone.text_encoders[0].length)
    leaves = [embeds.detach().requires_grad_() for embeds in backbone.encode(ids).split(1)]
    positive, negative = (leaf.expand(2, -1, -1) for leaf in leaves)
    shortcut = torch.autograd.grad(
        backbone.decode(backbone.sample(positive, negative, noise, 5, 3.0, 5, 5)).sum(), leaves
    )
    plain = torch.autograd.grad(slow_shortcut(backbone, (positive, negative), noise, 3.0, 0, noise, 5).sum(), leaves)
    for one, other in zip(shortcut, plain, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_spherical_distance_is_half_the_squared_angle():
    angles = torch.linspace(0.01, 3.1, 50, dtype=torch.float64)
    x, y = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(spherical_distance(x, y.expand_as(x)), angles.square() / 2)


# --- whole searches


def search(tiny, folder, prompts, **settings):
    given = {
        "sampler": SamplerSettings(3),
        "seeds": 2,
        "budget": 8,
        "population": 4,
        "log_images_every_n_steps": 0,
        **settings,
    }
    solver = given.get("solver", "hybrid")
    gradient_settings = {"schedule": "fix-1", "gradient_share": 0.4} if solver in ("gradient", "hybrid") else {}
    evolution_settings = {"elites": 2} if solver in ("evolution", "hybrid") else {}
    module = DPODiff(backbone=tiny, **gradient_settings | evolution_settings | given)
    data = Prompts(prompts)
    pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=folder).fit(module, datamodule=data)
    return list(data.folder.load().values())


PROMPTS = ["a small cat on a blue background", "two dogs beside a large tree"]


@pytest.mark.parametrize("solver", ["gradient", "evolution", "hybrid", "random"])
@pytest.mark.parametrize("task", ["improve", "attack"])
def test_budget_is_respected_and_no_text_is_evaluated_twice(solver, task, tiny, tmp_path):
    own = {} if task == "improve" else {"threshold": -1}
    problems = search(tiny, tmp_path, PROMPTS, solver=solver, task=task, **own)
    assert len(problems) == 2
    for problem in problems:
        assert 0 < problem.result.budget <= 8
        texts = [(candidate["prompt"], candidate["negative_prompt"]) for candidate in problem.result.candidates]
        assert len(set(texts)) == len(texts) > 2
        assert texts[0] == (problem.target, "")
        means = [sum(candidate["losses"]) / 2 for candidate in problem.result.candidates]
        assert problem.validation_loss == min(means)
        assert problem.initial_validation_loss == means[0]
        best = problem.result.candidates[means.index(min(means))]
        assert (problem.prompt, problem.negative_prompt) == (best["prompt"], best["negative_prompt"])
        if task == "improve":
            assert problem.prompt == problem.target


def test_search_that_only_samples_the_prompt_has_one_candidate(tiny, tmp_path):
    (problem,) = search(tiny, tmp_path, PROMPTS[:1], solver="hybrid", init_keep_prob=1 - 1e-9, gradient_share=0.9)
    assert len(problem.result.candidates) == 1  # only the user's prompt is ever sampled


def test_batch_equals_its_parts(tiny, tmp_path):
    batch = search(tiny, tmp_path / "both", PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = search(tiny, tmp_path / str(i), [prompt])
        assert [c["prompt"] for c in alone.result.candidates] == [c["prompt"] for c in batch[i].result.candidates]
        for one, other in zip(alone.result.candidates, batch[i].result.candidates, strict=True):
            assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)


@pytest.mark.parametrize("solver", ["gradient", "hybrid", "random"])
@pytest.mark.parametrize("task", ["improve", "attack"])
def test_threshold_limits_candidates_to_similar_prompts(task, solver, tiny, tmp_path):
    sources = {"positive": ["neighbors"], "negative": []}
    module = DPODiff(backbone=tiny, task=task, **sources, sampler=SamplerSettings(3), schedule="fix-1", threshold=-1)
    space = module.space(PROMPTS[0])
    singles = [[i if other == number else 0 for other in range(len(space.slots))]
               for number, slot in enumerate(space.slots) for i in range(1, len(slot.words))]  # fmt: skip
    cosines = module.similarity(PROMPTS[0], [space.texts(choice)[0] for choice in singles])
    threshold = float(cosines.median())
    kept = filter_by_similarity(space, module.similarity, threshold)
    assert sum(len(slot.words) - 1 for slot in kept.slots) == int((cosines >= threshold).sum())
    (problem,) = search(tiny, tmp_path, PROMPTS[0], task=task, **sources, solver=solver, threshold=threshold)
    assert len(problem.result.candidates) > 2
    for candidate in problem.result.candidates:
        assert float(module.similarity(problem.target, [candidate["prompt"]])) >= threshold - 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 2, "positive": ["neighbors"]}, "--model.threshold must be between"),
        ({"budget": 3}, "at least --model.population, got 3 and 4"),
        ({"init_keep_prob": 1.0}, "--model.init_keep_prob must be above 0"),
        ({"mutation": 1.5}, "--model.mutation must be between"),
        ({"gradient_share": -0.1}, "--model.gradient_share must be between"),
        ({"temperature": (1.0, 0.0)}, "--model.temperature"),
        ({"schedule": "late"}, "step-15-2"),
        ({"schedule": "fix-9"}, "beyond the sampler's"),
    ],
)
def test_invalid_settings_are_refused(settings, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        search(tiny, tmp_path, PROMPTS, **settings)


def method_with_space(space, **settings):
    """Return a method with a given space."""

    class MethodWithSpace(DPODiff):
        def space(self, prompt):
            return space

    gradient_settings = {"schedule": "fix-1"} if settings.get("solver", "hybrid") in ("gradient", "hybrid") else {}
    word_settings = {"positive": ["neighbors"], "threshold": -1}  # replaced by the given space
    given = {"sampler": SamplerSettings(3), "seeds": 2, "budget": 8, "population": 4, "log_images_every_n_steps": 0}
    return MethodWithSpace(**gradient_settings | word_settings | given | settings)


@pytest.fixture
def attached(tiny, tmp_path):
    """Return a method with a batch of one problem, as in the middle of a search."""

    def make(**settings):
        module, data = method_with_space(SPACE, backbone=tiny, **settings), Prompts("a small cat on a blue background")
        trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=tmp_path)
        module.trainer = trainer
        trainer.datamodule, data.trainer = data, trainer
        trainer.strategy.connect(module)
        data.setup("fit")
        module.refill()
        module.score(torch.tensor([0]))
        return module

    return make


def test_hybrid_starts_evolution_from_the_learned_distribution(attached):
    choice = (1, 2, 2, 1)
    for solver, share in (("hybrid", 1.0), ("gradient", 1.0), ("evolution", 0.1)):
        module = attached(solver=solver)
        module.prompt.logits.data.zero_()
        module.prompt.logits.data = module.prompt.init_logits()
        if solver != "evolution":
            module.prompt.logits.data[0].scatter_(1, torch.tensor(choice).unsqueeze(1), 20.0)
        first = module.propose(0, 5, 5)
        assert (first[0] == choice) == (share == 1.0)
        assert len(first) == (1 if share == 1.0 else 4)  # the distribution has only one word left per slot


def test_children_combine_the_best_candidates(attached):
    module = attached(solver="evolution", elites=2, mutation=0.0)
    problem = module.batch.records[0]
    for choice, loss in (((1, 1, 1, 1), 0.1), ((2, 2, 2, 2), 0.2), ((0, 3, 0, 3), 0.9)):
        module.record_candidate(0, choice, SPACE.texts(choice), [loss, loss])
    problem.result.candidates = [
        candidate for candidate in problem.result.candidates if candidate["losses"][0] in (0.1, 0.2, 0.9)
    ]
    children = module.propose(0, 6, 5)
    assert children
    assert all(value in (1, 2) for child in children for value in child)


def test_evaluated_losses_are_those_of_generated_images(attached):
    module = attached()
    texts, noise = [("a small cat", "dark"), ("two dogs", "")], torch.randn(2, 2, *module.backbone.latent_shape)
    with torch.no_grad():
        losses = module.evaluate(texts, noise, module.text_features[[0, 0]])
        for b, (prompt, negative) in enumerate(texts):
            images = module.generate([prompt] * 2, noise[b], negative)
            angles = (module.clip.features(images) @ module.text_features[0]).acos()
            torch.testing.assert_close(losses[b], angles.square() / 2, atol=1e-4, rtol=1e-4)


def test_gradient_passes_through_the_text_encoder(attached):
    """The released code forward rows of the table, without the encoder, which is the gradient of another function."""
    module = attached()
    noise = torch.zeros_like(module.prompt.logits)
    noise[:, :, 1] = 2  # the initial negative prompt is empty
    sides = module.prompt(torch.tensor([0]), noise)
    for side in sides:
        encoded = module.backbone.encode(*side)
        (gradient,) = torch.autograd.grad(encoded[0, -1, 0], module.prompt.logits, retain_graph=True)
        assert gradient.abs().max() > 0  # the last position has no word, but depends on the words


def test_shortcut_loss_is_the_mean_over_seeds_with_its_gradient(attached):
    module = attached(microbatch=1)
    rows, noise = torch.tensor([0]), torch.randn_like(module.prompt.logits)
    positive, negative = (module.backbone.encode(*side) for side in module.prompt(rows, noise))
    value = module.shortcut_loss(rows, positive, negative, 2)
    (gradient,) = torch.autograd.grad(value.sum(), module.prompt.logits)
    positive, negative = (module.backbone.encode(*side).repeat_interleave(2, 0) for side in module.prompt(rows, noise))
    latents = module.backbone.sample(positive, negative, module.noise[0], 3, module.sampler.guidance_scale, 1, 2)
    plain = module.loss(module.backbone.decode(latents), module.text_features[[0, 0]]).mean()
    (expected,) = torch.autograd.grad(plain, module.prompt.logits)
    torch.testing.assert_close(value[0], plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_improving_with_positive_words_changes_the_prompt(tiny, tmp_path):
    (problem,) = search(tiny, tmp_path, PROMPTS[0], solver="random", positive=["neighbors"], negative=[])
    assert any(candidate["prompt"] != problem.target for candidate in problem.result.candidates)
    assert all(candidate["negative_prompt"] == "" for candidate in problem.result.candidates)


def test_cosine_objective_is_that_of_the_spherical_distance(tiny, tmp_path):
    (problem,) = search(tiny, tmp_path, PROMPTS[0], solver="random", objective="cosine")
    (other,) = search(tiny, tmp_path / "other", PROMPTS[0], solver="random")
    for cosine, spherical in zip(problem.result.loss_before, other.result.loss_before, strict=True):
        assert spherical == pytest.approx(math.acos(1 - cosine) ** 2 / 2, abs=1e-4)


def test_attack_without_words_that_keep_the_meaning_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="keeps the meaning"):
        search(tiny, tmp_path, PROMPTS[0], task="attack", threshold=1.0)


def test_temperature_decays_geometrically_from_first_to_last(attached, monkeypatch):
    module, temperatures = attached(temperature=(4.0, 0.5), gradient_share=0.5), []
    monkeypatch.setattr(module, "descend", lambda loss, rows: None)
    monkeypatch.setattr(module, "log_step", lambda batch, rows, loss: None)
    forward = module.prompt.forward
    monkeypatch.setattr(
        module.prompt,
        "forward",
        lambda rows, noise, temperature: temperatures.append(temperature) or forward(rows, noise, temperature),
    )
    steps = len(module.plan(0))
    for step in range(steps):
        module.step(Step([step], torch.empty(1, 0)), torch.tensor([0]))
    assert temperatures[0] == pytest.approx(4)
    assert temperatures[-1] == pytest.approx(0.5)
    ratios = [b / a for a, b in itertools.pairwise(temperatures)]
    assert ratios == pytest.approx([ratios[0]] * (steps - 1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("step-15-2", [15, 15, 16, 16, 17]), ("fix-3", [3] * 5), ("step-0-1", [0, 1, 2, 3, 4])],
)
def test_schedules_give_the_calls_before_the_gradient(schedule, expected):
    draw = torch.Generator().manual_seed(0)
    assert [calls_before_gradient(schedule, step, draw) for step in range(5)] == expected


def test_linear_plan_equals_the_papers_schedule_at_fifty_calls():
    """There are 15 to 24 calls before the one with a gradient, one more at every second of 20 steps."""
    share = sum(15 + i // 2 + 2 for i in range(20)) / 50
    draw = torch.Generator()
    assert linear_plan(50, 1, share) == [calls_before_gradient("step-15-2", i, draw) for i in range(20)]
    assert linear_plan(50, 1, share - 0.01) != linear_plan(50, 1, share)
    assert linear_plan(10, 1, 4.4) == [3, 3, 3, 3, 4, 4, 4, 4]
    assert linear_plan(10, 1, 0.49) == []
    for calls, grad_steps, share in itertools.product((5, 7, 25, 28, 50), (1, 3), (0.8, 4.0, 13.0)):
        plan = linear_plan(calls, grad_steps, share)
        assert plan == [math.floor(calls * Fraction(3 * len(plan) + 2 * i, 10 * len(plan))) for i in range(len(plan))]
        assert sum(number + 2 * grad_steps for number in plan) <= share * calls + 1e-4
    with pytest.raises(
        UserError, match="8 calls with a gradient after 4 others go beyond the sampler's 10 calls; lower"
    ):
        linear_plan(10, 8, 10)


def test_plan_of_the_config_equals_a_schedule_on_the_embedded_model():
    """With 10 steps it equals the schedule step-3-4."""
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/dpo_diff.yaml").read_text())["model"]["init_args"]
    module = DPODiff(**config)
    assert (module.sampler.num_inference_steps, module.grad_steps, module.plan(0)) == (10, 1, [3, 3, 3, 3, 4, 4, 4])
    assert DPODiff(**config, schedule="step-3-4").plan(0) == module.plan(0)


def test_gradient_may_be_taken_at_the_last_call(tiny):
    calls = DPODiff(backbone=tiny, sampler=SamplerSettings(4)).sampler.calls
    last = DPODiff(backbone=tiny, sampler=SamplerSettings(4), schedule=f"fix-{calls - 1}", gradient_share=0.5)
    assert set(last.plan(0)) == {calls - 1}
    with pytest.raises(UserError, match=f"beyond the sampler's {calls} calls"):
        DPODiff(backbone=tiny, sampler=SamplerSettings(4), schedule=f"fix-{calls}")


def test_random_plan_depends_only_on_the_seed(tiny):
    one, other = (
        DPODiff(backbone=tiny, sampler=SamplerSettings(9), schedule="rand-0-8", gradient_share=1.0) for _ in range(2)
    )
    plans = [one.plan(seed) for seed in range(4)]
    assert plans == [other.plan(seed) for seed in reversed(range(4))][::-1]
    assert len({tuple(plan) for plan in plans}) == 4
    assert all(len(set(plan)) > 1 for plan in plans)  # the steps of a plan differ, too


@pytest.mark.parametrize("objective", ["spherical", "cosine"])
def test_attack_negates_the_loss_of_improving(objective, tiny):
    improve = DPODiff(backbone=tiny, sampler=SamplerSettings(2), objective=objective)
    attack = DPODiff(backbone=tiny, sampler=SamplerSettings(2), objective=objective, task="attack")
    images, features = torch.rand(2, 3, 16, 16), torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    losses = improve.loss(images, features)
    assert (losses > 0).all()
    assert torch.equal(attack.loss(images, features), -losses)


def test_random_schedule_is_uniform():
    draw = torch.Generator().manual_seed(0)
    sampled = [calls_before_gradient("rand-4-8", 0, draw) for _ in range(400)]
    assert set(sampled) == {4, 5, 6, 7}
    assert all(sampled.count(number) > 60 for number in set(sampled))


@pytest.mark.parametrize(
    "schedule", ["step-3", "step-3-0", "rand-4-4", "rand-4", "fix", "fix-1-2", "late", "step--1-2"]
)
def test_malformed_schedules_are_refused(schedule):
    with pytest.raises(UserError, match="step-15-2"):
        calls_before_gradient(schedule, 0, torch.Generator())


# --- runs


def run(tiny, folder, *extra):
    command = (
        f"fit --run {folder} --trainer.accelerator cpu --model DPODiff --model.backbone {tiny} "
        "--model.sampler.num_inference_steps 3 --model.schedule fix-1 --model.seeds 2 --model.budget 8 "
        "--model.population 3 --model.elites 2 --model.log_images_every_n_steps 0 --data Prompts --data.prompts"
    )
    return [*command.split(), *(extra or [json.dumps(PROMPTS)])]


def problems(folder):
    result = json.loads((folder / "result.json").read_text())["problems"]
    return [{name: value for name, value in problem.items() if name != "seconds"} for problem in result]


@pytest.mark.parametrize(
    "records",
    [pytest.param(1, marks=pytest.mark.exact), *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))],
)
def test_search_killed_while_writing_records_resumes_identically(records, tiny, tmp_path, monkeypatch, rounding):
    """Some candidates are on disk and others are not, and the only checkpoint is that of the first step."""
    how = ("--model.task", "attack", "--model.neighbors", "5", "--model.threshold", "-1")
    main([*run(tiny, tmp_path / "whole"), *how])
    before, written = signal.getsignal(signal.SIGINT), itertools.count(1)

    def interrupted(self, problem, *, save=RunFolder.save_or_warn):
        save(self, problem)
        if next(written) == records:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_or_warn", interrupted)
        with pytest.raises(SystemExit):
            main([*run(tiny, tmp_path / "broken"), *how])
    signal.signal(signal.SIGINT, before)
    main([*run(tiny, tmp_path / "broken"), *how, "--ckpt_path", "last"])
    assert problems(tmp_path / "broken") == problems(tmp_path / "whole")


@pytest.mark.parametrize("checkpoints", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_search_killed_at_every_step_resumes_identically_without_repeated_work(
    checkpoints, tiny, tmp_path, monkeypatch, rounding
):
    evaluated = []
    if checkpoints:  # a checkpoint every step instead of every twenty seconds
        monkeypatch.setattr(PromptCheckpoint, "on_train_batch_end", lambda self, trainer, *_: self._save(trainer))
    else:
        monkeypatch.setattr(PromptCheckpoint, "_save", lambda self, trainer: None)
    losses = DPODiff.evaluate

    def counted(self, texts, noise, features):
        evaluated.extend((texts, noise[i, 0, 0, 0, 0].item()) for i, texts in enumerate(texts))
        return losses(self, texts, noise, features)

    monkeypatch.setattr(DPODiff, "evaluate", counted)
    main(run(tiny, tmp_path / "whole"))
    whole, evaluated[:] = list(evaluated), []

    for stop in (1, 2, 0) if checkpoints else (1, 2, 3):
        before, steps = signal.getsignal(signal.SIGINT), itertools.count()

        def interrupted(self, batch, rows, *, search=DPODiff.step, steps=steps, stop=stop):
            search(self, batch, rows)
            if next(steps) == stop:  # after the evaluations, before the checkpoint
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(DPODiff, "step", interrupted)
            with pytest.raises(SystemExit):
                main([*run(tiny, tmp_path / "broken"), "--ckpt_path", "last"])
        signal.signal(signal.SIGINT, before)
    main([*run(tiny, tmp_path / "broken"), "--ckpt_path", "last"])
    for interrupted_run, unbroken in zip(problems(tmp_path / "broken"), problems(tmp_path / "whole"), strict=True):
        assert interrupted_run == unbroken
    assert sorted(evaluated) == sorted(whole)


def test_finished_run_resumes_without_work_and_takes_more_prompts(tiny, tmp_path):
    main(run(tiny, tmp_path / "run", PROMPTS[0]))
    (before,) = problems(tmp_path / "run")
    for _ in range(2):
        main([*run(tiny, tmp_path / "run", PROMPTS[0]), "--ckpt_path", "last"])
        assert problems(tmp_path / "run") == [before]
    main([*run(tiny, tmp_path / "run"), "--ckpt_path", "last"])
    first, second = problems(tmp_path / "run")
    assert first["candidates"] == before["candidates"]
    assert second["prompt"] == PROMPTS[1]


def test_result_lists_candidates_losses_and_words(tiny, tmp_path, capsys):
    main(run(tiny, tmp_path / "run"))
    output = capsys.readouterr().out
    for problem, prompt in zip(problems(tmp_path / "run"), PROMPTS, strict=True):
        assert problem["original_prompt"] == problem["prompt"] == prompt
        losses = [sum(candidate["losses"]) for candidate in problem["candidates"]]
        assert losses == sorted(losses)
        assert len(losses) == 5
        assert sum(problem["loss_after"]) == pytest.approx(losses[0])
        assert sum(problem["loss_before"]) >= losses[0]
        assert len(problem["loss_before"]) == len(problem["loss_after"]) == 2
        assert len(problem["fresh_loss_before"]) == len(problem["fresh_loss_after"]) == 10
        assert problem["similarity"] == pytest.approx(1, abs=1e-4)
        chosen = [word for _, word in problem["words"] if word]
        assert ", ".join(chosen) == problem["negative_prompt"]
        assert 7 <= problem["budget"] <= 8
        before, after = (sum(problem[f"fresh_loss_{when}"]) / 10 for when in ("before", "after"))
        assert f"[on fresh seeds loss {after:.3f}, was {before:.3f}]" in output
    for name in ("prompt", "negative_prompt"):
        lines = (tmp_path / "run" / f"{name}.txt").read_text().splitlines()
        assert lines == [problem[name] for problem in problems(tmp_path / "run")]
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.width > grid.height  # two prompts with two seeds each, side by side


def test_autocast_is_enabled_for_all_candidates(tiny, tmp_path, monkeypatch):
    losses, precisions = DPODiff.evaluate, []

    def recorded(self, texts, noise, features):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return losses(self, texts, noise, features)

    monkeypatch.setattr(DPODiff, "evaluate", recorded)
    main([*run(tiny, tmp_path / "run"), "--trainer.precision", "bf16-mixed"])
    assert len(precisions) > 2
    assert all(precisions)


def test_later_commands_leave_the_records_unchanged(tiny, tmp_path, capsys):
    main(run(tiny, tmp_path / "run"))
    before = problems(tmp_path / "run")
    for command in ("validate", "test", "predict"):
        main([command, "--run", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert f"{before[0]['validation_loss']:.5f}" in output
    assert "LPIPS" not in output  # LPIPS needs target images
    assert problems(tmp_path / "run") == before
    assert len(list((tmp_path / "run" / "images").glob("*.png"))) == 2


def test_validation_without_negative_words_uses_the_empty_text(attached):
    module = attached()
    (problem,) = module.batch.records
    problem.prompt = problem.target
    noise = module.draw_noise([problem], SEARCH, module.seeds)
    features = module.clip.features_of([problem.target])
    for words in (None, "", "blurry"):
        problem.negative_prompt = words
        expected = module.evaluate([(problem.target, words or "")], noise, features).mean(1)
        torch.testing.assert_close(module.validation_losses([problem]), expected)


def test_images_before_and_after_show_the_users_and_the_best_prompt(attached):
    module = attached()
    (problem,) = module.batch.records
    noise = module.draw_noise([problem], SEARCH, 2)
    for prompt, negative in (("a large dog", "blurry"), ("a large dog", None), (problem.target, "dark")):
        problem.prompt, problem.negative_prompt = prompt, negative
        before, after = module.images_before_and_after([problem], noise)
        torch.testing.assert_close(before[0], module.generate([problem.target] * 2, noise[0]))
        torch.testing.assert_close(after[0], module.generate([prompt] * 2, noise[0], negative or ""))
        assert not torch.equal(before, after)


def test_resuming_with_other_sampling_steps_is_refused(tiny, tmp_path, capsys):
    main(run(tiny, tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        main([*run(tiny, tmp_path / "run"), "--ckpt_path", "last", "--model.sampler.num_inference_steps", "4"])
    assert stop.value.code == 2
    assert "--model.sampler.num_inference_steps 3 and cannot resume with 4" in capsys.readouterr().err


def test_data_of_another_kind_is_refused(tiny, tmp_path, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    for model, data, message in (
        ("DPODiff", "ImagesToPrompts", "--data Prompts"),
        ("PEZ", "Prompts", "--data ImagesToPrompts"),
    ):
        given = ["--data.prompts", "a dog"] if data == "Prompts" else ["--data.images", str(tmp_path / "a.png")]
        command = f"fit --run {tmp_path / 'run'} --model {model} --model.backbone {tiny} --data {data}"
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), *given])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_show_space_prints_the_words_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = run(tiny, tmp_path / "run", "a small dog")
    main(["show-space", *arguments[1:], "--model.positive", "[neighbors]"])
    output = capsys.readouterr().out
    assert re.search(r"\| positive \| (small|dog) \| \1, ", output)
    assert "| negative | " in output
    assert "a small dog: " in output
    assert not list(tmp_path.iterdir())
