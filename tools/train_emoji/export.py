"""Write the trained networks as the folders that the package ships."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizerFast

from lightning_prompts.emoji import world
from tools.train_emoji.networks import image_processor, scheduler


def export(work: Path, folder: Path) -> None:
    """Write the pipeline with its CLIP to `model/` and the held-out scorer to `scorer/`, as float16 safetensors."""
    model, scorer = folder / "model", folder / "scorer"
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "autoencoder"),
        text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "denoiser"),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(model)
    for name, target in (("clip", model / "clip"), ("scorer", scorer)):
        CLIPModel.from_pretrained(work / name).half().save_pretrained(target)
        tokenizer.save_pretrained(target)
        _write(target / "preprocessor_config.json", image_processor())
    for target in (model / "tokenizer", model / "clip", scorer):
        for name in ("vocab.json", "merges.txt"):  # transformers saves only tokenizer.json; other tools read these
            (target / name).write_bytes((work / "tokenizer" / name).read_bytes())
    for target in (model / "text_encoder", model / "clip", scorer):
        # Otherwise `from_pretrained` without a dtype loads these as float16, next to a float32 UNet.
        _write(target / "config.json", {**_read(target / "config.json"), "dtype": "float32"})
    for config in folder.glob("*/**/config.json"):  # drop the path where a component was trained
        _write(config, {key: value for key, value in _read(config).items() if key != "_name_or_path"})
    describe(model, scorer)


def describe(model: Path, scorer: Path) -> None:
    """Write the model's metadata.json and dictionary.txt."""
    metadata = {
        "description": "64 x 64 images of one emoji or geometric shape on a background of one color",
        "num_inference_steps": 25,
        "guidance_scale": 3.0,
        "scorer": Path(os.path.relpath(scorer, model)).as_posix(),
        "dictionary": "dictionary.txt",
        "synonyms": {word: list(synonyms) for word, synonyms in world.SYNONYMS.items() if synonyms},
    }
    _write(model / "metadata.json", metadata)
    (model / "dictionary.txt").write_text("".join(f"{word}\n" for word in sorted(world.caption_words())))


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
