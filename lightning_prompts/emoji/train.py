"""Trains the embedded model from nothing: `python -m lightning_prompts.emoji.train STAGE`.

Stages, in order: `scenes`, `clip` (its text tower is the text encoder), `scorer` (the held-out CLIP), `autoencoder`, `denoiser`, `export`.
Every stage is one Lightning run whose randomness is a function of the seed and the step, so a stopped run goes on from its last
checkpoint as if it had not been stopped: give the same command again. More `--steps` train longer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from lightning_prompts.emoji import world
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer

CAPTIONS = 6  # captions drawn for each picture


def render(seed: int, count: int, tokenizer_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` scenes: pictures `(count, 3, 64, 64)` in 0..255 and token ids `(count, CAPTIONS, CONTEXT)` of their captions."""
    rng = random.Random(seed)
    scenes = [world.random_scene(rng) for _ in range(count)]
    captions = [world.caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="np").input_ids
    pictures = np.stack([np.asarray(world.draw(scene)) for scene in scenes]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pictures), ids.astype(np.int32).reshape(count, CAPTIONS, CONTEXT)


def render_scenes(work: Path, count: int, seed: int) -> None:
    """Trains the tokenizer and renders the training data, for the model and from other seeds for the scorer, into `work`."""
    rng = random.Random(seed)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(100_000)]
    train_tokenizer(captions, merges=760, folder=work / "tokenizer")
    for offset, name in enumerate(("scenes", "scenes-scorer")):
        first, chunks = (2 * seed + offset) * 1_000_000, count // 1000
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(render, range(first, first + chunks), [1000] * chunks, [work / "tokenizer"] * chunks))
        pictures, ids = (torch.from_numpy(np.concatenate(part)) for part in zip(*drawn, strict=True))
        save_file({"pictures": pictures, "ids": ids}, work / f"{name}.safetensors")


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

    def on_train_batch_end(self, *args: Any) -> None:
        """Updates the average."""
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

    def loss(self) -> Tensor:  # noqa: D102
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

    def loss(self) -> Tensor:  # noqa: D102
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

    def on_fit_start(self) -> None:  # noqa: D102
        super().on_fit_start()
        self.latents = torch.cat(
            [self._encode(i) for i in torch.arange(len(self.scenes["ids"]), device=self.device).split(500)]
        )

    @torch.no_grad()
    def _encode(self, index: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(self.pictures(index)).latent_dist.mean
        factor: float = self.vae.config.scaling_factor
        return (mean * factor).half()

    def loss(self) -> Tensor:  # noqa: D102
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


def clip(tokenizer: CLIPTokenizer, vision: tuple[int, int], text: tuple[int, int]) -> CLIPModel:
    """A new CLIP with `(width, layers)` for each tower and patches of 8 pixels."""

    def tower(width: int, layers: int) -> dict[str, Any]:
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 32,
                "projection_dim": 128}  # fmt: skip

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(
        CLIPConfig(
            text_config={**tower(*text), **ids, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT},
            vision_config={**tower(*vision), "image_size": world.SIZE, "patch_size": 8},
            projection_dim=128,
        )
    )


def autoencoder() -> AutoencoderKL:
    """A new autoencoder: 64 x 64 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=world.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def denoiser(width: int) -> UNet2DConditionModel:
    """A new UNet: text enters at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=width, attention_head_dim=4,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """The DDPM schedule, sampled from its noisiest step on."""
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )


def train(stage: str, work: Path, steps: int, batch_size: int, lr: float, seed: int, precision: Any) -> None:
    """Trains one stage and saves its averaged weights in `work / stage`."""
    torch.set_float32_matmul_precision("high")
    pl.seed_everything(seed + 17 * (stage == "scorer"), verbose=False)
    scenes = load_file(work / ("scenes-scorer.safetensors" if stage == "scorer" else "scenes.safetensors"))
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    shared: dict[str, Any] = {
        "scenes": scenes,
        "batch_size": batch_size,
        "steps": steps,
        "lr": lr,
        "seed": seed + (stage == "scorer"),
    }
    stages: dict[str, Callable[[], Training]] = {
        "clip": lambda: ClipTraining(clip(tokenizer, vision=(128, 4), text=(128, 3)), crop=0.15, **shared),
        "scorer": lambda: ClipTraining(clip(tokenizer, vision=(160, 5), text=(128, 4)), crop=0.3, **shared),
        "autoencoder": lambda: AutoencoderTraining(autoencoder(), **shared),
        "denoiser": lambda: DenoiserTraining(
            denoiser(128),
            vae=AutoencoderKL.from_pretrained(work / "autoencoder"),
            text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
            empty=tokenizer("", padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids,
            **shared,
        ),
    }
    module = stages[stage]()
    checkpoints = pl.callbacks.ModelCheckpoint(
        work / "checkpoints" / stage, save_last=True, save_top_k=0, every_n_train_steps=500
    )
    trainer = pl.Trainer(
        max_steps=steps, precision=precision, logger=pl.loggers.CSVLogger(work, name=f"log-{stage}"), callbacks=[checkpoints],
        enable_progress_bar=False, benchmark=True, log_every_n_steps=100, gradient_clip_val=1.0, use_distributed_sampler=False,
    )  # fmt: skip
    last = Path(checkpoints.dirpath or "") / "last.ckpt"
    begun = time.perf_counter()
    steps_ahead: Any = range(10**9)
    trainer.fit(module, DataLoader(steps_ahead, batch_size=None), ckpt_path=last if last.exists() else None)
    network: Any = module.average.module
    if isinstance(module, AutoencoderTraining):
        network.register_to_config(scaling_factor=_scaling_factor(module))
    network.save_pretrained(work / stage)
    seconds = round(time.perf_counter() - begun)
    print(
        json.dumps(
            {
                "stage": stage,
                "steps": trainer.global_step,
                "seconds": seconds,
                "loss": float(trainer.callback_metrics["loss"]),
            }
        )
    )


@torch.no_grad()
def _scaling_factor(module: AutoencoderTraining) -> float:
    """One over the standard deviation of the latents, as Stable Diffusion defines it."""
    autoencoder = module.average.module.float()
    pictures = module.scenes["pictures"][:1000].float().to(next(autoencoder.parameters()).device) / 127.5 - 1
    return 1 / float(torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures.split(100)]).std())


def export(work: Path, folder: Path) -> None:
    """Writes the pipeline with its CLIP, and the held-out scorer, as float16 safetensors."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(work / "clip")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "autoencoder"), text_encoder=text_encoder, tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "denoiser"), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder / "model")
    for name, target in (("clip", folder / "model" / "clip"), ("scorer", folder / "scorer")):
        CLIPModel.from_pretrained(work / name).half().save_pretrained(target)
        tokenizer.save_pretrained(target)
    for target in (folder / "model" / "tokenizer", folder / "model" / "clip", folder / "scorer"):
        for name in ("vocab.json", "merges.txt"):  # transformers saves tokenizer.json alone; other tools read these
            (target / name).write_bytes((work / "tokenizer" / name).read_bytes())
    for config in _configs(folder):  # else plain from_pretrained loads text towers as half beside a float32 UNet
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for config in folder.glob("*/**/config.json"):  # where a part was trained concerns nobody
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")


def _configs(folder: Path) -> Iterator[Path]:
    return iter(
        (folder / "model/text_encoder/config.json", folder / "model/clip/config.json", folder / "scorer/config.json")
    )


def main() -> None:
    """Parses the command line and runs one stage."""
    parser = argparse.ArgumentParser(prog="python -m lightning_prompts.emoji.train", description=__doc__)
    parser.add_argument("stage", choices=["scenes", "clip", "scorer", "autoencoder", "denoiser", "export"])
    parser.add_argument("--work", type=Path, default=Path("emoji-training"), help="checkpoints and float32 weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where export puts model/ and scorer/")
    parser.add_argument("--count", type=int, default=60_000, help="pictures to train on, for `scenes`")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-mixed")
    args = parser.parse_args()
    if args.stage == "scenes":
        render_scenes(args.work, args.count, args.seed)
    elif args.stage == "export":
        export(args.work, args.out)
    else:
        train(args.stage, args.work, args.steps, args.batch_size, args.lr, args.seed, args.precision)


if __name__ == "__main__":
    main()
