"""The cost of sampling and scoring images, and their gradients."""

import pytest
import torch

from lightning_prompts.backbones import load_backbone
from lightning_prompts.sampling import Microbatch, Sampler

STEPS = 3


@pytest.fixture(scope="module")
def backbone(tiny):
    return load_backbone(tiny)


@pytest.fixture
def embeds(backbone):
    return torch.stack([backbone.encode_text(["a red cat"]), backbone.encode_text(["two dogs"], negative=True)], dim=1)


def squares(latents, indices):
    return latents.square().flatten(1).mean(1), {"indices": indices}


@pytest.mark.parametrize(("guidance_scale", "factor"), [(1.0, 1), (3.0, 2)])
def test_cost_counts_calls_with_guidance_and_gradients(guidance_scale, factor, backbone):
    sampler = Sampler(backbone, STEPS, guidance_scale, Microbatch(2))
    calls = sampler.calls
    assert sampler.cost() == factor * calls
    assert sampler.cost(grad_steps=2) == factor * (calls + 2)
    assert sampler.cost(calls=1, grad_steps=5) == factor * 2
    assert sampler.cost(calls=2) == factor * 2


@pytest.mark.parametrize("grad_steps", [0, 1])
def test_scores_have_a_gradient_only_with_gradient_steps(grad_steps, backbone, embeds):
    sampler, noise = Sampler(backbone, STEPS, 3.0, Microbatch(1)), torch.randn(1, *backbone.latent_shape)
    prompt_embeds, negative_prompt_embeds = (side.requires_grad_() for side in sampler.split(embeds))
    scores, others = sampler.sample_and_score(prompt_embeds, negative_prompt_embeds, noise, squares, grad_steps)
    assert scores.requires_grad == bool(grad_steps)
    assert others["indices"].tolist() == [0]
    without, _ = sampler.sample_and_score(prompt_embeds, negative_prompt_embeds, noise, squares)
    assert not without.requires_grad
    torch.testing.assert_close(without, scores.detach())
    with torch.no_grad():
        assert not sampler.sample_and_score(prompt_embeds, negative_prompt_embeds, noise, squares, 1)[0].requires_grad


def test_negative_prompt_defaults_to_the_empty_text(backbone, embeds, monkeypatch):
    sampler = Sampler(backbone, STEPS, 3.0, Microbatch(1))
    prompt_embeds, negative_prompt_embeds = sampler.split(embeds, 2)
    assert torch.equal(prompt_embeds, embeds[:, 0].repeat(2, 1, 1))
    assert torch.equal(negative_prompt_embeds, embeds[:, 1].repeat(2, 1, 1))
    encoded, encode_text = [], backbone.encode_text
    monkeypatch.setattr(
        backbone,
        "encode_text",
        lambda texts, negative=False: encoded.append((texts, negative)) or encode_text(texts, negative),
    )
    _, negative_prompt_embeds = sampler.split(embeds[:, :1])
    assert torch.equal(negative_prompt_embeds, encode_text([""], negative=True))
    assert encoded == [([""], True)]


def test_images_and_scores_equal_those_sampled_one_by_one(backbone):
    sampler, texts = Sampler(backbone, STEPS, 3.0, Microbatch(4)), ["a red cat", "two dogs"]
    embeds = torch.stack([backbone.encode_text(texts), backbone.encode_text(["blurry", "dark"])], dim=1)
    noise = torch.randn(2, 3, *backbone.latent_shape)

    def alone(calls=None):
        """Sample the latents of each image in a call of its own."""
        sides = [(embeds[p].unsqueeze(1), noise[p, n][None]) for p in range(2) for n in range(3)]
        return torch.cat([backbone.sample(*both, x, STEPS, 3.0, stop=calls) for both, x in sides])

    images = sampler.generate_from_embeds(embeds, noise)
    with torch.no_grad():
        torch.testing.assert_close(images.flatten(0, 1), backbone.decode(alone()), atol=1e-4, rtol=0)
        for calls in (None, 2):
            scores, _ = sampler.sample_and_score(*sampler.split(embeds, 3), noise.flatten(0, 1), squares, calls=calls)
            expected = alone(calls).square().flatten(1).mean(1)
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
