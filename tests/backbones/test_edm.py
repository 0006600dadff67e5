"""SDXL with the noise levels of EDM (arXiv 2206.00364), as in Playground v2.5 and CosXL."""

import math

import diffusers
import families
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prompts import dpo_diff, invert, metric_guidance
from lightning_prompts.backbones import load_backbone
from lightning_prompts.objectives import Sharpness
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["a red square on a blue background", "two dogs and a Cat"]
SCHEDULERS = {
    "playground": diffusers.EDMDPMSolverMultistepScheduler(),
    "cosxl": diffusers.EDMEulerScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential"
    ),
    "euler": diffusers.EDMEulerScheduler(),
    "velocity": diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", num_train_timesteps=100),
}


@pytest.fixture(scope="module", params=SCHEDULERS)
def scheduler(request):
    return SCHEDULERS[request.param]


@pytest.fixture(scope="module")
def folder(scheduler, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("edm")
    statistics = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    families.sdxl(folder, scheduler, **statistics).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def backbone(folder):
    return load_backbone(folder, image_size=16)


def sigma_of(scheduler, timestep):
    """Return the row of diffusers' descending table for an ascending training timestep."""
    config, count = scheduler.config, scheduler.config.num_train_timesteps
    last = count if isinstance(scheduler, diffusers.EDMEulerScheduler) else count - 1  # Euler's table has one more row
    share = (count - 1 - timestep) / last
    low, high = config.sigma_min, config.sigma_max
    if config.sigma_schedule == "exponential":
        return high * (low / high) ** share
    return (high ** (1 / config.rho) + share * (low ** (1 / config.rho) - high ** (1 / config.rho))) ** config.rho


def test_preconditioning_equals_the_papers(backbone, scheduler):
    """Compare with table 1, number by number; F is the network and D the denoiser."""
    backbone.double()
    data, sign = scheduler.config.sigma_data, -1 if scheduler.config.prediction_type == "v_prediction" else 1
    most = backbone.num_train_timesteps
    timesteps = torch.tensor([0, 1, most // 2, most - 2, most - 1])
    latents, noise, output = torch.randn(3, 5, *backbone.latent_shape, dtype=torch.float64)
    noisy_input, target = backbone.add_noise(latents, noise, timesteps), backbone.target(latents, noise, timesteps)
    clean = backbone.predict_x0(noisy_input, output, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        sigma = sigma_of(scheduler, timestep)
        c_in = 1 / math.sqrt(sigma**2 + data**2)
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sign * sigma * data / math.sqrt(sigma**2 + data**2)
        c_noise = math.log(sigma) / 4
        x = latents[i] + sigma * noise[i]
        near = {"rtol": 2e-5, "atol": 1e-5}  # the table is float32
        assert float(backbone.condition(timesteps)[i]) == pytest.approx(c_noise, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(noisy_input[i], c_in * x, **near)
        torch.testing.assert_close(target[i], (latents[i] - c_skip * x) / c_out, **near)
        torch.testing.assert_close(clean[i], c_skip * x + c_out * output[i], **near)
        alone = timesteps[i : i + 1]
        own = backbone.predict_x0(noisy_input[i : i + 1], target[i : i + 1], alone)
        torch.testing.assert_close(own[0], latents[i], rtol=1e-9, atol=1e-9)


def test_target_has_variance_one_at_every_noise_level(backbone):
    data = backbone.sigma_data
    timesteps = torch.arange(0, backbone.num_train_timesteps, backbone.num_train_timesteps // 10)
    latents, noise = torch.randn(2, len(timesteps), 4, 64, 64)
    target = backbone.target(data * latents, noise, timesteps)
    torch.testing.assert_close(target.flatten(1).std(1), torch.ones(len(timesteps)), atol=0.03, rtol=0)
    noisy_input = backbone.add_noise(data * latents, noise, timesteps)
    torch.testing.assert_close(noisy_input.flatten(1).std(1), torch.ones(len(timesteps)), atol=0.03, rtol=0)


def test_larger_timesteps_are_noisier(backbone):
    conditions = backbone.condition(torch.arange(backbone.num_train_timesteps))
    assert (conditions.diff() > 0).all()
    c_noise = torch.tensor([-0.5, 0.3])
    assert torch.equal(backbone.condition(c_noise), c_noise)  # the sampler's timesteps are the input of the denoiser


def test_denoiser_is_conditioned_on_c_noise(backbone):
    prompt, noisy, timesteps = (
        backbone.encode_text(TEXTS),
        torch.randn(2, *backbone.latent_shape),
        torch.tensor([3, 77]),
    )
    output = backbone.denoise(noisy, timesteps, prompt)
    expected = backbone.denoise(noisy, backbone.sigmas[timesteps].log() / 4, prompt)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, backbone.denoise(noisy, timesteps.float(), prompt), atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_equal_the_pipelines(guidance, backbone, folder):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *backbone.latent_shape)
    how = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 16, "width": 16, "output_type": "pt"}
    expected = pipeline(TEXTS, latents=noise, **how).images
    prompt, negative = backbone.encode_text(TEXTS), backbone.encode_text([""], negative=True)
    with torch.no_grad():
        plain = backbone.decode(backbone.sample(prompt, negative, noise, 4, guidance)) / 2 + 0.5
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=0)
    tracked = backbone.decode(backbone.sample(prompt.requires_grad_(), negative, noise, 4, guidance, 4)) / 2 + 0.5
    torch.testing.assert_close(tracked, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.02


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_prediction_after_two_calls_equals_the_schedulers(guidance, backbone, folder):
    """Compare with diffusers' loop up to the second of four calls and its `precondition_outputs`."""
    prompt, negative = backbone.encode_text(TEXTS), backbone.encode_text([""], negative=True).expand(2, -1, -1)
    scheduler = type(backbone.scheduler).from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    noise = torch.randn(2, *backbone.latent_shape)
    latents = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps[:2]):
            noisy_input = scheduler.scale_model_input(latents, t)
            output = backbone.denoise(noisy_input, t.expand(2), prompt)
            if guidance > 1:
                empty = backbone.denoise(noisy_input, t.expand(2), negative)
                output = empty + guidance * (output - empty)
            if i == 1:
                expected = scheduler.precondition_outputs(latents, output, scheduler.sigmas[1])
            latents = scheduler.step(output, t, latents).prev_sample
        actual = backbone.sample(prompt, negative, noise, 4, guidance, stop=2)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop", [None, 2])
def test_gradient_through_all_calls_equals_finite_differences(stop, backbone):
    backbone.double()
    noise, weight = torch.randn(2, 1, *backbone.latent_shape, dtype=torch.float64)
    prompt, negative = backbone.encode_text(TEXTS[:1]), backbone.encode_text([""], negative=True)

    def value(x):
        return (backbone.sample(x, negative, noise, 3, 3.0, 3, stop) * weight).sum()

    (gradient,) = torch.autograd.grad(value(prompt.requires_grad_()), prompt)
    direction, eps = torch.randn_like(prompt) * prompt.std(), 1e-2
    with torch.no_grad():
        slope = (value(prompt + eps * direction) - value(prompt - eps * direction)) / (2 * eps)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-2)


def test_methods_run_on_an_edm_model(tmp_path):
    """An inverter, which adds noise, and methods that sample images, to the end and with the shortcut."""
    folder = families.save_with_clip("playground", tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    how = {"backbone": load_backbone(folder, image_size=16), "sampler": SamplerSettings(3), "device": "cpu"}
    inverted = invert(
        tmp_path / "p.png", method="ph2p", steps=3, num_noise_samples=2, num_validation_samples=4, num_tokens=2, **how
    )
    assert inverted.prompt
    assert (
        0 < inverted.record.validation_loss < 2
    )  # with a target of variance 1 at most, since these latents vary little
    moved = metric_guidance("a red cat", Sharpness(), steps=3, seeds=2, unconditional=True, **how)
    assert moved.record.validation_loss <= moved.record.initial_validation_loss
    assert moved.negative_prompt_embeds.isfinite().all()
    better = dpo_diff("a red cat", budget=4, population=2, seeds=1, gradient_share=0.5, schedule="fix-1", **how)
    assert better.details.candidates
