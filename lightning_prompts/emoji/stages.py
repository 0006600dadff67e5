"""What trains each part of the embedded model: one Lightning module a stage."""

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

from lightning_prompts.emoji.networks import scheduler

CAPTIONS = 6  # captions drawn for each picture


def _average(averaged: Any, current: Any, count: Tensor | int) -> None:
    """Exponential moving average over the last tenth of the run so far, a thousand steps at most."""
    torch._foreach_lerp_(averaged, current, max(1e-3, 10 / (10 + int(count))))


class Training(pl.LightningModule, ABC):
    """What the stages share: batches addressed by the step, AdamW with warm-up and a final decay, averaged weights.

    Args:
        network: What is trained; its exponential moving average is what is saved.
        scenes: `pictures` and caption `ids`, see `render_scenes`.
        batch_size: Pictures a step.
        steps: Length of the run; the last 30% lower the learning rate to zero.
        lr: Learning rate between warm-up and decay.
        seed: Addresses every random draw together with the step.
    """

    def __init__(
        self, network: nn.Module, scenes: dict[str, Tensor], batch_size: int, steps: int, lr: float, seed: int
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.scenes = scenes
        self.average: Any = AveragedModel(network, multi_avg_fn=_average)
        self.batch_size, self.steps, self.lr, self.seed = batch_size, steps, lr, seed

    def on_fit_start(self) -> None:
        """Puts the data where the network is."""
        self.scenes = {name: tensor.to(self.device) for name, tensor in self.scenes.items()}

    def draw(self) -> tuple[Tensor, Tensor, torch.Generator]:
        """This step's picture indices, caption ids and the generator for everything else that is random in it."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 10_000_019 + self.global_step)
        index = torch.randint(len(self.scenes["ids"]), (self.batch_size,), generator=generator, device=self.device)
        which = torch.randint(CAPTIONS, (self.batch_size,), generator=generator, device=self.device)
        return index, self.scenes["ids"][index, which], generator

    def pictures(self, index: Tensor) -> Tensor:
        """Pictures `(B, 3, 64, 64)` in [-1, 1]."""
        return self.scenes["pictures"][index].float() / 127.5 - 1

    @abstractmethod
    def loss(self) -> Tensor:
        """This step's loss."""

    def training_step(self, batch: Tensor) -> Tensor:
        """One step; what to train on is drawn here, so the loader's item is not used."""
        loss = self.loss()
        self.log("loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps and updates the average, before a checkpoint is saved."""
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.network)

    def configure_optimizers(self) -> Any:
        """AdamW; warm-up of 300 steps, constant, linear decay over the last 30%."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=0.01)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 300, max(0.0, (self.steps - step) / (0.3 * self.steps)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }


class AutoencoderTraining(Training):
    """L1 + MSE + 1e-6 KL."""

    def loss(self) -> Tensor:
        """Reconstruction of pictures from the noisy latents of their posterior."""
        index, _, generator = self.draw()
        pictures = self.pictures(index)
        posterior = self.network.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        decoded = self.network.decode(posterior.mean + posterior.std * noise).sample.float()
        divergence: Tensor = posterior.kl().mean()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + 1e-6 * divergence


class ClipTraining(Training):
    """Contrastive loss between pictures, cropped by up to `crop` of their side, and captions."""

    def __init__(self, *args: Any, crop: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.crop = crop

    def loss(self) -> Tensor:
        """Cross-entropy of which caption belongs to which picture, both ways."""
        index, ids, generator = self.draw()
        pictures = self.pictures(index)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(self.batch_size, *shape, generator=generator, device=self.device)

        # Blurred and noised a little, so that what a decoder does to a picture does not hide the object.
        soft = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
        pictures = torch.lerp(pictures, soft, (uniform(1, 1, 1) - 0.4).clamp(min=0))
        pictures = pictures + 0.1 * uniform(1, 1, 1) * torch.randn(
            pictures.shape, generator=generator, device=self.device
        )
        zoom = 1 + self.crop * (uniform() - 0.6)
        theta = torch.zeros(self.batch_size, 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, :, 2] = self.crop * (uniform(2) - 0.5)
        grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
        pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        loss: Tensor = self.network(input_ids=ids, pixel_values=pictures, return_loss=True).loss
        return loss


class DenoiserTraining(Training):
    """Denoising loss on latents encoded once; every tenth caption is dropped for classifier-free guidance."""

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
        """Encodes all pictures."""
        super().on_fit_start()
        self.latents = torch.cat(
            [self._encode(i) for i in torch.arange(len(self.scenes["ids"]), device=self.device).split(500)]
        )

    @torch.no_grad()
    def _encode(self, index: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(self.pictures(index)).latent_dist.mean
        factor: float = self.vae.config.scaling_factor
        return (mean * factor).half()

    def loss(self) -> Tensor:
        """Mean squared error of the predicted noise."""
        index, ids, generator = self.draw()
        latents = self.latents[index].float()
        dropped = torch.rand(len(ids), 1, generator=generator, device=self.device) < 0.1
        context = self.text_encoder(torch.where(dropped, self.empty, ids)).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        t = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(ids),), generator=generator, device=self.device
        )
        noisy = self.scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(self.network(noisy, t, context).sample.float(), noise)
