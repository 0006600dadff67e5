"""Steering of encoded prompts: gradients, selection, files, resuming."""

import itertools
import json
import signal

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_prompts.backbones import load_backbone
from lightning_prompts.commands.main import main
from lightning_prompts.engine.checkpoint import PromptCheckpoint
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, MetricGuidance
from lightning_prompts.objectives import Blurriness, ClipText, LatentDistance, Objective, Sharpness
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import Microbatch, SamplerSettings
from lightning_prompts.sampling.seeding import SEARCH, draw_noise

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a small cat on a blue background", "two dogs beside a large tree"]


def search(tiny, folder, prompts, **settings):
    settings = {
        "sampler": SamplerSettings(3),
        "seeds": 2,
        "steps": 3,
        "grad_steps": 1,
        "lr": 0.05,
        "log_images_every_n_steps": 0,
        "objective": Sharpness(),
    } | settings
    module, data = MetricGuidance(backbone=tiny, **settings), Prompts(prompts)
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(folder)})
    trainer.fit(module, datamodule=data)
    return module, list(data.folder.load().values())


# --- the gradient


@pytest.fixture(scope="module")
def exact(tiny):
    """Create a method in float64 with a sampler that keeps this precision."""
    module = MetricGuidance(
        backbone=tiny, objective=Sharpness(), sampler=SamplerSettings(3), seeds=2, unconditional=True
    )
    module.backbone.double()
    module.backbone.scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1, clip_sample=False)
    return module


def slope(function, at, direction, step=1e-5):
    with torch.no_grad():
        return (function(at + step * direction) - function(at - step * direction)) / (2 * step)


@pytest.mark.parametrize("grad_steps", [1, 2, 3])
def test_gradient_of_the_last_calls_equals_finite_differences(exact, grad_steps):
    torch.manual_seed(1)
    problems = [Problem("a", PROMPTS[0]), Problem("b", PROMPTS[1])]
    embeds = exact.initial(problems).double()
    noise = torch.randn(2, 2, *exact.backbone.latent_shape, dtype=torch.float64)
    leaf = embeds.clone().requires_grad_()
    losses, _ = exact.evaluate(leaf, noise, problems, grad_steps)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)

    def reference(changed):
        """Run a plain loop: the first calls get constant embeddings, the last calls those with a gradient."""
        scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1, clip_sample=False)
        scheduler.set_timesteps(3)
        total = 0.0
        for p, n in itertools.product(range(2), range(2)):
            latents = noise[p, n][None]
            for i, t in enumerate(scheduler.timesteps):
                positive, negative = (changed if i >= 3 - grad_steps else embeds)[p]
                outputs = [exact.backbone.denoiser(latents, t, x[None]).sample for x in (negative, positive)]
                output = outputs[0] + exact.sampler.guidance_scale * (outputs[1] - outputs[0])
                latents = scheduler.step(output, t, latents).prev_sample
            image = exact.backbone.decode(latents)
            total = total - 50 * Sharpness()(image, [""])[0]
        return total

    assert float(losses.sum()) == pytest.approx(float(reference(embeds)), rel=1e-6)
    direction = torch.randn_like(embeds)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope(reference, embeds, direction)), rel=1e-4)


def test_microbatch_does_not_change_the_gradient(exact):
    problems, noise = [Problem("a", PROMPTS[0])], torch.randn(1, 4, *exact.backbone.latent_shape, dtype=torch.float64)
    results = []
    for microbatch in (1, 3, 16):
        exact.sampler.microbatch = Microbatch(microbatch)
        leaf = exact.initial(problems).double().requires_grad_()
        losses, values = exact.evaluate(leaf, noise, problems, 1)
        results.append((losses.detach(), values["Sharpness"], torch.autograd.grad(losses.sum(), leaf)[0]))
    for one in results[1:]:
        for a, b in zip(results[0], one, strict=True):
            torch.testing.assert_close(a, b)


# --- the search


@pytest.mark.parametrize("optimizer", ["adam_on_lion", "adam", "adamw", "sgd"])
def test_search_improves_the_metric(optimizer, tiny, tmp_path):
    lr = 0.05 if optimizer == "adam_on_lion" else 0.5
    for objective in (Sharpness(), Blurriness()):
        folder = tmp_path / type(objective).__name__
        _, (problem,) = search(tiny, folder, PROMPTS[0], objective=objective, optimizer=optimizer, lr=lr)
        before, after = sum(problem.result.metric_before), sum(problem.result.metric_after)
        assert after > before if objective.higher_is_better else after < before
        assert problem.status == "done"
        assert problem.prompt == PROMPTS[0]


def test_only_the_prompt_trains(tiny, tmp_path):
    whole = load_backbone(tiny).state_dict()
    module, _ = search(tiny, tmp_path, PROMPTS[0], unconditional=True)
    for name, value in module.backbone.state_dict().items():
        assert torch.equal(value, whole[name])
    assert list(module.state_dict()) == ["prompt.rows"]
    moved = torch.stack([row.best for row in module.batch.rows]) - module.prompt.initial
    assert torch.equal(moved[:, :, 0], torch.zeros_like(moved[:, :, 0]))  # the start of the text
    assert (moved[:, :, 1:].abs().amax(dim=(0, 2, 3)) > 0).all()  # both prompts


def test_batch_equals_its_parts(tiny, tmp_path):
    module, batch = search(tiny, tmp_path / "both", PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        one, (alone,) = search(tiny, tmp_path / str(i), [prompt])
        assert alone.result.metric_after == pytest.approx(batch[i].result.metric_after, rel=1e-3)
        torch.testing.assert_close(one.batch[0].best, module.batch[i].best, atol=2e-3, rtol=0)


def test_steps_cycle_through_the_seeds(tiny, tmp_path, monkeypatch):
    noises, evaluate = [], MetricGuidance.evaluate

    def recorded(self, embeds, noise, problems, grad_steps=0):
        if grad_steps:
            noises.append(noise[0])
        return evaluate(self, embeds, noise, problems, grad_steps)

    monkeypatch.setattr(MetricGuidance, "evaluate", recorded)
    module, (problem,) = search(tiny, tmp_path, PROMPTS[0], seeds=3, seeds_per_step=2, steps=3)
    whole = draw_noise(0, [problem.key], SEARCH, 3, module.backbone.latent_shape, "cpu")[0]
    for noise, turns in zip(noises, ([0, 1], [2, 0], [1, 2]), strict=True):
        assert torch.equal(noise, whole[turns])


def test_metric_is_the_weighted_sum_of_objectives(tiny, tmp_path):
    _, (problem,) = search(
        tiny, tmp_path, PROMPTS[0], objective=[Sharpness(2.0), ClipText(weight=3.0), Blurriness(0.5)]
    )
    assert list(problem.result.values_before) == ["Sharpness", "ClipText", "Blurriness"]
    for when in ("before", "after"):
        values, metric = getattr(problem.result, f"values_{when}"), getattr(problem.result, f"metric_{when}")
        rows = zip(*values.values(), metric, strict=True)
        assert all(total == pytest.approx(2 * a + 3 * b - 0.5 * c) for a, b, c, total in rows)
    assert problem.validation_loss == pytest.approx(-sum(problem.result.metric_after) / 2)


class Opposite(Objective):
    lowest, highest = -float("inf"), 0.0

    def forward(self, images, prompts):
        return -Sharpness()(images, prompts)


def test_constraint_ends_the_search(tiny, tmp_path):
    module, (problem,) = search(tiny, tmp_path, PROMPTS[0], constraint=Opposite(), steps=9, patience=2)
    assert problem.result.values_before["Opposite"] == [-x for x in problem.result.values_before["Sharpness"]]
    assert problem.status == "not improved"
    assert problem.result.metric_after == problem.result.metric_before
    seeds, calls, scorings = 2, module.sampler.cost(), 3  # of the start, and two that were rejected
    assert problem.unet_samples == scorings * seeds * calls + 2 * seeds * (calls + 2)
    _, (problem,) = search(
        tiny, tmp_path / "much", PROMPTS[0], constraint=Opposite(), constraint_tolerance=1e9, steps=2
    )
    assert problem.status == "done"


def test_shift_is_applied_every_n_steps(tiny, tmp_path, monkeypatch):
    shifts = []
    monkeypatch.setattr(
        "lightning_prompts.methods.steering.metric_guidance.shift", lambda rows, like: shifts.append(1) or rows
    )
    search(tiny, tmp_path, PROMPTS[0], steps=7, shift_every=3)
    assert len(shifts) == 2


class Broken(Objective):
    lowest, highest = 0.0, 1.0

    def __init__(self, after=0):
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, images, prompts):
        self.calls += 1
        return images.flatten(1).mean(1) * (float("nan") if self.calls > self.after else 1)


def test_metric_that_is_never_finite_fails_the_problem(tiny, tmp_path, caplog):
    _, (problem,) = search(tiny, tmp_path / "never", PROMPTS[0], objective=Broken())
    assert problem.status == "failed"
    assert "not a finite number" in problem.reason
    _, (problem,) = search(tiny, tmp_path / "later", PROMPTS[0], objective=Broken(after=3))
    assert problem.status in ("done", "not improved")
    assert "was not finite in 1 of the steps" in caplog.text
    assert all(-1 <= value <= 1 for value in problem.result.metric_after)


def test_invalid_settings_are_refused(tiny):
    for settings, message in (
        ({"objective": []}, "at least one metric"),
        ({"objective": Sharpness(), "seeds": 2, "seeds_per_step": 3}, "got 3 and 2"),
        (
            {"objective": Sharpness(), "unconditional": True, "sampler": SamplerSettings(3, 1.0)},
            "guidance_scale 1, negative prompts",
        ),
        ({"objective": Sharpness(), "lr": 0.0}, "--model.lr"),
    ):
        with pytest.raises(UserError, match=message):
            MetricGuidance(backbone=tiny, **settings)


class PromptLength(Objective):
    """The mean of an image plus the number of letters of its prompt."""

    lowest, highest = 0.0, 1e3

    def forward(self, images, prompts):
        return images.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts])


def test_fresh_scores_are_of_each_image_with_its_prompt(tiny):
    module = MetricGuidance(backbone=tiny, objective=[PromptLength(2.0), Sharpness(3.0)], microbatch=4)
    problems = [Problem(name, prompt) for name, prompt in zip("ab", PROMPTS, strict=True)]
    images = {"before": torch.rand(2, 3, 3, 16, 16), "after": torch.rand(2, 3, 3, 16, 16)}
    module.record_fresh_scores(problems, *images.values())
    for p, problem in enumerate(problems):
        for when, several in images.items():
            lengths = [float(image.mean()) + len(problem.target) for image in several[p]]
            sharpness = Sharpness()(several[p], []).tolist()
            result = getattr(problem.result, f"fresh_values_{when}")
            assert result["PromptLength"] == pytest.approx(lengths)
            assert result["Sharpness"] == pytest.approx(sharpness)
            metric = [2 * a + 3 * b for a, b in zip(lengths, sharpness, strict=True)]
            assert getattr(problem.result, f"fresh_metric_{when}") == pytest.approx(metric)


@pytest.mark.parametrize("unconditional", [False, True])
def test_images_of_the_best_embeddings_come_from_the_batch_or_disk(unconditional, tiny, tmp_path):
    module, problems = search(tiny, tmp_path, PROMPTS, unconditional=unconditional)
    best, noise = [row.best for row in module.batch.rows], torch.randn(2, 3, *module.backbone.latent_shape)
    metrics = [sum(problem.result.metric_after) / 2 for problem in problems]
    assert all(problem.result.metric_after != problem.result.metric_before for problem in problems)

    def sampled(prompt, negative, noise):
        """Sample images one by one."""
        latents = [module.backbone.sample(prompt, negative, x[None], 3, module.sampler.guidance_scale) for x in noise]
        return module.backbone.decode(torch.cat(latents))

    with torch.no_grad():
        empty, blurry = (module.backbone.encode_text([text], negative=True) for text in ("", "blurry"))
        initial = [
            sampled(module.backbone.encode_text([prompt]), empty, x) for prompt, x in zip(PROMPTS, noise, strict=True)
        ]
        moved = [sampled(x[:1], x[1:] if unconditional else empty, y) for x, y in zip(best, noise, strict=True)]
        away = sampled(best[1][:1], blurry, noise[1])
        for _ in range(2):
            before, after = module.images_before_and_after(problems, noise)
            torch.testing.assert_close(before, torch.stack(initial), atol=1e-4, rtol=0)
            torch.testing.assert_close(after, torch.stack(moved), atol=1e-4, rtol=0)
            assert not torch.allclose(after, before, atol=2e-3)
            generated = module.generate_best(problems[1], noise[1])
            torch.testing.assert_close(generated, moved[1], atol=1e-4, rtol=0)
            torch.testing.assert_close(module.generate_best(problems[1], noise[1], "blurry"), away, atol=1e-4, rtol=0)
            assert module.validation_losses(problems).tolist() == pytest.approx(metrics, rel=1e-3)
            module.batch.rows = module.batch.rows[1:]  # the first one is on disk only


# --- runs


def run(tiny, folder, *extra):
    command = (
        f"fit --run {folder} --trainer.accelerator cpu --model MetricGuidance --model.backbone {tiny} "
        "--model.objective Sharpness --model.sampler.num_inference_steps 3 --model.seeds 2 --model.steps 4 "
        "--model.lr 0.05 --model.log_images_every_n_steps 0 --data Prompts --data.prompts"
    )
    return [*command.split(), json.dumps(PROMPTS), *extra]


def problems(folder):
    result = json.loads((folder / "result.json").read_text())["problems"]
    return [{name: value for name, value in problem.items() if name != "seconds"} for problem in result]


@pytest.mark.parametrize(
    "stop", [0, pytest.param(1, marks=[pytest.mark.exact, pytest.mark.slow]), pytest.param(3, marks=pytest.mark.slow)]
)
def test_search_killed_at_a_step_resumes_identically(stop, tiny, tmp_path, monkeypatch, rounding):
    how = (
        "--model.unconditional",
        "true",
        "--model.objective",
        "ClipText",
        "--model.seeds_per_step",
        "1",
        "--model.microbatch",
        "2",
    )
    main(run(tiny, tmp_path / "whole", *how))
    monkeypatch.setattr(PromptCheckpoint, "on_train_batch_end", lambda self, trainer, *_: self._save(trainer))
    before, steps = signal.getsignal(signal.SIGINT), itertools.count()

    def interrupted(self, batch, rows, *, search=MetricGuidance.step):
        search(self, batch, rows)
        if next(steps) == stop:
            raise KeyboardInterrupt

    again = [*run(tiny, tmp_path / "broken", *how), "--ckpt_path", "last"]
    with monkeypatch.context() as patch:
        patch.setattr(MetricGuidance, "step", interrupted)
        with pytest.raises(SystemExit):
            main(again)
    signal.signal(signal.SIGINT, before)
    assert list((tmp_path / "broken" / "problems").glob("*.safetensors"))  # the best embeddings are on disk
    main(again)
    for broken, unbroken in zip(problems(tmp_path / "broken"), problems(tmp_path / "whole"), strict=True):
        assert broken == unbroken  # also before the first checkpoint, where the search starts over
    one, other = (load_file(tmp_path / name / "prompt_embeds.safetensors") for name in ("broken", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(run(tiny, folder))
    return folder


@pytest.mark.slow
def test_finished_run_resumes_without_work_and_takes_more_prompts(tiny, tmp_path):
    main(run(tiny, tmp_path / "run", "--data.prompts", PROMPTS[0]))
    (before,) = problems(tmp_path / "run")
    for _ in range(2):
        main(run(tiny, tmp_path / "run", "--data.prompts", PROMPTS[0], "--ckpt_path", "last"))
        assert problems(tmp_path / "run") == [before]
    main(run(tiny, tmp_path / "run", "--ckpt_path", "last"))
    first, second = problems(tmp_path / "run")
    assert first["metric_after"] == before["metric_after"]
    assert second["prompt"] == PROMPTS[1]
    assert len(load_file(tmp_path / "run" / "prompt_embeds.safetensors")) == 2


def test_result_lists_metrics_before_and_after(finished, tiny):
    for problem, prompt in zip(problems(finished), PROMPTS, strict=True):
        assert problem["target"] == problem["prompt"] == prompt
        assert len(problem["metric_before"]) == len(problem["metric_after"]) == 2
        assert len(problem["fresh_metric_before"]) == len(problem["fresh_metric_after"]) == 10
        assert sum(problem["metric_after"]) > sum(problem["metric_before"])
        assert problem["values_after"] == {"Sharpness": problem["metric_after"]}
    assert (finished / "prompt.txt").read_text().splitlines() == PROMPTS
    with Image.open(finished / "grid.png") as grid:
        assert grid.width > grid.height
    with safe_open(finished / "prompt_embeds.safetensors", "pt") as file:
        metadata = file.metadata()
    keys = [problem["key"] for problem in problems(finished)]
    assert json.loads(metadata["base_prompts"]) == dict(zip(keys, PROMPTS, strict=True))
    assert (metadata["family"], metadata["backbone"]) == ("StableDiffusion", tiny)


def test_diffusers_generates_the_same_image(finished, tiny):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (key, *_), embeds = (p["key"] for p in problems(finished)), load_file(finished / "prompt_embeds.safetensors")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    prompt_embeds = embeds[f"{key}.prompt_embeds"]
    theirs = pipeline(
        prompt_embeds=prompt_embeds[None],
        negative_prompt="",
        latents=noise,
        num_inference_steps=3,
        guidance_scale=7.5,
        output_type="pt",
    ).images[0]
    main(["predict", "--run", str(finished), "--seeds", "5", "--trainer.accelerator", "cpu"])
    with Image.open(finished / "images" / f"{key}-seed5.png") as image:
        ours = torch.tensor(list(image.getdata())).view(16, 16, 3).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().max() < 0.01


def test_later_commands_leave_the_records_unchanged(finished, capsys):
    before = problems(finished)
    main(["test", "--run", str(finished), "--trainer.accelerator", "cpu"])
    assert "on fresh seeds metric" in capsys.readouterr().out
    assert problems(finished) == before
    main(["validate", "--run", str(finished), "--trainer.accelerator", "cpu"])
    output = capsys.readouterr().out
    for problem in before:
        assert f"{sum(problem['metric_after']) / 2:.5f}  {problem['target']}" in output
    main(["predict", "--run", str(finished), "--negative", "two dogs", "--trainer.accelerator", "cpu"])
    assert len(list((finished / "images").glob("*without*"))) == 2


def test_embeddings_of_another_model_are_refused(finished, tmp_path, capsys):
    (file, *_) = sorted((finished / "problems").glob("*.safetensors"))
    content, metadata = load_file(file), None
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    original = file.read_bytes()
    try:
        save_file(content, file, metadata | {"shape": "[77, 768]", "backbone": "sd15"})
        with pytest.raises(SystemExit):
            main(["test", "--run", str(finished), "--trainer.accelerator", "cpu"])
        assert "made for sd15 (StableDiffusion, [77, 768])" in capsys.readouterr().err
        file.write_bytes(b"no")
        with pytest.raises(SystemExit):
            main(["test", "--run", str(finished), "--trainer.accelerator", "cpu"])
        assert "cannot be read as embeddings" in capsys.readouterr().err
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.objective", "Beauty"], "choose one of Aesthetic, Blurriness"),
        (["--model.objective", "Aesthetic"], "--model.objective.weights must be given"),
        (["--model.objective", "LatentDistance", "--model.objective.reference", "absent.png"], "absent.png"),
        (["--model.objective.weigt", "3"], "did you mean --model.objective.weight?"),
        (["--model.constraint", "Beauty"], "cannot be --model.constraint; choose one of"),
        (["--data.prompts", "a red square " * 20], "shorten it"),
        (["--data.prompts", ""], "A prompt is empty"),
    ],
)
def test_mistakes_give_one_sentence(extra, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(run(tiny, tmp_path / "run", *extra))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_second_search_in_a_folder_is_refused(finished, tiny, capsys):
    with pytest.raises(SystemExit):
        main(run(tiny, finished))
    assert "already holds a run" in capsys.readouterr().err


def test_latent_distance_to_a_reference_image_decreases(tiny, tmp_path, image_folder):
    module = MetricGuidance(backbone=tiny, objective=LatentDistance(str(image_folder / "0.png")))
    assert not module.higher_is_better
    _, (problem,) = search(tiny, tmp_path, PROMPTS[0], objective=LatentDistance(str(image_folder / "0.png"), 20.0))
    assert sum(problem.result.metric_after) < sum(problem.result.metric_before)
