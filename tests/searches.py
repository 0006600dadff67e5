"""Searches of a few steps, and their results."""

import json

import pytorch_lightning as pl
from safetensors.torch import load_file

from lightning_prompts.engine.batch import Row
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.methods import TRAINER


def fit(module, images, folder, callbacks=(), **data):
    """Run a search and return its problems."""
    how = TRAINER | {"accelerator": "cpu", "logger": False, "enable_checkpointing": bool(callbacks)}
    trainer = pl.Trainer(**how, default_root_dir=folder, callbacks=list(callbacks))
    module.steps = data.pop("steps", 2)
    data = ImagesToPrompts(str(images), **{"num_noise_samples": 2, "num_validation_samples": 2, **data})
    trainer.fit(module, datamodule=data)
    return list(data.folder.load().values())


def pez_command(run, backbone, image):
    """Return the command of a PEZ search of two steps."""
    command = f"fit --run {run} --trainer.accelerator cpu --model PEZ --model.backbone {backbone} --data.images {image}"
    short = "--model.num_tokens 2 --model.steps 2 --model.sampler.num_inference_steps 2"
    return f"{command} {short} --data.num_noise_samples 1 --data.num_validation_samples 2".split()


def set_batch(module, problems, steps=0):
    """Make problems the batch of a method, each after the given number of steps."""
    module.batch.rows = [Row(problem, steps) for problem in problems]
    module.set_rows(list(problems))


def result_of(run, digits=5):
    """Return the result of a run with one problem, and its tensors by file.

    The result has no seconds, and its cosine is rounded.
    """
    files = {path.name: load_file(path) for path in run.glob("*.safetensors")}
    (problem,) = json.loads((run / "result.json").read_text())["problems"]
    problem["similarity"] = round(problem.get("similarity") or 0.0, digits)
    return {name: value for name, value in problem.items() if name != "seconds"}, files
