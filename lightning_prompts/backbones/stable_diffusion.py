"""Stable Diffusion 1 and 2, and models in their format."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prompts.backbones.base import Backbone, Conditioning


class StableDiffusion(Backbone):
    """One CLIP text tower; the UNet attends to its last hidden state after the final layer norm."""

    def encode(self, ids: Tensor, embeddings: Tensor | None = None) -> Conditioning:
        """Turns P prompts (P, L) into their hidden states; see `Backbone.encode`."""
        hidden, _ = self.towers[0](ids, embeddings)
        return Conditioning(hidden)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the UNet; see `Backbone.denoise`."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(noisy.to(dtype), timesteps, conditioning.prompt_embeds.to(dtype)).sample
        return output.to(torch.promote_types(output.dtype, torch.float32))
