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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizerFast

from lightning_prompts.emoji import world
from lightning_prompts.emoji.networks import autoencoder, clip, denoiser, image_processor, scheduler
from lightning_prompts.emoji.stages import CAPTIONS, AutoencoderTraining, ClipTraining, DenoiserTraining, Training
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer

SAVE_EVERY = 500  # steps between checkpoints


def render(seed: int, count: int, tokenizer_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` scenes: pictures `(count, 3, 64, 64)` in 0..255 and token ids `(count, CAPTIONS, CONTEXT)` of their captions."""
    rng = random.Random(seed)
    scenes = [world.random_scene(rng) for _ in range(count)]
    captions = [world.caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    tokenizer = CLIPTokenizerFast.from_pretrained(tokenizer_folder)
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


def train(stage: str, work: Path, steps: int, batch_size: int, lr: float, seed: int, precision: Any) -> None:
    """Trains one stage and saves its averaged weights in `work / stage`."""
    pl.seed_everything(seed + 17 * (stage == "scorer"), verbose=False)
    scenes = load_file(work / ("scenes-scorer.safetensors" if stage == "scorer" else "scenes.safetensors"))
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
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
        work / "checkpoints" / stage, save_last=True, save_top_k=0, every_n_train_steps=SAVE_EVERY
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
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
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
        (target / "preprocessor_config.json").write_text(json.dumps(image_processor(), indent=2) + "\n")
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
    torch.set_float32_matmul_precision("high")
    if args.stage == "scenes":
        render_scenes(args.work, args.count, args.seed)
    elif args.stage == "export":
        export(args.work, args.out)
    else:
        train(args.stage, args.work, args.steps, args.batch_size, args.lr, args.seed, args.precision)


if __name__ == "__main__":
    main()
