"""`check` against formulas, and what it prints, writes and refuses."""

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_prompts.backbones import repeat
from lightning_prompts.commands.check import (
    Losses,
    Suggestion,
    config_with,
    fastest_microbatch,
    sample_gradients,
    share_verdict,
    signal_to_noise,
)
from lightning_prompts.commands.main import main
from lightning_prompts.engine.batch import Row
from lightning_prompts.methods import PH2P
from lightning_prompts.objectives import Denoising
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import Microbatch

ROOT = Path(__file__).parents[2]
CPU = ["--trainer.accelerator", "cpu"]
FEW = ["--model.sampler.num_inference_steps", "4", "--model.batch_size", "3"]


def run(*args):
    """Run the command and return its exit code."""
    try:
        main(["check", *args, *CPU])
    except SystemExit as stop:
        return stop.code
    return 0


def make_losses(gain, caption_is_lower=True):
    """Make losses of two images with a given gain at each level."""
    empty = torch.full((2, len(gain)), 2.0)
    right = empty * (1 - torch.tensor(gain))
    return Losses(right, right * (1.5 if caption_is_lower else 0.5), empty, 1000)


def levels(text):
    """Read the numbers of the lines of the losses."""
    return [
        [float(number) for number in re.findall(r"-?[\d.]+(?:e-\d+)?", line)]
        for line in re.findall(r"^ +\[\d+, \d+\) .*%$", text, re.MULTILINE)
    ]


def test_suggested_timesteps_span_the_levels_with_the_largest_gain():
    gain = [0.0, 0.1, 0.5, 0.3, 0.45, 0.6, 0.40, 0.1, 0.0, -0.2]
    result = make_losses(gain)
    torch.testing.assert_close(result.gain, torch.tensor(gain))
    assert result.timesteps() == (200, 600)  # 0.75 of the mean of 0.6 and 0.5 is 0.4125
    assert result.verdict == "ok"


def test_verdict_is_no_if_the_caption_does_not_lower_the_loss():
    assert make_losses([0.5] * 10, caption_is_lower=False).verdict == "no"
    assert make_losses([-0.1] * 10).verdict == "no"
    assert make_losses([float("nan")] * 10).verdict == "no"


def test_verdict_on_a_share_accounts_for_chance():
    assert [share_verdict(share, 80, 0.5) for share in (0.5, 0.61, 0.62, 0.79, 0.8)] == [
        "no",
        "no",
        "weak",
        "weak",
        "ok",
    ]
    assert share_verdict(1.0, 4, 0.25) == "ok"


def test_signal_to_noise_grows_with_the_root_of_the_number_of_samples():
    """The ratio grows with the square root of the number of independent samples.

    Differences between strata lower only the ratio of single samples.
    """
    draw = torch.Generator().manual_seed(0)
    mean = torch.zeros(1000)
    mean[0] = 10.0
    noise = torch.randn(400, 8, 1000, generator=draw)
    expected = [10 / 1000**0.5 * size**0.5 for size in (1, 2, 4, 8)]
    assert signal_to_noise(mean + noise) == pytest.approx(expected, rel=0.05)
    strata = torch.linspace(-1, 1, 8).view(8, 1) * torch.ones(1000) * 3
    ratios = signal_to_noise(mean + noise + strata)
    assert ratios[3] == pytest.approx(expected[3], rel=0.05)
    assert ratios[0] < 0.5 * expected[0]
    assert signal_to_noise(torch.randn(400, 8, 50, generator=draw)) == pytest.approx([0] * 4, abs=0.05)


def test_mean_of_sample_gradients_is_that_of_the_loss(tiny):
    method = PH2P(backbone=tiny, num_tokens=3)
    allowed = method.prompt.allowed.nonzero().squeeze(1)
    method.prompt.embeddings.data = method.prompt.table[allowed[:3]][None].clone()
    noise = torch.randn(5, *method.backbone.latent_shape)
    timesteps, latents = torch.tensor([0, 200, 450, 700, 999]), torch.randn(1, *method.backbone.latent_shape)
    method.latents = [latents]
    actual = sample_gradients(method, 0, timesteps, noise, Microbatch(2))
    prompt_embeds = method.backbone.encode(*method.prompt(torch.tensor([0])))
    loss = Denoising(Microbatch(5))(
        method.backbone, prompt_embeds, repeat(latents, 5)[None], timesteps[None], noise[None]
    )
    (expected,) = torch.autograd.grad(loss.sum(), method.prompt.embeddings)
    torch.testing.assert_close(actual.mean(0), expected.flatten(), atol=1e-6, rtol=1e-4)
    assert actual.norm(dim=1).min() > 0


def test_suggested_microbatch_fits_into_memory(tiny, monkeypatch):
    method = PH2P(backbone=tiny, num_tokens=3)
    allowed = method.prompt.allowed.nonzero().squeeze(1)
    method.prompt.embeddings.data = method.prompt.table[allowed[:3]][None].clone()
    method.batch.rows, method.latents = (
        [Row(Problem("key", "a.png", []))],
        [torch.randn(1, *method.backbone.latent_shape)],
    )
    sizes, denoise = [], method.backbone.denoise

    def limited(noisy, *args):
        sizes.append(len(noisy))
        if len(noisy) > 4:
            raise torch.OutOfMemoryError
        time.sleep(0.01)  # the same time for any number of samples
        return denoise(noisy, *args)

    monkeypatch.setattr(method.backbone, "denoise", limited)
    assert fastest_microbatch(method, (0, 1000), 0, 64)[0] == 4
    assert max(sizes) == 8  # no larger size is tried
    assert fastest_microbatch(method, (0, 1000), 0, 2)[0] == 2


def test_written_config_has_the_settings_and_the_suggestion():
    given = {
        "model": {
            "class_path": "PH2P",
            "init_args": {"backbone": {"name": "emoji"}, "microbatch": 16, "template": "a {}"},
        },
        "data": {
            "class_path": "ImagesToPrompts",
            "init_args": {"images": "a: b.png", "num_noise_samples": 2, "timestep_range": [0, 9]},
        },
    }
    content = yaml.safe_load(config_with(given, Suggestion((450, 850), 4, 8)))
    assert content["model"]["init_args"] == {"backbone": {"name": "emoji"}, "microbatch": 8, "template": "a {}"}
    assert content["data"]["init_args"] == {"images": "a: b.png", "num_noise_samples": 4, "timestep_range": [450, 850]}
    assert yaml.safe_load(config_with(given, Suggestion())) == given


def test_embedded_model_passes_and_fit_reads_the_written_config(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    targets = ["--data.images", str(ROOT / "benchmarks/targets/development/targets.jsonl")]
    assert (
        run(
            "--config",
            str(ROOT / "configs/ph2p.yaml"),
            *targets,
            *FEW,
            "--model.batch_size",
            "4",
            "--write",
            str(config),
        )
        == 0
    )
    out = capsys.readouterr().out
    verdicts = dict(re.findall(r"^(\w+) +.*? (ok|weak|no)$", out, re.MULTILINE))
    assert verdicts["image"] == verdicts["CLIP"] == verdicts["memory"] == "ok"
    assert "lower with the caption than with another's in 100% of 80 comparisons" in out
    assert "A search can work." in out
    page = (ROOT / "docs" / "check.md").read_text()
    assert len(levels(page)) == 10
    for documented, printed in zip(levels(page), levels(out), strict=True):
        assert documented[:5] == pytest.approx(printed[:5], rel=0.02)
        assert documented[5] == pytest.approx(printed[5], abs=1)
    settings = yaml.safe_load(config.read_text())
    low, high = settings["data"]["init_args"]["timestep_range"]
    assert 300 <= low <= 550  # where docs/ablations.md has the largest gains
    assert 750 <= high <= 1000
    samples, microbatch = (
        settings["data"]["init_args"]["num_noise_samples"],
        settings["model"]["init_args"]["microbatch"],
    )
    assert (
        f"--data.timestep_range '[{low},{high}]' --data.num_noise_samples {samples} --model.microbatch {microbatch}"
        in out
    )
    assert settings["model"]["init_args"]["restart_every"] == 60
    image = ["--data.images", str(ROOT / "docs/images/demo.png")]
    main(["fit", "--config", str(config), *image, "--model.steps", "1", "--run", str(tmp_path / "run"), *CPU])
    assert (tmp_path / "run" / "result.json").exists()


def test_check_uses_the_clips_words_without_captions(tiny, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run("--model", "GCG", "--model.num_tokens", "2", "--model.backbone", tiny, "--data.images", str(image_folder), *FEW)
    out = capsys.readouterr().out
    assert re.search(r"lower with the CLIP's words than with (another's|random tokens) in", out)
    assert re.search(r"CLIP +the two most similar of 3 images have a cosine of [\d.]+ +(ok|weak|no)", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_model_that_ignores_its_prompt_fails(tiny, image_folder, tmp_path, capsys):
    """The denoiser's cross-attention returns zeros, as if the text encoder's output did not arrive."""

    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    silenced = {name: tensor * 0 if ".attn2.to_out" in name else tensor for name, tensor in tensors.items()}
    assert any(".attn2.to_out" in name for name in tensors)
    save_file(silenced, weights, {"format": "pt"})
    config = tmp_path / "mine.yaml"
    how = ["--model", "PH2P", "--model.num_tokens", "2", "--data.timestep_range", "[100,900]", "--write", str(config)]
    assert run(*how, "--model.backbone", str(broken), "--data.images", str(image_folder), *FEW) == 1
    captured = capsys.readouterr()
    assert re.search(r"image +leaving out .* changes the image by 0.000 .* no", captured.out)
    assert "A search cannot work: the prompt does not change the generated image." in captured.out
    assert "Suggested" not in captured.out
    assert not config.exists()


def test_steering_methods_are_checked_without_images(tiny, capsys):
    how = ["--model", "MetricGuidance", "--model.objective", "Sharpness", "--data.prompts", "a red cat", *FEW]
    assert run(*how, "--model.backbone", tiny) in (0, 1)
    out = capsys.readouterr().out
    assert re.search(r"image +leaving out the prompt changes the image by [\d.]+", out)
    assert "loss" not in out


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--model", "HumanFeedback", "--data.prompts", "a red cat"], "A user's choices cannot be measured"),
        (
            ["--model", "PH2P", "--data.images", "{image_folder}", "--write", "{image_folder}/0.png"],
            "must name a new file",
        ),
        (["--model", "PH2P", "--data.images", "nowhere"], "nowhere"),
    ],
)
def test_check_refuses_invalid_arguments(args, match, tiny, image_folder, capsys):
    given = [arg.format(image_folder=image_folder) for arg in args]
    assert run(*given, "--model.backbone", tiny) == 2
    captured = capsys.readouterr()
    assert match in captured.err
    assert captured.err.count("\n") == 1
