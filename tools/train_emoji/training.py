"""Render the training data of the embedded model and train its networks."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizerFast

from lightning_prompts.emoji import world
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer
from tools.train_emoji.networks import autoencoder, clip, denoiser
from tools.train_emoji.stages import CAPTIONS, AutoencoderTraining, ClipTraining, DenoiserTraining, Training

SAVE_EVERY = 500
"""Steps between checkpoints."""


def render_chunk(seed: int, count: int, tokenizer_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Render random scenes.

    Returns:
        Images (count, 3, 64, 64) in 0..255 and the token ids (count, CAPTIONS, CONTEXT) of their captions.
    """
    rng = random.Random(seed)
    scenes = [world.random_scene(rng) for _ in range(count)]
    captions = [world.caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    tokenizer = CLIPTokenizerFast.from_pretrained(tokenizer_folder)
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="np").input_ids
    images = np.stack([np.asarray(world.render(scene)) for scene in scenes]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), ids.astype(np.int32).reshape(count, CAPTIONS, CONTEXT)


def render_scenes(work: Path, count: int, seed: int) -> None:
    """Train the tokenizer and render two data sets into `work`.

    One is for the model and one, of another seed, for the scorer.
    """
    rng = random.Random(seed)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(100_000)]
    train_tokenizer(captions, merges=760, folder=work / "tokenizer")
    for offset, name in enumerate(("scenes", "scenes-scorer")):
        first, chunks = (2 * seed + offset) * 1_000_000, count // 1000
        seeds, sizes, tokenizers = range(first, first + chunks), [1000] * chunks, [work / "tokenizer"] * chunks
        with ProcessPoolExecutor() as pool:
            rendered = list(pool.map(render_chunk, seeds, sizes, tokenizers))
        images, ids = (torch.from_numpy(np.concatenate(part)) for part in zip(*rendered, strict=True))
        save_file({"images": images, "ids": ids}, work / f"{name}.safetensors")


def train(stage: str, work: Path, steps: int, batch_size: int, lr: float, seed: int, precision: Any) -> None:
    """Train one stage and save its averaged weights in `work / stage`.

    The random draws depend only on the seed and the step, so a training that resumes from its last checkpoint gives the
    same weights as one without a stop.
    """
    pl.seed_everything(seed + 17 * (stage == "scorer"), verbose=False)
    module = _module(stage, work, batch_size, steps, lr, seed)
    checkpoints = pl.callbacks.ModelCheckpoint(
        work / "checkpoints" / stage, save_last=True, save_top_k=0, every_n_train_steps=SAVE_EVERY
    )
    trainer = pl.Trainer(
        max_steps=steps,
        precision=precision,
        logger=pl.loggers.CSVLogger(work, name=f"log-{stage}"),
        callbacks=[checkpoints],
        enable_progress_bar=False,
        benchmark=True,
        log_every_n_steps=100,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )
    last = Path(checkpoints.dirpath or "") / "last.ckpt"
    start = time.perf_counter()
    endless: Any = range(10**9)
    trainer.fit(module, DataLoader(endless, batch_size=None), ckpt_path=last if last.exists() else None)
    network: Any = module.ema.module
    if isinstance(module, AutoencoderTraining):
        network.register_to_config(scaling_factor=_scaling_factor(module))
    network.save_pretrained(work / stage)
    seconds, loss = round(time.perf_counter() - start), float(trainer.callback_metrics["loss"])
    print(json.dumps({"stage": stage, "steps": trainer.global_step, "seconds": seconds, "loss": loss}))


def _module(stage: str, work: Path, batch_size: int, steps: int, lr: float, seed: int) -> Training:
    """Create the Lightning module of a stage from the results of earlier stages in `work`."""
    scorer = stage == "scorer"
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
    common: dict[str, Any] = {
        "scenes": load_file(work / ("scenes-scorer.safetensors" if scorer else "scenes.safetensors")),
        "batch_size": batch_size,
        "steps": steps,
        "lr": lr,
        "seed": seed + scorer,
    }
    stages: dict[str, Callable[[], Training]] = {
        "clip": lambda: ClipTraining(clip(tokenizer, vision=(128, 4), text=(128, 3)), crop=0.15, **common),
        "scorer": lambda: ClipTraining(clip(tokenizer, vision=(160, 5), text=(128, 4)), crop=0.3, **common),
        "autoencoder": lambda: AutoencoderTraining(autoencoder(), **common),
        "denoiser": lambda: DenoiserTraining(
            denoiser(128),
            vae=AutoencoderKL.from_pretrained(work / "autoencoder"),
            text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
            empty=tokenizer("", padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids,
            **common,
        ),
    }
    return stages[stage]()


@torch.no_grad()
def _scaling_factor(module: AutoencoderTraining) -> float:
    """Return one over the standard deviation of the latents, as Stable Diffusion defines it."""
    autoencoder = module.ema.module.float()
    images = module.scenes["images"][:1000].float().to(next(autoencoder.parameters()).device) / 127.5 - 1
    return 1 / float(torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(100)]).std())
