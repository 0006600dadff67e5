"""Replaced schedulers, compared with diffusers' `from_config` and with pipelines that use them."""

import diffusers
import families
import pytest
import torch
from families import assert_refused, edit

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.sampling_loop import generators_of, new_scheduler
from lightning_prompts.backbones.schedulers import EXCHANGEABLE

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["a red square on a blue background", "two dogs and a Cat"]
OWN = {  # as published, with only the stated values
    "sd15": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd21": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "trailing": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "multistep": {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "use_karras_sigmas": True,
    },
}


def with_scheduler(folder, config):
    """Replace the scheduler in a model's folder."""
    kind = config["_class_name"]
    edit(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", kind]))
    edit(folder / "scheduler/scheduler_config.json", lambda old: (old.clear(), old.update(config)))
    return str(folder)


CASES = [("sd1", "sd15"), ("sdxl", "sd21"), ("sd1", "trailing"), ("sd1", "multistep")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """Save a family; return its folder and diffusers' pipeline."""
    family, own = request.param
    folder = with_scheduler(families.save(family, tmp_path_factory.mktemp(family)), OWN[own])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline, pipeline.scheduler


def images_of(backbone, pipeline, steps=3, guidance=3.0):
    """Sample images (2, 3, H, W) in [0, 1] with both."""
    noise = torch.randn(2, *backbone.latent_shape)
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 16, "width": 16, "output_type": "pt"}
    theirs = pipeline(TEXTS, latents=noise, generator=generators_of(noise), **how).images
    with torch.no_grad():
        prompt, negative = backbone.encode_text(TEXTS), backbone.encode_text([""], negative=True)
        return backbone.decode(backbone.sample(prompt, negative, noise, steps, guidance)) / 2 + 0.5, theirs


PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")


@pytest.mark.parametrize("name", EXCHANGEABLE[""])
def test_replaced_scheduler_equals_that_of_from_config(name, case):
    folder, pipeline, own = case
    expected = getattr(diffusers, name).from_config(own.config)
    if not torch.allclose(
        own.alphas_cumprod, expected.alphas_cumprod, atol=1e-6
    ):  # it does not support zero terminal SNR
        assert own.config.get("rescale_betas_zero_snr")
        assert_refused(f"{name}' would change the noise levels or the prediction type", folder, scheduler=name)
        return
    backbone = load_backbone(folder, scheduler=name, image_size=16)
    config = dict(expected.config)
    if "clip_sample" in config:
        assert not own.config.get("clip_sample")
        config["clip_sample"] = False
    actual = {key: value for key, value in backbone.scheduler.config.items() if key not in PRIVATE}
    assert actual == {key: value for key, value in config.items() if key not in PRIVATE}
    assert type(backbone.scheduler) is type(expected)
    pipeline.scheduler = getattr(diffusers, name).from_config(
        own.config, **({"clip_sample": False} if "clip_sample" in config else {})
    )
    ours, theirs = images_of(backbone, pipeline, steps=5)
    pipeline.scheduler = own
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_default_scheduler_equals_the_pipelines(case):
    folder, pipeline, own = case
    backbone = load_backbone(folder, image_size=16)
    actual, expected = ({k: v for k, v in x.config.items() if k not in PRIVATE} for x in (backbone.scheduler, own))
    assert actual == expected
    torch.testing.assert_close(*images_of(backbone, pipeline), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "pixart"])
def test_missing_scheduler_keys_have_the_pipelines_values(kind, family, tmp_path):
    """Stable Diffusion's pipeline corrects `clip_sample` and `steps_offset`; other pipelines do not."""
    folder = with_scheduler(families.save(family, tmp_path), {"_class_name": kind})
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    backbone = load_backbone(folder, image_size=16)
    actual, expected = (
        {k: v for k, v in x.config.items() if k not in PRIVATE} for x in (backbone.scheduler, pipeline.scheduler)
    )
    assert actual == expected
    if family == "pixart":
        return
    ours, theirs = images_of(backbone, pipeline, steps=5)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LCMScheduler", "EulerDiscreteScheduler"])
def test_replaced_scheduler_keeps_the_noise_levels(name, tmp_path):
    """DDIM's default noise levels differ from those of Heun and LCM."""
    folder = with_scheduler(families.save("sd1", tmp_path), {"_class_name": "DDIMScheduler"})
    own, other = load_backbone(folder).scheduler, load_backbone(folder, scheduler=name).scheduler
    assert own.config.beta_end == other.config.beta_end == 0.02
    torch.testing.assert_close(other.alphas_cumprod, own.alphas_cumprod)


def test_clipping_is_kept_where_the_model_enables_it(tmp_path):
    config = {"_class_name": "DDIMScheduler", "clip_sample": True, "thresholding": False}
    folder = with_scheduler(families.save("sdxl", tmp_path), config)
    assert load_backbone(folder, scheduler="DDPMScheduler", image_size=16).scheduler.config.clip_sample
    config = {"_class_name": "DDPMScheduler", "clip_sample": False, "thresholding": True}
    with_scheduler(tmp_path / "model", config)
    other = load_backbone(folder, scheduler="DDIMScheduler", image_size=16).scheduler.config
    assert (other.clip_sample, other.thresholding) == (False, True)


def test_default_steps_and_guidance_do_not_depend_on_the_scheduler(tmp_path):
    """A Turbo model samples in one step with any scheduler; other models do not."""
    folder = str(families.save("sd-turbo", tmp_path / "turbo"))
    backbone = load_backbone(folder, scheduler="DDIMScheduler")
    assert (backbone.default_steps, backbone.default_guidance) == (1, 1.0)
    folder = with_scheduler(
        families.save("sd1", tmp_path / "sd1"), {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    )
    backbone = load_backbone(folder, scheduler="EulerDiscreteScheduler")
    assert backbone.scheduler.config.timestep_spacing == "trailing"
    assert (backbone.default_steps, backbone.default_guidance) == (50, 7.5)
    backbone = load_backbone(folder, scheduler="LCMScheduler")
    assert (backbone.default_steps, backbone.default_guidance) == (4, 1.0)
    velocity = {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    backbone = load_backbone(with_scheduler(families.save("sd1", tmp_path / "velocity"), velocity))
    assert (backbone.default_steps, backbone.default_guidance) == (50, 7.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "noise levels of this EulerDiscreteScheduler are not",
        ),
        (
            {"_class_name": "CMStochasticIterativeScheduler"},
            "noise levels of this CMStochasticIterativeScheduler are not supported",
        ),
    ],
)
def test_unsupported_noise_levels_are_refused(config, message, tmp_path):
    assert_refused(message, with_scheduler(families.save("sd1", tmp_path), config))


@pytest.mark.parametrize(
    "name", ["DDIMInverseScheduler", "EDMEulerScheduler", "RePaintScheduler", "DPMSolverSDEScheduler"]
)
def test_unsuitable_schedulers_are_refused(name, tmp_path):
    assert_refused(f"The scheduler '{name}' does not fit this model", families.save("sd1", tmp_path), scheduler=name)


def test_scheduler_without_a_shift_by_image_size_is_refused(tmp_path):
    """Heun's scheduler lacks this shift; FLUX's pipeline would raise an error."""
    name = "FlowMatchHeunDiscreteScheduler"
    message = f"The scheduler '{name}' does not fit this model, .*; use one of FlowMatchEulerDiscreteScheduler.$"
    assert_refused(message, families.save("flux", tmp_path), scheduler=name)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predict_x0_between_training_timesteps_equals_the_schedulers(name, prediction, tmp_path):
    """Some samplers step between training timesteps; compare with their own prediction."""
    config = {"_class_name": f"{name}Scheduler", "timestep_spacing": "linspace", "prediction_type": prediction}
    backbone = load_backbone(with_scheduler(families.save("sd1", tmp_path), config))
    scheduler = new_scheduler(backbone, 7)
    assert (scheduler.timesteps % 1 > 0.1).any()
    x, output = torch.randn(2, 7, *backbone.latent_shape)
    for i, t in enumerate(scheduler.timesteps):
        noisy_input = scheduler.scale_model_input(x[i], t)
        expected = scheduler.step(output[i], t, x[i])
        actual = backbone.predict_x0(noisy_input[None], output[i : i + 1], t.view(1))[0]
        torch.testing.assert_close(actual, expected.pred_original_sample, atol=1e-4, rtol=1e-4)
