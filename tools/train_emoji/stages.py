"""The training stages of the embedded model, each a Lightning module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel

from tools.train_emoji.networks import scheduler

CAPTIONS = 6
"""Captions per image."""


def _ema_update(averaged: Any, current: Any, count: Tensor | int) -> None:
    """Update an exponential moving average over the last tenth of the steps so far, at most a thousand."""
    torch._foreach_lerp_(averaged, current, max(1e-3, 10 / (10 + int(count))))


class Training(pl.LightningModule, ABC):
    """Base class of the stages: AdamW with warm-up and final decay, averaged weights, batches sampled by seed and step.

    Args:
        network: The network to train; the exponential moving average of its weights is saved.
        scenes: `images` (N, 3, 64, 64) in 0..255 and their captions' `ids` (N, CAPTIONS, L), see `render_scenes`.
        batch_size: Images per step.
        steps: Number of steps.
        lr: Learning rate between warm-up and decay.
        seed: Seed of all random draws, together with the step.
    """

    def __init__(
        self, network: nn.Module, scenes: dict[str, Tensor], batch_size: int, steps: int, lr: float, seed: int
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.scenes = scenes
        self.ema: Any = AveragedModel(network, multi_avg_fn=_ema_update)
        self.batch_size, self.steps, self.lr, self.seed = batch_size, steps, lr, seed

    def on_fit_start(self) -> None:
        """Move the scenes to the device."""
        self.scenes = {name: tensor.to(self.device) for name, tensor in self.scenes.items()}

    def sample_batch(self) -> tuple[Tensor, Tensor, torch.Generator]:
        """Sample this step's batch.

        Returns:
            Indices of B images, the token ids (B, L) of one caption of each, and the generator for all other draws of
            the step.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed * 10_000_019 + self.global_step)
        index = torch.randint(len(self.scenes["ids"]), (self.batch_size,), generator=generator, device=self.device)
        which = torch.randint(CAPTIONS, (self.batch_size,), generator=generator, device=self.device)
        return index, self.scenes["ids"][index, which], generator

    def images(self, index: Tensor) -> Tensor:
        """Return images (B, 3, 64, 64) in [-1, 1]."""
        return self.scenes["images"][index].float() / 127.5 - 1

    @abstractmethod
    def loss(self) -> Tensor:
        """Sample this step's batch and return its loss."""

    def training_step(self, batch: Tensor) -> Tensor:
        """Compute and log the loss; the loader's item is not used, since `loss` samples the batch."""
        loss = self.loss()
        self.log("loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and update the average, here because checkpoints are saved before the module's `on_train_batch_end`."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.network)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up of 300 steps, a constant learning rate, and a linear decay at the end.

        The decay takes the last 30% of the steps.
        """
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=0.01)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 300, max(0.0, (self.steps - step) / (0.3 * self.steps)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }


class AutoencoderTraining(Training):
    """Trains the autoencoder with L1 + MSE + 1e-6 KL."""

    def loss(self) -> Tensor:
        """Return the loss of images reconstructed from latents that are sampled from their posterior."""
        index, _, generator = self.sample_batch()
        images = self.images(index)
        posterior = self.network.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        decoded = self.network.decode(posterior.mean + posterior.std * noise).sample.float()
        divergence: Tensor = posterior.kl().mean()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 1e-6 * divergence


class ClipTraining(Training):
    """Trains a CLIP with the contrastive loss between images and captions.

    Args:
        crop: Strength of the random crops, whose side is between 1 - 0.6 `crop` and 1 + 0.4 `crop` of the image's.
    """

    def __init__(self, *args: Any, crop: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.crop = crop

    def loss(self) -> Tensor:
        """Return the cross-entropy of matching captions to images and images to captions."""
        index, ids, generator = self.sample_batch()
        images = self.images(index)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(self.batch_size, *shape, generator=generator, device=self.device)

        # Slight blur and noise make the CLIP robust to the artifacts of the decoder.
        soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        images = torch.lerp(images, soft, (uniform(1, 1, 1) - 0.4).clamp(min=0))
        images = images + 0.1 * uniform(1, 1, 1) * torch.randn(images.shape, generator=generator, device=self.device)
        zoom = 1 + self.crop * (uniform() - 0.6)
        theta = torch.zeros(self.batch_size, 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, :, 2] = self.crop * (uniform(2) - 0.5)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        loss: Tensor = self.network(input_ids=ids, pixel_values=images, return_loss=True).loss
        return loss


class DenoiserTraining(Training):
    """Trains the denoiser on latents that are encoded once.

    Args:
        vae: The trained autoencoder.
        text_encoder: The trained text encoder.
        empty: Token ids (1, L) of the empty prompt, which replaces every tenth caption for classifier-free guidance.
    """

    empty: Tensor

    def __init__(
        self, *args: Any, vae: AutoencoderKL, text_encoder: CLIPTextModel, empty: Tensor, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vae, self.text_encoder = vae.requires_grad_(False), text_encoder.requires_grad_(False)
        self.register_buffer("empty", empty, persistent=False)
        self.scheduler = scheduler()
        self.network.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Encode all images."""
        super().on_fit_start()
        self.latents = torch.cat(
            [self._encode(i) for i in torch.arange(len(self.scenes["ids"]), device=self.device).split(500)]
        )

    @torch.no_grad()
    def _encode(self, index: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(self.images(index)).latent_dist.mean
        factor: float = self.vae.config.scaling_factor
        return (mean * factor).half()

    def loss(self) -> Tensor:
        """Return the mean squared error of the predicted noise."""
        index, ids, generator = self.sample_batch()
        latents = self.latents[index].float()
        dropped = torch.rand(len(ids), 1, generator=generator, device=self.device) < 0.1
        context = self.text_encoder(torch.where(dropped, self.empty, ids)).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        t = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(ids),), generator=generator, device=self.device
        )
        noisy = self.scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(self.network(noisy, t, context).sample.float(), noise)
