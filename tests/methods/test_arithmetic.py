"""Losses and steps equal formulas that are written out here, or PyTorch's optimizers."""

import families
import pytest
import torch
from searches import fit, set_batch

from lightning_prompts.backbones import BackboneSettings
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods import GCG, PEZ, PH2P, MetricGuidance, TextualInversion
from lightning_prompts.objectives import Sharpness
from lightning_prompts.objectives.base import Objective
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.runs.record import Problem, SteeringResult
from lightning_prompts.sampling import SamplerSettings, seeding

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = {"sampler": SamplerSettings(2), "log_images_every_n_steps": 0}


def test_random_draws_of_different_purposes_have_different_steps():
    names = ("VALIDATION", "INIT", "REGENERATION", "WORD_MAPS", "RERANK", "SEARCH", "FINAL", "CHECK")
    steps = [getattr(seeding, name) for name in names]
    assert set(names) == {
        name for name, value in vars(seeding).items() if isinstance(value, int) and name != "FINAL_SEEDS"
    }
    assert len(set(steps)) == len(steps)
    assert max(steps) < 0  # those of a search start at 0
    assert min(steps) == seeding.CHECK  # whose draws continue downwards


@pytest.mark.parametrize("offset", [0.5, 1e-6, -0.5])
def test_gcg_accepts_the_best_candidate_only_if_it_is_better(offset, tiny, image_folder, tmp_path):
    class FixedLosses(GCG):
        def _losses(self, rows, candidates, sound, samples):
            self.before = self.prompt.project()[rows]
            ids = self.prompt.ids(self.before)
            loss = self.loss(rows, ids, self.prompt.table[ids], samples)
            return loss[:, None] + offset + torch.arange(candidates.shape[1])

    module = FixedLosses(backbone=tiny, num_tokens=3, candidates=4, topk=8, **FEW)
    fit(module, image_folder, tmp_path, steps=1)
    moved = (module.prompt.project() != module.before).any(1)
    assert moved.all() if offset < 0 else not moved.any()


@pytest.mark.parametrize(("denoising_weight", "clip_weight"), [(1.0, 0.3), (0.5, 2.0), (0.0, 3.0), (2.0, 0.0)])
def test_loss_is_the_weighted_sum_of_its_terms(denoising_weight, clip_weight, tiny, image_folder, tmp_path):
    module = PEZ(backbone=tiny, num_tokens=3, denoising_weight=denoising_weight, clip_weight=clip_weight, **FEW)
    fit(module, image_folder / "0.png", tmp_path, steps=1)
    set_batch(module, module.data.folder.load().values())
    rows = torch.tensor([0])
    samples = module.samples(rows, module.data.step())
    token_ids = module.prompt.allowed.nonzero()[3:6].view(1, 3)
    ids = module.prompt.ids(token_ids)
    embeddings = module.prompt.table[ids]
    with torch.no_grad():
        result = module.loss(rows, ids, embeddings, samples)
        prompt_embeds = module.backbone.encode(ids, embeddings)
        noisy = module.backbone.add_noise(samples.latents[0], samples.noise[0], samples.timesteps[0])
        output = module.backbone.denoise(noisy, samples.timesteps[0], prompt_embeds.expand(len(noisy), -1, -1))
        denoising = (output - samples.noise[0]).square().mean()  # the tiny model predicts the noise
        clip = 0.0
        if clip_weight:
            (image,) = module.data.target_images(module.batch.records)
            text = module.clip.text_features(ids)[0]
            clip = 1 - float(text @ torch.nn.functional.normalize(module.clip.features(image), dim=1)[0])
    assert float(result) == pytest.approx(denoising_weight * float(denoising) + clip_weight * clip, rel=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_losses_of_chunks_are_those_of_each_prompt_alone(family, image_folder, tmp_path):
    """Also with a CLIP, and with text encoders that read the text of the tokens."""
    backbone = BackboneSettings(families.save_with_clip(family, tmp_path / family), image_size=16)
    module = PEZ(backbone=backbone, num_tokens=2, clip_weight=0.7, denoising_weight=2.0, **FEW)
    fit(module, image_folder, tmp_path / "run", steps=1)
    set_batch(module, [*module.data.folder.load().values()][:3])
    rows, count = torch.arange(3), len(module.batch)
    samples = module.samples(rows, Step([4] * count, torch.tensor([[100, 700], [300, 900], [20, 500]])))
    ids = module.prompt.ids(module.prompt.allowed.nonzero()[3:9].view(3, 2))
    with torch.no_grad():
        embeddings = module.prompt.table[ids]
        alone = [module.loss(rows[[i]], ids[[i]], embeddings[[i]], samples[rows[[i]]]) for i in range(3)]
        assert len({round(float(loss), 4) for loss in alone}) == 3
        for chunk in (None, 1, 2, 5):
            losses = module.loss(rows, ids, embeddings, samples, chunk=chunk)
            torch.testing.assert_close(losses, torch.cat(alone), atol=1e-5, rtol=1e-5)
            texts = ["a red cat", "two dogs", ""]
            given = module.loss(rows, ids, embeddings, samples, texts, chunk)
            assert torch.allclose(given, losses, atol=1e-5) == (family == "sd1")  # which has no other text encoder
            one = module.loss(rows[[1]], ids[[1]], embeddings[[1]], samples[rows[[1]]], texts[1:2])
            torch.testing.assert_close(given[[1]], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "decay"),
    [(PEZ, {}, 0.1), (PEZ, {"weight_decay": 0.4, "lr": 0.3}, 0.4), (TextualInversion, {"weight_decay": 0.2}, 0.2)],
)
def test_steps_equal_torchs_adamw(method, settings, decay, tiny):
    module = method(backbone=tiny, num_tokens=3, **settings, **FEW)
    module.prompt.embeddings.data = torch.randn(2, 3, module.prompt.embeddings.shape[2])
    other = torch.nn.Parameter(module.prompt.embeddings.detach().clone())
    ours, theirs = module.configure_optimizers(), torch.optim.AdamW([other], lr=module.lr, weight_decay=decay)
    for _ in range(4):
        module.prompt.embeddings.grad = torch.randn_like(other)
        other.grad = module.prompt.embeddings.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(module.prompt.embeddings.data, other.data)


@pytest.mark.parametrize(
    ("method", "settings", "projected"),
    [
        (PEZ, {}, True),
        (PH2P, {"projection": "immediate", "optimizer": "adam"}, True),
        (PH2P, {"optimizer": "adam"}, False),
        (PH2P, {"max_iter": 1}, False),
        (TextualInversion, {}, False),
    ],
)
def test_gradient_is_computed_at_the_embeddings_of_the_paper(method, settings, projected, tiny, image_folder, tmp_path):
    """PEZ computes it at the nearest tokens, PH2P and textual inversion at the continuous embeddings."""
    as_expected = []

    class Recording(method):
        def loss(self, rows, ids, embeddings, samples, *rest, **how):
            if embeddings.requires_grad:
                free = self.prompt.embeddings.detach()[rows]
                near = self.prompt.table[self.prompt.project()[rows]]
                assert not torch.allclose(free, near, atol=1e-4)
                as_expected.append(
                    torch.allclose(embeddings[:, self.prompt.positions], near if projected else free, atol=1e-6)
                )
            return super().loss(rows, ids, embeddings, samples, *rest, **how)

        def init_params(self, rows):
            start = super().init_params(rows)
            return start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))

    fit(Recording(backbone=tiny, num_tokens=3, **settings, **FEW), image_folder / "0.png", tmp_path, steps=2)
    assert as_expected
    assert all(as_expected)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [({"optimizer": "adam", "lr": 0.3}, torch.optim.Adam), ({"optimizer": "sgd", "lr": 0.3}, torch.optim.SGD)],
)
def test_ph2p_steps_equal_torchs_optimizers(settings, theirs, tiny):
    module = PH2P(backbone=tiny, num_tokens=3, **settings, **FEW)
    module.prompt.embeddings.data = torch.randn(2, 3, module.prompt.embeddings.shape[2])
    other = torch.nn.Parameter(module.prompt.embeddings.detach().clone())
    optimizers = module.configure_optimizers(), theirs([other], lr=0.3)
    for _ in range(4):
        module.prompt.embeddings.grad = torch.randn_like(other)
        other.grad = module.prompt.embeddings.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(module.prompt.embeddings.data, other.data)


@pytest.mark.parametrize(
    ("optimizer", "theirs", "more"),
    [
        ("adam", torch.optim.Adam, {"eps": 0.2}),
        ("adamw", torch.optim.AdamW, {"eps": 0.2, "weight_decay": 0.01}),
        ("sgd", torch.optim.SGD, {}),
    ],
)
def test_steering_steps_equal_torchs_optimizers(optimizer, theirs, more, tiny):
    settings = {"optimizer": optimizer, "lr": 0.3, **({"eps": more["eps"]} if "eps" in more else {})}
    module = MetricGuidance(backbone=tiny, objective=Sharpness(), **settings, **FEW)
    module.prompt.rows.data = torch.randn(2, 1, 3, module.backbone.vocabulary.table.shape[1])
    other = torch.nn.Parameter(module.prompt.rows.detach().clone())
    optimizers = module.configure_optimizers(), theirs([other], lr=0.3, **more)
    for _ in range(4):
        module.prompt.rows.grad = torch.randn_like(other)
        other.grad = module.prompt.rows.grad.clone()
        for one in optimizers:
            one.step()
    torch.testing.assert_close(module.prompt.rows.data, other.data)


def test_grad_steps_default_to_all_of_few_calls_or_the_last(tiny):
    result = {}
    for steps in (1, 3, 4, 12):
        module = MetricGuidance(backbone=tiny, objective=Sharpness(), sampler=SamplerSettings(steps))
        result[module.sampler.calls] = module.grad_steps
    assert result == {1: 1, 4: 4, 5: 1, 13: 1}
    assert MetricGuidance(backbone=tiny, objective=Sharpness(), grad_steps=2, **FEW).grad_steps == 2


def test_objectives_of_one_class_have_different_names(tiny):
    module = MetricGuidance(
        backbone=tiny, objective=[Sharpness(2.0), Errors(3.0), Sharpness(0.5)], constraint=Sharpness(7.0), **FEW
    )
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    values = module.values(images, [Problem(str(i), "a cat") for i in range(3)])
    assert [*values] == ["Sharpness", "Errors", "Sharpness 2", "Sharpness 3"]
    expected = 2.5 * Sharpness()(images, []) - 3 * Errors()(images, [])
    torch.testing.assert_close(module.metric(values), expected)
    torch.testing.assert_close(module.loss(values), -expected)
    assert module.higher_is_better
    for objective in (Sharpness(2.0), Errors(2.0)):  # the metric of one objective is its value without the weight
        module = MetricGuidance(backbone=tiny, objective=objective, **FEW)
        result = module.values(images, [Problem(str(i), "a cat") for i in range(3)])
        torch.testing.assert_close(module.metric(result), objective(images, []))
        sign = -1 if objective.higher_is_better else 1
        torch.testing.assert_close(module.loss(result), 2 * sign * objective(images, []))
        assert module.higher_is_better == objective.higher_is_better


def test_embeddings_are_shifted_every_n_steps_of_their_own(tiny, monkeypatch):
    """They get the mean and deviation of their prompt; embeddings at other steps stay unchanged."""
    module = MetricGuidance(backbone=tiny, objective=Sharpness(), seeds=1, shift_every=3, **FEW)
    monkeypatch.setattr(module, "draw_noise", lambda problems, step, count: torch.randn(len(problems), count, 4, 8, 8))
    monkeypatch.setattr(module, "step_active", lambda loss, rows: None)
    monkeypatch.setattr(module, "log_step", lambda *args, **how: None)
    set_batch(
        module, [Problem(name, text) for name, text in zip("abcd", ("a cat", "a dog", "red", "blue"), strict=True)]
    )
    initial = module.init_params(torch.arange(4))
    module.parameter.data = initial + 0.3 + 2 * torch.randn_like(initial)
    before = module.parameter.detach().clone()
    module.step(Step([2, 2, 3, 8], torch.empty(4, 0)), torch.tensor([1, 2, 3]))
    assert torch.equal(module.parameter[[0, 2]], before[[0, 2]])
    for row in (1, 3):
        result, like, was = (x[row].detach() for x in (module.parameter, initial, before))
        assert float(result.mean()) == pytest.approx(float(like.mean()), abs=1e-5)
        assert float(result.std()) == pytest.approx(float(like.std()), rel=1e-5)
        torch.testing.assert_close((result - result.mean()) / result.std(), (was - was.mean()) / was.std())


def test_ph2p_marks_the_function_as_new_at_each_step(tiny, image_folder, tmp_path, monkeypatch):
    """Otherwise, gradients of two functions would be used as curvature; see tests/optimizers."""
    flags, step = [], BatchedLBFGS.step
    monkeypatch.setattr(
        BatchedLBFGS, "step", lambda self, *args, **how: flags.append(how["new_function"]) or step(self, *args, **how)
    )
    module = PH2P(backbone=tiny, num_tokens=3, max_iter=2, **FEW)
    fit(module, image_folder / "0.png", tmp_path, steps=3)
    assert flags == [True] * 3


class Errors(Objective):
    """Compute the mean, of which lower values are better."""

    lowest, highest, higher_is_better = 0.0, 10.0, False

    def forward(self, images, prompts):
        return images.flatten(1).mean(1)


@pytest.mark.parametrize(("constraint", "better"), [(Errors(), -1), (Sharpness(), 1)])
@pytest.mark.parametrize("tolerance", [0.0, 0.25])
def test_constraint_may_not_get_worse_than_its_tolerance(constraint, better, tolerance, tiny):
    module = MetricGuidance(
        backbone=tiny, objective=Sharpness(weight=2.0), constraint=constraint, constraint_tolerance=tolerance, **FEW
    )
    problem = Problem("0" * 16, "a cat", result=SteeringResult(values_before={module.constraint_name: [1.0, 2.0]}))
    for change, acceptable in (
        (0.5 * better, True),
        (0.0, True),
        (-0.2 * better, bool(tolerance)),
        (-0.5 * better, False),
    ):
        assert module.acceptable(problem, {module.constraint_name: [1.0 + change, 2.0 + change]}) is acceptable
