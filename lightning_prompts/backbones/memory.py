"""Settings by which a frozen model takes less memory and more time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prompts.backbones.base import Backbone

MemorySaving: TypeAlias = Literal["gradient_checkpointing", "vae_tiling", "cpu_offload"]


def save_memory(backbone: Backbone, ways: Collection[MemorySaving]) -> None:
    """Let a model take less memory and more time.

    Args:
        backbone: The model.
        ways: `gradient_checkpointing` recomputes the activations of the denoiser and the decoder in the backward pass;
            `vae_tiling` decodes large images in tiles, which changes them a little where the tiles overlap;
            `cpu_offload` keeps only one of the text encoders, the denoiser and the autoencoder on the device at a time.
    """
    if "gradient_checkpointing" in ways:
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.vae.enable_gradient_checkpointing()
    if "vae_tiling" in ways:
        backbone.vae.enable_tiling()
    if "cpu_offload" in ways:
        backbone.offloaded = True
        texts = [(text_encoder, ["forward"]) for text_encoder in backbone.text_encoders]
        offload_all(
            [*texts, (backbone.denoiser, ["forward"]), (backbone.vae, ["encode", "decode"])], lambda: backbone.device
        )


class OffloadedModule:
    """A frozen network that is on the device only while it computes, or until another one does.

    Its weights stay where they are; the device gets a copy.

    Args:
        network: The network.
        methods: The names of its methods that compute.
    """

    def __init__(self, network: nn.Module, methods: Sequence[str]) -> None:
        self.network, self.methods = network, methods
        tensors: list[Tensor] = [*chain(network.parameters(), network.buffers())]
        self.weights = [(tensor, tensor.data) for tensor in tensors]

    def load(self, device: torch.device) -> None:
        """Copy the weights to the device, unless they are there."""
        for tensor, data in self.weights:
            if tensor.device != device:
                tensor.data = data.to(device)

    def unload(self) -> None:
        """Free the copy on the device."""
        for tensor, data in self.weights:
            tensor.data = data


def offload_all(networks: Sequence[tuple[nn.Module, Sequence[str]]], device: Callable[[], torch.device]) -> None:
    """Keep at most one of several networks on the device, even if gradients flow through several.

    A call with gradients keeps no activations: the backward pass calls the network again, which loads it again.

    Args:
        networks: The networks, each with the names of its methods that compute.
        device: Returns the device of the computation.
    """
    modules = [OffloadedModule(*network) for network in networks]

    def offloaded(module: OffloadedModule, compute: Callable[..., Any]) -> Callable[..., Any]:
        def compute_alone(*args: Any, **kwargs: Any) -> Any:
            for other in modules:
                if other is not module:
                    other.unload()
            module.load(device())
            return compute(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute_alone(*args, **kwargs)
            return checkpoint(compute_alone, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return call

    for module in modules:
        for name in module.methods:
            setattr(module.network, name, offloaded(module, getattr(module.network, name)))
