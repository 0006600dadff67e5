"""Seed invariance: the comparison with the target, and the schedule of the seeds."""

import json
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler
from PIL import Image
from searches import set_batch
from torch.nn import functional as F

from lightning_prompts.commands.main import main
from lightning_prompts.embeddings import slerp
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, SeedInvariance
from lightning_prompts.methods.steering.seed_invariance import LOSS_SCALE
from lightning_prompts.optimizers import AdamOnLion
from lightning_prompts.runs.record import Problem, SeedInvarianceResult
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import SEARCH, noise_of

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a small cat on a blue background", "two dogs beside a large tree"]


def search(tiny, folder, prompts=PROMPTS[0], **settings):
    settings = {
        "sampler": SamplerSettings(3),
        "seeds": 2,
        "steps": 6,
        "compare": "latents",
        "stages": [1, 2],
        "optimizer": partial(AdamOnLion, lr=0.05),
        "log_images_every_n_steps": 0,
    } | settings
    module, data = SeedInvariance(backbone=tiny, **settings), Prompts(prompts)
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(folder)})
    trainer.fit(module, datamodule=data)
    return module, list(data.folder.load().values())


def test_ramp_reaches_the_new_seeds_in_each_stage(tiny):
    settings = {"backbone": tiny, "sampler": SamplerSettings(3), "compare": "latents"}
    module = SeedInvariance(**settings, steps=10, stages=[1, 3], ramp=1.0)
    assert [module.stage(step)[0] for step in range(10)] == [1] * 5 + [3] * 5
    assert [module.stage(step)[1] for step in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0] * 2)
    uneven = SeedInvariance(**settings, steps=7, stages=[1, 2, 3], ramp=1.0)
    assert [uneven.stage(step)[0] for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    assert [uneven.stage(step)[1] for step in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2, 1, 1 / 2, 1])


@pytest.mark.parametrize("stages", range(1, 9))
def test_each_stage_has_a_step_and_ends_at_the_new_seeds(stages, tiny):
    for steps in range(stages, 25):
        numbers = [1 + number % 3 for number in range(stages)]
        module = SeedInvariance(
            backbone=tiny, sampler=SamplerSettings(3), compare="latents", steps=steps, stages=numbers, ramp=1.0
        )
        schedule = [module.stage(step) for step in range(steps)]
        ends = [calls for calls, value in schedule if value == 1]
        assert ends == numbers
        assert schedule[-1][1] == 1


def test_arc_can_be_traversed_in_the_default_steps(tiny):
    """The gradient points to the other prompt at every step, so the optimizer moves as far as it can."""
    module = SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), compare="latents", towards="two dogs")
    module.prompt.place.data = torch.full((1, 1, 1, 1), module.prompt.initial_logit)
    optimizer = module.configure_optimizers()
    assert module.prompt.place.sigmoid() < 0.01
    for _ in range(module.steps):
        module.prompt.place.grad = -LOSS_SCALE * torch.ones(1, 1, 1, 1)
        optimizer.step()
    assert 0.98 < module.prompt.place.sigmoid() < 1


def test_optimizer_has_the_settings_of_the_search(tiny):
    module = SeedInvariance(
        backbone=tiny, sampler=SamplerSettings(3), compare="latents", optimizer=partial(AdamOnLion, lr=0.3, eps=0.5)
    )
    (group,) = module.configure_optimizers().param_groups
    assert (group["lr"], group["eps"]) == (0.3, 0.5)


def test_default_schedule_compares_final_images_and_soon_new_seeds(tiny):
    module = SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), steps=10)
    assert {module.stage(step)[0] for step in range(10)} == {module.backbone.calls(3)} == {module.grad_steps}
    assert [module.stage(step)[1] for step in range(10)] == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])


@pytest.mark.parametrize(
    ("embedding", "grad_steps", "compare"),
    [
        ("rows", 1, "latents"),
        ("rows", 2, "latents"),
        ("one_row", 1, "latents"),
        ("arc", 1, "latents"),
        ("rows", 2, "clip"),
    ],
)
def test_loss_and_gradient_equal_a_plain_loop(embedding, grad_steps, compare, tiny, monkeypatch):
    """Compare in float64 with finite differences of the clean latents that the second call predicts."""
    moved = {"rows": {}, "one_row": {"one_row": True}, "arc": {"towards": PROMPTS[1]}}[embedding]
    module = SeedInvariance(
        backbone=tiny,
        sampler=SamplerSettings(3),
        steps=4,
        stages=[2],
        seeds_per_step=2,
        target_seeds=[4],
        grad_steps=grad_steps,
        ramp=1.0,
        compare=compare,
        **moved,
    )
    module.double()
    scheduler = DDIMScheduler.from_config(module.backbone.scheduler.config, clip_sample=False)
    module.backbone.scheduler = scheduler
    problem = Problem("key", PROMPTS[0], result=SeedInvarianceResult(target_seed=4))
    others = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(module, "draw_noise", lambda problems, step, count: others[:, :count])
    set_batch(module, [problem], steps=1)
    module.batch.parameter.data = module.prompt.double().init_params(module.prompt.initial)
    module.prompt.initial, module.starts = module.prompt.initial.double(), module.starts.double()
    losses = []
    monkeypatch.setattr(module, "step_active", lambda loss, rows: losses.append(loss))
    monkeypatch.setattr(module, "optimizers", lambda: None)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    module.step(Step([1], torch.empty(1, 0)), torch.tensor([0]))
    (loss,) = losses
    (gradient,) = torch.autograd.grad(loss.sum(), module.batch.parameter)

    start = noise_of([4], (4, 8, 8)).double()
    plain = module.prompt.initial[0, 0]
    negative = module.encode([""])[0]

    def clean(first, last, latents):
        """Compute the compared vectors of the clean latents at the second call.

        The two calls get different embeddings.
        """
        scheduler.set_timesteps(3)
        for i, (t, embeds) in enumerate(zip(scheduler.timesteps, (first, last), strict=False)):
            outputs = [module.backbone.denoiser(latents, t, x[None]).sample for x in (negative, embeds)]
            output = outputs[0] + module.sampler.guidance_scale * (outputs[1] - outputs[0])
            output_of_step = scheduler.step(output, t, latents)
            if i == 1:
                if compare == "latents":
                    return [output_of_step.pred_original_sample]
                vae = module.backbone.vae
                images = vae.decode(output_of_step.pred_original_sample / vae.config.scaling_factor).sample.clamp(-1, 1)
                pixels = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
                return [module.clip.clip.visual_projection(module.clip.clip.vision_model(pixels).pooler_output), images]
            latents = output_of_step.prev_sample
        return None

    def reference():
        embeds, total = module.prompt(torch.tensor([0]))[0, 0], 0.0
        target = clean(plain, plain, start)
        for n in range(2):
            noise = slerp(start.flatten(1), others[:, n].flatten(1), 0.5).view(1, 4, 8, 8)
            vectors = clean(embeds if grad_steps == 2 else fixed, embeds, noise)
            for weight, one, other in zip([0.7, 0.3] if len(vectors) == 2 else [1.0], vectors, target, strict=True):
                total += weight * LOSS_SCALE * (1 - F.cosine_similarity(one.flatten(1), other.flatten(1))) / 2
        return total

    with torch.no_grad():
        fixed = module.prompt(torch.tensor([0]))[0, 0].clone()
        assert float(loss) == pytest.approx(float(reference()), rel=1e-6, abs=1e-2 if compare == "clip" else 0)
        direction, ends = torch.randn_like(module.batch.parameter), []
        step = 3e-3 if embedding == "arc" else 1e-5  # the loss is flat at the start of the arc
        for sign in (1, -1):
            module.batch.parameter.data += sign * step * direction
            ends.append(float(reference()))
            module.batch.parameter.data -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("one_row", [False, True])
def test_best_embeddings_have_the_form_of_the_setting(one_row, tiny, tmp_path):
    module, (problem,) = search(tiny, tmp_path, one_row=one_row, target_seeds=[7])
    best = module.batch[0].best[0]
    assert torch.equal(best[0], module.prompt.initial[0, 0, 0])
    if one_row and problem.status == "done":
        assert (best[1:] == best[1]).all()
    before, after = sum(problem.result.metric_before), sum(problem.result.metric_after)
    assert after >= before
    assert (problem.status == "done") == (after > before)


def test_metric_is_the_peak_signal_to_noise_ratio(tiny):
    module = SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), compare="latents")
    problem, target = (
        Problem("key", PROMPTS[0], result=SeedInvarianceResult(target_seed=3)),
        torch.rand(3, 16, 16) - 0.5,
    )
    module._targets["key"] = target
    for error, ratio in ((0.2, 20), (0.02, 40), (2, 0)):  # of a range of 2
        values = module.values((target + error)[None], [problem])
        assert float(module.metric(values)) == pytest.approx(ratio, abs=1e-3)
        assert float(module.loss(values)) == pytest.approx(-ratio, abs=1e-3)  # lower is better


def test_preview_shows_each_target_beside_other_seeds(tiny, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("lightning_prompts.methods.steering.seed_invariance.sheet", lambda *given: shown.append(given))
    module, problems = search(tiny, tmp_path, PROMPTS)
    shown.clear()
    module.preview(problems)
    ((columns, texts, across),) = shown
    before, after = module.images_before_and_after(problems, module.draw_noise(problems, SEARCH, 2))
    assert texts == [PROMPTS[0], "", "", PROMPTS[1], "", ""]
    assert across == 6
    expected = []
    for p, target in enumerate(module.targets(problems)):
        expected += [[target], [before[p, 0], after[p, 0]], [before[p, 1], after[p, 1]]]
    for column, images in zip(columns, expected, strict=True):
        torch.testing.assert_close(torch.stack(list(column)), torch.stack(images), atol=1e-5, rtol=0)


def test_target_image_equals_that_of_predict(tiny, tmp_path):
    folder = tmp_path / "run"
    command = (
        f"fit --run {folder} --trainer.accelerator cpu --model SeedInvariance --model.backbone {tiny} "
        "--model.sampler.num_inference_steps 3 --model.seeds 1 --model.steps 2 --model.target_seeds [5,6] "
        "--model.compare latents --model.stages [1] --data Prompts --data.prompts"
    )
    main([*command.split(), PROMPTS[0]])
    problems = json.loads((folder / "result.json").read_text())["problems"]
    assert [problem["target_seed"] for problem in problems] == [5, 6]
    assert len({problem["key"] for problem in problems}) == 2
    main(["predict", "--run", str(folder), "--prompts", PROMPTS[0], "--seeds", "5", "--trainer.accelerator", "cpu"])
    (path,) = (folder / "images").iterdir()
    module = SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), compare="latents")
    (target,) = module.targets([Problem("key", PROMPTS[0], result=SeedInvarianceResult(target_seed=5))])
    with Image.open(path) as image:
        pixels = torch.tensor(list(image.getdata())).view(16, 16, 3).permute(2, 0, 1)
    assert (((target + 1) * 127.5).round() - pixels).abs().max() <= 1


def test_batch_equals_its_parts(tiny, tmp_path, monkeypatch):
    """Use plain gradient steps, because the sign in AdamOnLion flips where a gradient is almost zero."""
    monkeypatch.setattr(
        SeedInvariance, "configure_optimizers", lambda self: torch.optim.SGD([self.batch.parameter], lr=1e-3)
    )
    module, batch = search(tiny, tmp_path / "both", PROMPTS, target_seeds=[1, 2])
    assert [(p.target, p.result.target_seed) for p in batch] == [
        (prompt, seed) for prompt in PROMPTS for seed in (1, 2)
    ]
    one, (alone,) = search(tiny, tmp_path / "one", PROMPTS[1], target_seeds=[2])
    assert alone.result.metric_before == pytest.approx(batch[3].result.metric_before, abs=1e-3)
    moved = (one.prompt(torch.tensor([0])) - one.prompt.initial).abs()
    assert moved.max() > 0.01
    torch.testing.assert_close(one.prompt.rows[0], module.prompt.rows[3], atol=1e-4, rtol=0)


@pytest.mark.exact
def test_target_does_not_depend_on_the_batch(tiny, monkeypatch, rounding):
    """A resumed search generates the target again, in another batch than before."""
    module = SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), steps=4, stages=[1, 2], microbatch=3)
    monkeypatch.setattr(module, "draw_noise", lambda problems, *at: torch.zeros(len(problems), 1, 4, 8, 8))
    first, second, third = (
        Problem(str(seed), PROMPTS[seed % 2], result=SeedInvarianceResult(target_seed=seed)) for seed in (3, 4, 5)
    )
    targets = []
    for batches in ([[second]], [[first, second], [second, third]], [[third, second, first]]):
        module._target_vectors.clear()
        module._targets.clear()
        for batch in batches:
            set_batch(module, batch)
            images = module.targets(batch)
        index = batch.index(second)
        targets.append((module.prompt.initial[index], images[index], *module._target_vectors["4"].values()))
    for one in targets[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, targets[0], strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [1, 9]}, "must be at most the sampler's 4 denoiser calls"),
        ({"ramp": 1.5}, "must be between 0 and 1, got 1.5"),
        ({"stages": [1, 2, 3], "steps": 2}, "--model.steps must be at least"),
        ({"target_seeds": [3, -1]}, "--model.target_seeds takes .*not -1"),
        ({"target_seeds": [3, 2**32 + 3]}, "3 and 4294967299 give the same"),
        ({"towards": "two dogs", "one_row": True}, "--model.one_row has no effect with --model.towards"),
        ({"towards": "two dogs", "unconditional": True}, "--model.unconditional false"),
    ],
)
def test_invalid_settings_are_refused(settings, message, tiny):
    with pytest.raises(UserError, match=message):
        SeedInvariance(backbone=tiny, sampler=SamplerSettings(3), compare="latents", **settings)
