import inspect
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import families
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lightning_prompts.backbones import Backbone, TextEncoder, load_backbone, repeat
from lightning_prompts.errors import UserError
from lightning_prompts.sampling import Microbatch, Sampler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 in diffusers

TEXTS = ["a red square on a blue background", "", "two dogs and a cat " * 8]
DETERMINISTIC = ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LMSDiscrete", "HeunDiscrete", "UniPCMultistep"]
STOCHASTIC = ["EulerAncestralDiscrete", "DDPM", "LCM"]


@pytest.fixture
def backbone(sd):
    return load_backbone(str(sd))


@pytest.fixture
def copy(sd1, tmp_path):
    """Copy the folder, so that a test may damage it."""
    return Path(shutil.copytree(sd1, tmp_path / "copy"))


def tokens(backbone, texts=TEXTS):
    text_encoder = backbone.text_encoders[0]
    return text_encoder.tokenizer(
        texts, padding="max_length", truncation=True, max_length=text_encoder.length, return_tensors="pt"
    ).input_ids


def prompts(backbone, count):
    """Encode `count` prompts and the empty one."""
    words = ["red", "blue", "cat", "dog"][:count]
    return backbone.encode(tokens(backbone, words)), backbone.encode(tokens(backbone, [""]))


def use(backbone, sampler):
    """Return another sampler with the same noise schedule, configured as usual for Stable Diffusion."""
    scheduler = getattr(diffusers, f"{sampler}Scheduler")
    known = inspect.signature(scheduler).parameters
    settings = {"clip_sample": False, "skip_prk_steps": True}
    backbone.scheduler = scheduler.from_config(
        backbone.scheduler.config, **{key: value for key, value in settings.items() if key in known}
    )


def directional(function, x, direction, eps):
    with torch.no_grad():
        return (function(x + eps * direction) - function(x - eps * direction)).item() / (2 * eps)


# Text encoder


def test_passing_the_tokens_embeddings_changes_nothing(backbone):
    text_encoder, ids = backbone.text_encoders[0], tokens(backbone)
    hidden, pooled = text_encoder(ids)
    hidden_again, pooled_again = text_encoder(ids, text_encoder.table[ids])
    assert torch.equal(hidden, hidden_again)
    assert torch.equal(pooled, pooled_again)
    assert not torch.equal(hidden, text_encoder(ids, text_encoder.table[ids.roll(1, 0)])[0])


def test_pooled_output_depends_on_the_ids(backbone):
    text_encoder, ids = backbone.text_encoders[0], tokens(backbone)
    embeddings = text_encoder.table[ids[:1]]
    hidden, pooled = text_encoder(ids[:1], embeddings)
    hidden_shorter, pooled_shorter = text_encoder(ids[1:2], embeddings)
    assert torch.equal(hidden, hidden_shorter)
    assert not torch.allclose(pooled, pooled_shorter)


def test_gradient_to_embeddings_equals_finite_differences(backbone):
    backbone.double()
    ids = tokens(backbone)
    weight = torch.randn(backbone.encode(ids).shape, dtype=torch.float64)

    def function(embeddings):
        return (backbone.encode(ids, embeddings) * weight).sum()

    x = backbone.text_encoders[0].encoder.get_input_embeddings().weight.detach()[ids].requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    direction = torch.randn_like(x) * x.std()
    assert (gradient * direction).sum().item() == pytest.approx(directional(function, x, direction, 1e-5), rel=1e-7)


def test_hook_is_removed_after_an_exception(backbone):
    text_encoder, ids = backbone.text_encoders[0], tokens(backbone)
    before = text_encoder(ids)[0]
    with pytest.raises(RuntimeError):
        text_encoder(ids, text_encoder.table[ids][:, :-1])
    assert torch.equal(text_encoder(ids)[0], before)


def test_length_is_the_smaller_of_tokenizers_and_encoders(backbone):
    text_encoder = backbone.text_encoders[0]
    assert text_encoder.length == 32
    text_encoder.tokenizer.model_max_length = 20
    assert text_encoder.length == 20
    text_encoder.tokenizer.model_max_length = int(1e30)
    assert text_encoder.length == 32


def test_half_precision_backbone_takes_and_returns_float32(sd):
    backbone = load_backbone(str(sd), dtype="bfloat16")
    text_encoder, ids = backbone.text_encoders[0], tokens(backbone)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert text_encoder.table.dtype == backbone.alphas_cumprod.dtype == torch.float32
    embeddings = text_encoder.table[ids].requires_grad_()
    prompt_embeds = backbone.encode(ids, embeddings)
    assert torch.equal(prompt_embeds, backbone.encode(ids))
    latents = backbone.sample(
        prompt_embeds, prompt_embeds[1:2], torch.randn(3, *backbone.latent_shape), 2, grad_steps=1
    )
    images = backbone.decode(latents)
    full = prompt_embeds.float()
    assert backbone.denoise(latents, torch.tensor([1, 2, 3]), full).dtype == torch.float32
    assert latents.dtype == images.dtype == backbone.encode_image(images).dtype == torch.float32
    images.sum().backward()
    assert embeddings.grad.dtype == torch.float32
    assert embeddings.grad.abs().sum() > 0


def test_encoded_prompts_equal_the_pipelines(backbone, sd):
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    expected, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(backbone.encode(tokens(backbone)), expected)


def test_repeat_equals_repeat_interleave():
    x = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    assert torch.equal(repeat(x, 3), x.repeat_interleave(3, 0))
    repeat(x, 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


# Frozen


def test_backbone_stays_frozen_in_training_mode(backbone):
    torch.nn.ModuleList([backbone]).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert "alphas_cumprod" not in backbone.state_dict()


def test_sizes_are_those_of_the_model(backbone):
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.image_size == 16
    assert backbone.num_train_timesteps == 1000
    assert isinstance(backbone.text_encoders[0], TextEncoder)


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_latent_size_is_that_of_the_autoencoder(blocks, backbone):
    sides = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    vae = AutoencoderKL(block_out_channels=(8,) * blocks, norm_num_groups=8, latent_channels=4, **sides)
    parts = "other", list(backbone.text_encoders), backbone.denoiser, vae, backbone.scheduler
    other = type(backbone)(*parts, image_size=32)
    assert other.encode_image(torch.zeros(1, 3, 32, 32)).shape[1:] == other.latent_shape
    assert type(backbone)(*parts).image_size == other.decode(torch.zeros(1, 4, 8, 8)).shape[-1]


def test_prediction_type_is_read(sd1, sd2):
    assert load_backbone(str(sd1)).prediction_type == "epsilon"
    assert load_backbone(str(sd2)).prediction_type == "v_prediction"


# Noise


def test_noise_level_is_interpolated_between_timesteps(backbone):
    """Sigma is interpolated linearly, as in the samplers, also between the last two timesteps."""
    latents, noise = torch.ones(1, *backbone.latent_shape), torch.zeros(1, *backbone.latent_shape)
    alphas = backbone.scheduler.alphas_cumprod
    sigmas = (1 / alphas - 1).sqrt()
    last = len(alphas) - 1
    for t in (0.25, 500.5, last - 0.75, float(last)):
        low = int(t)
        sigma = torch.lerp(sigmas[low], sigmas[min(low + 1, last)], t - low)
        saved_before = backbone.add_noise(latents, noise, torch.tensor([t])).mean()
        assert float(saved_before) == pytest.approx(float((1 + sigma**2).rsqrt()), rel=1e-5)


def test_added_noise_equals_the_schedulers(backbone):
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(
        backbone.add_noise(latents, noise, timesteps), backbone.scheduler.add_noise(latents, noise, timesteps)
    )


def test_predict_x0_inverts_the_target(backbone):
    backbone.double()
    latents, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 10, 500, 999])
    noisy, target = backbone.add_noise(latents, noise, timesteps), backbone.target(latents, noise, timesteps)
    torch.testing.assert_close(backbone.predict_x0(noisy, target, timesteps), latents)
    wrong = backbone.predict_x0(noisy, target + 0.1, timesteps)
    assert (wrong - latents).abs().amin() > 1e-4


def test_target_equals_the_schedulers(sd2):
    backbone = load_backbone(str(sd2))
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([3, 300, 900])
    expected = backbone.scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(backbone.target(latents, noise, timesteps), expected)


def test_predicted_x0_equals_the_schedulers(backbone):
    use(backbone, "DDIM")
    scheduler = backbone.scheduler
    scheduler.set_timesteps(10)
    noisy, output, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), scheduler.timesteps[4]
    expected = scheduler.step(output, t, noisy).pred_original_sample
    torch.testing.assert_close(backbone.predict_x0(noisy, output, t.view(1)), expected)


def test_each_row_is_denoised_at_its_timestep(backbone):
    prompt_embeds, _ = prompts(backbone, 2)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    output = backbone.denoise(noisy, timesteps, prompt_embeds)
    for i in range(2):
        alone = backbone.denoiser(noisy[i : i + 1], timesteps[i], prompt_embeds[i : i + 1]).sample
        torch.testing.assert_close(output[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output, backbone.denoise(noisy, timesteps.flip(0), prompt_embeds), atol=1e-4)


def test_no_activations_are_saved_before_the_first_cross_attention():
    backbone, saved_before, graphs = load_backbone("emoji"), [], {}
    blocks = backbone.denoiser.down_blocks
    first = blocks[1].attentions[0]  # of the embedded model, as in Stable Diffusion's one block earlier
    places = {
        "start": backbone.denoiser.conv_in,
        "time": backbone.denoiser.time_embedding,
        "resnet": blocks[0].resnets[0],
        "block": blocks[0].downsamplers[0],
        "before": blocks[1].resnets[0],
        "query": first.transformer_blocks[0].attn2.to_q,
        "key": first.transformer_blocks[0].attn2.to_k,
    }
    for name, module in places.items():
        module.register_forward_hook(lambda _, args, output, name=name: graphs.update({name: output.requires_grad}))
    first.register_forward_pre_hook(lambda *_: saved_before.append(len(saved)))
    saved = []
    prompt_embeds = backbone.encode_text(["cat", "dog"]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = backbone.denoise(torch.randn(2, 4, 16, 16), torch.tensor([600, 900]), prompt_embeds)
    assert graphs == dict.fromkeys(places, False) | {"key": True}
    assert saved_before == [0]
    assert len(saved) > 100
    (slope,) = torch.autograd.grad(output.square().sum(), prompt_embeds)
    assert slope.abs().sum() > 0
    assert all(tensor.grad is None for tensor in backbone.parameters())


def test_memory_format_does_not_change_results(backbone):
    for network in (backbone.denoiser, backbone.vae):
        kernels = [weight for weight in network.parameters() if weight.dim() == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    prompt_embeds, _ = prompts(backbone, 2)
    noisy, t, images = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.rand(2, 3, 16, 16) * 2 - 1
    actual = backbone.denoise(noisy, t, prompt_embeds), backbone.decode(noisy), backbone.encode_image(images)
    backbone.denoiser.to(memory_format=torch.contiguous_format)
    backbone.vae.to(memory_format=torch.contiguous_format)
    expected = backbone.denoise(noisy, t, prompt_embeds), backbone.decode(noisy), backbone.encode_image(images)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_empty_text_is_encoded_once(backbone):
    calls = []
    backbone.text_encoders[0].encoder.register_forward_hook(lambda *_: calls.append(None))
    with torch.inference_mode():
        empty = backbone.encode_text([""])
    assert torch.equal(backbone.encode_text([""]), empty)
    assert not empty.is_inference()
    assert len(calls) == 1
    torch.testing.assert_close(backbone.encode_text(["", "cat"])[:1], empty)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(backbone.encode_text([""]), empty)
    assert torch.equal(backbone.encode_text([""]), empty)
    assert backbone.double().encode_text([""]).dtype == torch.float64


# Images


def test_encoded_and_decoded_images_equal_the_pipelines(backbone, sd):
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = backbone.encode_image(images)
    mean = pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(latents, mean * pipeline.vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    assert not latents.requires_grad
    expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode(latents), expected, atol=1e-5, rtol=1e-5)
    assert backbone.decode(1000 * torch.randn(1, 4, 8, 8)).abs().max() <= 1


def test_gradient_of_decode_equals_finite_differences(backbone):
    backbone.double()
    latents = (0.1 * torch.randn(1, 4, 8, 8, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(1, 3, 16, 16, dtype=torch.float64)

    def function(latents):
        return (backbone.decode(latents) * weight).sum()

    (gradient,) = torch.autograd.grad(function(latents), latents)
    direction = torch.randn_like(latents)
    expected = directional(function, latents, direction, 1e-6)
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)


# Sampling


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_sampled_latents_equal_the_pipelines(backbone, sd, sampler):
    use(backbone, sampler)
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.scheduler = backbone.scheduler
    pipeline.set_progress_bar_config(disable=True)
    (prompt_embeds, negative), noise = prompts(backbone, 2), torch.randn(2, 4, 8, 8)
    for guidance in (3.0, 1.0):
        expected = pipeline(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=repeat(negative, 2),
            latents=noise,
            num_inference_steps=4,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        latents = backbone.sample(prompt_embeds, negative, noise, steps=4, guidance_scale=guidance)
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_old_scheduler_files_are_corrected_as_by_the_pipeline(sd1, copy):
    """Old files would clip latents and start a timestep early."""
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    backbone, pipeline = load_backbone(str(copy)), StableDiffusionPipeline.from_pretrained(copy)
    prompt_embeds, negative = prompts(backbone, 1)
    noise = torch.randn(1, 4, 8, 8)
    expected = pipeline(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative, latents=noise,
        num_inference_steps=3, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(backbone.sample(prompt_embeds, negative, noise, steps=3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_added_noise_depends_on_the_row_alone(backbone, sampler):
    use(backbone, sampler)
    (prompt_embeds, negative), noise = prompts(backbone, 3), torch.randn(3, 4, 8, 8)
    state = torch.get_rng_state()
    latents = backbone.sample(prompt_embeds, negative, noise, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    alone = backbone.sample(prompt_embeds[1:2], negative, noise[1:2], steps=3)
    torch.testing.assert_close(alone, latents[1:2], atol=1e-4, rtol=1e-4)


def test_added_noise_differs_between_rows(backbone):
    use(backbone, "DDPM")
    prompt_embeds, negative = prompts(backbone, 1)
    noise = torch.randn(1, 4, 8, 8)
    latents = backbone.sample(
        repeat(prompt_embeds, 2), negative, torch.cat([noise, noise + 1e-6]), steps=3, guidance_scale=1
    )
    assert (latents[0] - latents[1]).abs().max() > 0.01


def test_each_row_may_have_its_own_negative_prompt(backbone):
    (prompt_embeds, negative), noise = prompts(backbone, 2), torch.randn(2, 4, 8, 8)
    one = backbone.sample(prompt_embeds, negative, noise, steps=3)
    torch.testing.assert_close(backbone.sample(prompt_embeds, repeat(negative, 2), noise, steps=3), one)
    other = backbone.sample(prompt_embeds, torch.cat([negative, prompt_embeds[:1]]), noise, steps=3)
    torch.testing.assert_close(other[:1], one[:1])
    assert not torch.allclose(other[1:], one[1:], atol=1e-3)


@pytest.mark.parametrize(("guidance", "rows"), [(7.5, 4), (1.0, 2), (0.0, 2)])
def test_no_guidance_skips_the_unconditional_half(backbone, monkeypatch, guidance, rows):
    calls, denoise = [], backbone.denoise
    monkeypatch.setattr(
        backbone, "denoise", lambda x, t, *rest: (calls.append((len(x), t.shape)), denoise(x, t, *rest))[1]
    )
    use(backbone, "DDIM")
    backbone.sample(*prompts(backbone, 2), torch.randn(2, 4, 8, 8), steps=3, guidance_scale=guidance)
    assert calls == [(rows, (rows,))] * 3


@pytest.mark.parametrize("sampler", ["DDIM", "PNDM"])
def test_gradient_of_sampling_equals_finite_differences(backbone, sampler):
    use(backbone, sampler)
    backbone.double()
    prompt_embeds, negative = prompts(backbone, 2)
    noise, weight = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)

    def function(embeds, grad_steps=0):
        return (backbone.sample(embeds, negative, noise, 3, 3.0, grad_steps) * weight).sum()

    x = prompt_embeds.requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, grad_steps=3), x)
    direction = torch.randn_like(x)
    expected = directional(function, x, direction, 1e-5)
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)


def test_as_many_steps_as_noise_levels_are_the_most(backbone):
    use(backbone, "DDIM")
    assert backbone.calls(1000) == 1000
    with pytest.raises(UserError, match=r"cannot be sampled in 1001 steps, .* has 1000 noise levels"):
        backbone.calls(1001)


def test_gradient_of_one_step_is_that_of_the_last(backbone, monkeypatch):
    use(backbone, "DDIM")
    prompt_embeds, negative = prompts(backbone, 2)
    noise, x = torch.randn(2, 4, 8, 8), prompt_embeds.requires_grad_()

    def gradient(grad_steps):
        return torch.autograd.grad(backbone.sample(x, negative, noise, 3, 3.0, grad_steps).sum(), x)[0]

    assert not backbone.sample(x, negative, noise, 3).requires_grad
    last, everything = gradient(1), gradient(3)
    assert not torch.allclose(last, everything, rtol=0.01)
    denoise = backbone.denoise

    def constant_before_the_last(noisy, t, *prompt_embeds):
        output = denoise(noisy, t, *prompt_embeds)
        return output if t[0] == 1 else output.detach()

    monkeypatch.setattr(backbone, "denoise", constant_before_the_last)
    torch.testing.assert_close(gradient(3), last)


def test_gradient_steps_repeat_the_denoiser_calls_instead_of_saving_activations(backbone, monkeypatch):
    use(backbone, "DPMSolverMultistep")
    prompt_embeds, negative = prompts(backbone, 1)
    calls, steps, denoise, step = [], [], backbone.denoise, type(backbone.scheduler).step
    monkeypatch.setattr(backbone, "denoise", lambda *args: (calls.append(0), denoise(*args))[1])
    monkeypatch.setattr(
        type(backbone.scheduler), "step", lambda *args, **kwargs: (steps.append(0), step(*args, **kwargs))[1]
    )
    x = prompt_embeds.requires_grad_()
    latents = backbone.sample(x, negative, torch.randn(1, 4, 8, 8), steps=5, grad_steps=2)
    assert (len(calls), len(steps)) == (5, 5)
    latents.sum().backward()
    assert (len(calls), len(steps)) == (7, 5)
    assert backbone.scheduler.num_inference_steps is None  # the graph is freed after the call


@pytest.mark.parametrize("sampler", ["PNDM", "DDIM", "HeunDiscrete", "LMSDiscrete"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_cost_counts_the_denoiser_calls(sampler, guidance, backbone, monkeypatch):
    use(backbone, sampler)
    rows, denoise = [], backbone.denoise
    monkeypatch.setattr(backbone, "denoise", lambda noisy, *args: (rows.append(len(noisy)), denoise(noisy, *args))[1])
    backbone.sample(*prompts(backbone, 1), torch.randn(1, 4, 8, 8), steps=5, guidance_scale=guidance)
    assert Sampler(backbone, 5, guidance, Microbatch(1)).cost() == sum(rows)


def test_sampling_without_gradient_tracks_none(backbone):
    prompt_embeds, negative = prompts(backbone, 1)
    prompt_embeds.requires_grad_()
    with torch.no_grad():
        latents = backbone.sample(prompt_embeds, negative, torch.randn(1, 4, 8, 8), 2, guidance_scale=1, grad_steps=2)
    assert not latents.requires_grad


# Loading


def test_text_encoder_is_float32_even_if_its_file_is_half(sd1, tmp_path):
    StableDiffusionPipeline.from_pretrained(sd1).to(torch.float16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["dtype"] == "float16"
    backbone, original = load_backbone(str(tmp_path)), load_backbone(str(sd1))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert torch.equal(backbone.text_encoders[0].table, original.text_encoders[0].table.half().float())


def test_old_file_layouts_are_read(sd1, copy):
    """Weights named `text_model.`, stored positions, and vocab.json with merges.txt are read."""
    before = {path.name for path in (copy / "tokenizer").iterdir()}
    families.tokenizer_of_captions().save_pretrained(copy / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    assert {path.name for path in (copy / "tokenizer").iterdir()} - before >= {"tokenizer.json"}
    file = copy / "text_encoder/model.safetensors"
    weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(32).view(1, -1)
    save_file(weights, file, metadata={"format": "pt"})
    backbone, expected = load_backbone(str(copy)), load_backbone(str(sd1))
    ids = tokens(backbone, [*TEXTS, "a café, 2 REDs"])
    assert torch.equal(ids, tokens(expected, [*TEXTS, "a café, 2 REDs"]))
    assert torch.equal(backbone.encode(ids), expected.encode(ids))


def test_loading_is_quiet_and_restores_the_libraries_settings(copy, caplog, capfd):
    weights = load_file(copy / "text_encoder/model.safetensors")
    save_file({**weights, "unused": torch.zeros(1)}, copy / "text_encoder/model.safetensors", metadata={"format": "pt"})
    libraries = diffusers.logging, transformers.logging
    for library in libraries:
        library.set_verbosity_info()
        library.add_handler(caplog.handler)
    try:
        load_backbone(str(copy))
        assert caplog.records == []
        assert capfd.readouterr() == ("", "")
        assert [library.get_verbosity() for library in libraries] == [logging.INFO] * 2
        assert all(library.is_progress_bar_enabled() for library in libraries)
    finally:
        for library in libraries:
            library.set_verbosity_warning()
            library.get_logger().removeHandler(caplog.handler)


def test_importing_loads_neither_diffusers_nor_transformers():
    code = "import sys, lightning_prompts.backbones; sys.exit(bool({'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write(folder, path, text):
    (folder / path).write_text(text)


def edit_index(folder, **entries):
    write(folder, "model_index.json", json.dumps({**json.loads((folder / "model_index.json").read_text()), **entries}))


def pickles(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def drop_weight(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file, metadata={"format": "pt"})


def predict(folder, what):
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": what}))


DAMAGED = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"has no model_index\.json; give a folder"),
    "no unet": (lambda f: edit_index(f, unet=None), "has no unet, which every StableDiffusionPipeline needs"),
    "family": (
        lambda f: edit_index(f, _class_name="KandinskyPipeline"),
        "is a KandinskyPipeline; only StableDiffusionPipeline, .*FluxPipeline, .* are supported",
    ),
    "other vae": (
        lambda f: edit_index(f, vae=["diffusers", "AutoencoderTiny"]),
        r"vae .* is a AutoencoderTiny; only AutoencoderKL",
    ),
    "scheduler": (
        lambda f: edit_index(f, scheduler=["diffusers", "FancyScheduler"]),
        r"FancyScheduler.*save the model again",
    ),
    "no scheduler": (lambda f: edit_index(f, scheduler=["diffusers", "AutoencoderKL"]), r"is not a scheduler"),
    "pickles": (pickles, r"unet/diffusion_pytorch_model\.safetensors, and pickle.* refused.*safe_serialization=True"),
    "missing weight": (drop_weight, r"The unet of .* lacks weights such as conv_in\.bias, 1 in all"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"neither tokenizer\.json nor vocab\.json"),
    "predicts x0": (
        lambda f: predict(f, "sample"),
        "a scheduler for 'sample', and its family predicts 'epsilon' or 'v_prediction'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders_are_refused(copy, case):
    damage, message = DAMAGED[case]
    damage(copy)
    families.assert_refused(message, copy)


@pytest.mark.parametrize("name", ["stable-diffusion", "./missing", "/no/such/folder", "a/b/c", "~nobody/model"])
def test_unknown_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.assert_refused(r"neither 'emoji' nor an existing folder nor .* 'owner/name'", name)


def test_emoji_is_the_packaged_folder(sd1, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prompts.backbones.hub.EMOJI", sd1)
    assert load_backbone("emoji").name == "emoji"
    monkeypatch.setattr("lightning_prompts.backbones.hub.EMOJI", tmp_path / "missing")
    with pytest.raises(UserError, match=r"embedded model 'emoji' is not in .*missing"):
        load_backbone("emoji")


def test_backbone_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Backbone("x", [], torch.nn.Identity(), torch.nn.Identity(), None)
