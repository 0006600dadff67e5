import pytest
import torch

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 in diffusers


@pytest.fixture
def backbone(sd):
    return load_backbone(str(sd))


def inputs(backbone, height=8, width=8):
    """Noisy latents, timesteps and prompts of different lengths."""
    text_encoder = backbone.text_encoders[0]
    ids = encode_text(text_encoder.tokenizer, ["a red square", "", "two dogs and a cat"], text_encoder.length)
    return torch.randn(3, 4, height, width), torch.tensor([100, 500, 900]), backbone.encode(ids)


def hooks(backbone):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in backbone.modules())


@torch.no_grad()
def slow_attention_maps(backbone, noisy, timesteps, prompt_embeds):
    """Compute softmax(q k' / sqrt(d)) from the inputs of each layer, one layer, row, head and location at a time."""
    layers = [
        block.attn2
        for stage in (*backbone.denoiser.down_blocks, backbone.denoiser.mid_block, *backbone.denoiser.up_blocks)
        for attention in getattr(stage, "attentions", ())
        for block in attention.transformer_blocks
    ]
    seen = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: seen.update({layer: (args[0], kwargs["encoder_hidden_states"])}),
            with_kwargs=True,
        )
        for layer in layers
    ]
    backbone.denoise(noisy, timesteps, prompt_embeds)
    for handle in handles:
        handle.remove()
    maps = []
    for layer in layers:
        hidden, prompt_embeds = seen[layer]
        heads, side = layer.heads, round(hidden.shape[1] ** 0.5)
        probabilities = torch.zeros(len(hidden), prompt_embeds.shape[1], side, side)
        for row in range(len(hidden)):
            queries, keys = hidden[row] @ layer.to_q.weight.T, prompt_embeds[row] @ layer.to_k.weight.T
            size = queries.shape[1] // heads
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                for location in range(side * side):
                    scores = keys[:, part] @ queries[location, part] / size**0.5
                    weights = scores.exp() / scores.exp().sum()
                    probabilities[row, :, location // side, location % side] += weights / heads
        maps.append(torch.nn.functional.interpolate(probabilities, noisy.shape[-2:], mode="bilinear"))
    return sum(maps) / len(maps)


def test_maps_equal_a_slow_reference(backbone):
    maps = backbone.attention_maps(*(given := inputs(backbone)))
    assert maps.shape == (3, 32, 8, 8)
    torch.testing.assert_close(maps, slow_attention_maps(backbone, *given), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (12, 6)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probabilities_at_a_location_sum_to_one(sd, dtype, height, width):
    backbone = load_backbone(str(sd), dtype=dtype)
    maps = backbone.attention_maps(*inputs(backbone, height, width))
    assert maps.shape == (3, 32, height, width)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert maps.amin() >= 0
    torch.testing.assert_close(maps.sum(1), torch.ones(3, height, width))


def test_half_precision_is_close_to_full_precision(sd):
    full, half = load_backbone(str(sd)), load_backbone(str(sd), dtype="bfloat16")
    given = inputs(full)
    torch.testing.assert_close(half.attention_maps(*given), full.attention_maps(*given), atol=2e-3, rtol=0.05)


def test_maps_of_a_batch_equal_those_of_its_parts(backbone):
    noisy, timesteps, prompt_embeds = inputs(backbone)
    together = backbone.attention_maps(noisy, timesteps, prompt_embeds)
    for row in (slice(0, 1), slice(1, 3)):
        alone = backbone.attention_maps(noisy[row], timesteps[row], prompt_embeds[row])
        torch.testing.assert_close(alone, together[row], atol=1e-6, rtol=1e-4)


def test_recording_maps_changes_nothing_else(backbone, monkeypatch):
    given, outputs = inputs(backbone), []
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    expected, count = backbone.denoise(*given), hooks(backbone)
    denoise = backbone.denoise
    monkeypatch.setattr(backbone, "denoise", lambda *args: outputs.append(denoise(*args)))
    backbone.attention_maps(*given)
    assert torch.equal(outputs[0], expected)  # while maps are recorded
    assert torch.equal(denoise(*given), expected)
    assert hooks(backbone) == count
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_hooks_are_removed_after_an_exception(backbone):
    noisy, timesteps, prompt_embeds = inputs(backbone)
    count = hooks(backbone)
    with pytest.raises(RuntimeError):
        backbone.attention_maps(noisy[:, :3], timesteps, prompt_embeds)
    assert hooks(backbone) == count
