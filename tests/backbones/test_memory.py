"""Results do not change with settings that save memory."""

import families
import pytest
import torch

from lightning_prompts.backbones import load_backbone, save_memory
from lightning_prompts.backbones.memory import OffloadedModule
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.objectives import Denoising
from lightning_prompts.sampling import Microbatch


@pytest.fixture(scope="module", params=families.BUILD)
def folder(request, tmp_path_factory):
    """Save a family and return its folder."""
    return str(families.save(request.param, tmp_path_factory.mktemp(request.param)))


def losses_and_gradients(backbone):
    """Compute a loss through text encoders and denoiser, one through denoiser and decoder, and their gradients.

    Also return images, and the latents that they are encoded to.
    """
    torch.manual_seed(0)
    vocabulary, shape = backbone.vocabulary, backbone.latent_shape
    ids = encode_text(vocabulary.tokenizer, ["a red cat", "two dogs"], vocabulary.length)
    embeddings = vocabulary.table[ids].clone().requires_grad_()
    noise, latents = torch.randn(2, 2, 2, *shape)
    prompt_embeds = backbone.encode(ids, embeddings)
    losses = Denoising(Microbatch(3))(backbone, prompt_embeds, latents, torch.tensor([[1, 999], [500, 300]]), noise)
    gradients = torch.autograd.grad(losses.sum(), embeddings)
    embeds = prompt_embeds.detach().requires_grad_()
    images = backbone.decode(backbone.sample(embeds, embeds.detach().flip(0), noise[:, 0], 2, 3.0, grad_steps=2))
    gradients += torch.autograd.grad(images.square().sum(), embeds)
    return *gradients, losses.detach(), images.detach(), backbone.encode_image(images.detach())


@pytest.mark.parametrize(
    "how",
    [["cpu_offload"], ["gradient_checkpointing"], ["gradient_checkpointing", "cpu_offload"]],
    ids=["offload", "checkpointing", "both"],
)
def test_saving_memory_does_not_change_results(folder, how, monkeypatch):
    """Weights that are unloaded become NaN, so that any computation with them would be noticed.

    Embedding tables are left alone, because they are looked up where they are.
    """
    loaded, tables = set(), set()

    def load(module, device):
        loaded.add(id(module))
        assert len(loaded) == 1
        for tensor, data in module.weights:
            tensor.data = data

    def unload(module):
        loaded.discard(id(module))
        for tensor, data in module.weights:
            if data.is_floating_point() and id(tensor) not in tables:
                tensor.data = torch.full_like(data, torch.nan)

    expected = losses_and_gradients(load_backbone(folder, image_size=16))
    monkeypatch.setattr(OffloadedModule, "load", load)
    monkeypatch.setattr(OffloadedModule, "unload", unload)
    backbone = load_backbone(folder, image_size=16)
    tables |= {id(text_encoder.encoder.get_input_embeddings().weight) for text_encoder in backbone.text_encoders}
    save_memory(backbone, how)
    for a, b in zip(losses_and_gradients(backbone), expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(loaded) == (1 if "cpu_offload" in how else 0)


def test_offloaded_networks_do_not_move_with_their_parent(sd1):
    """Only the small tensors of an offloaded model move with its parent module."""
    backbone = load_backbone(str(sd1))
    save_memory(backbone, ["cpu_offload"])
    weights = {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()}
    holder = torch.nn.ModuleList([backbone]).to("meta")
    assert holder[0].device == torch.device("meta")
    assert {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()} == weights


def test_gradient_checkpointing_halves_the_saved_activations(sd1):
    def saved_numbers(backbone):
        """Count the numbers that a denoiser call saves for its backward pass, without the weights."""
        ids = {parameter.data_ptr() for parameter in backbone.parameters()}
        numbers = {}

        def pack(tensor):
            if tensor.data_ptr() not in ids:
                numbers[tensor.data_ptr()] = tensor.numel()
            return tensor

        prompt_embeds = backbone.encode_text(["a red cat"]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone.denoise(torch.randn(1, *backbone.latent_shape), torch.tensor([500]), prompt_embeds)
        return sum(numbers.values())

    backbone = load_backbone(str(sd1))
    plain = saved_numbers(backbone)
    save_memory(backbone, ["gradient_checkpointing"])
    assert saved_numbers(backbone) < plain / 2


def test_tiled_decoding_is_close_to_decoding_the_whole(sd1):
    backbone = load_backbone(str(sd1), image_size=48)
    latents = torch.randn(1, *backbone.latent_shape)
    whole = backbone.decode(latents)
    save_memory(backbone, ["vae_tiling"])
    tiles = []
    decoder = backbone.vae.decoder
    decoder.register_forward_hook(lambda module, args, output: tiles.append(output.shape[-1]))
    images = backbone.decode(latents)
    assert images.shape == whole.shape
    assert len(tiles) > 1
    assert max(tiles) < 48
    assert (images - whole).abs().mean() < 0.3 * whole.std()
