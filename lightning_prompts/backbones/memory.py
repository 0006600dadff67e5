"""A frozen model in less memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prompts.backbones.base import Backbone


def save_memory(backbone: Backbone, gradient_checkpointing: bool, vae_tiling: bool, cpu_offload: bool) -> None:
    """Has a model take less memory and more time.

    Args:
        backbone: The model.
        gradient_checkpointing: Blocks of the denoiser and the decoder keep no activations; the backward pass computes them again.
        vae_tiling: Large pictures are decoded in tiles, which changes them a little where these overlap.
        cpu_offload: The text encoders, the denoiser and the autoencoder are on the device one at a time.
    """
    if gradient_checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.vae.enable_gradient_checkpointing()
    if vae_tiling:
        backbone.vae.enable_tiling()
    if cpu_offload:
        backbone.offloaded = True
        texts = [(tower, ["forward"]) for tower in backbone.towers]
        one_at_a_time(
            [*texts, (backbone.denoiser, ["forward"]), (backbone.vae, ["encode", "decode"])], lambda: backbone.device
        )


class Visitor:
    """A frozen network that comes to the device when it is called, and until another one is.

    Its weights stay where they are, and what is on the device is a copy.

    Args:
        network: The network.
        calls: Its methods that compute.
    """

    def __init__(self, network: nn.Module, calls: Sequence[str]) -> None:
        self.network, self.calls = network, calls
        tensors: list[Tensor] = [*chain(network.parameters(), network.buffers())]
        self.weights = [(tensor, tensor.data) for tensor in tensors]

    def come(self, device: torch.device) -> None:
        """Copies the weights to the device, unless they are there."""
        for tensor, data in self.weights:
            if tensor.device != device:
                tensor.data = data.to(device)

    def leave(self) -> None:
        """Frees the copy."""
        for tensor, data in self.weights:
            tensor.data = data


def one_at_a_time(networks: Sequence[tuple[nn.Module, Sequence[str]]], device: Callable[[], torch.device]) -> None:
    """Has no more than one network on the device, also when gradients go back through several.

    A call that a gradient goes through keeps no activations: the backward pass calls again, so that the network is there when its
    turn comes.

    Args:
        networks: The networks, each with its methods that compute.
        device: Where they compute.
    """
    visitors = [Visitor(*network) for network in networks]

    def called(visitor: Visitor, compute: Callable[..., Any]) -> Callable[..., Any]:
        def alone(*args: Any, **kwargs: Any) -> Any:
            for other in visitors:
                if other is not visitor:
                    other.leave()
            visitor.come(device())
            return compute(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return alone(*args, **kwargs)
            return checkpoint(alone, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return call

    for visitor in visitors:
        for name in visitor.calls:
            setattr(visitor.network, name, called(visitor, getattr(visitor.network, name)))
