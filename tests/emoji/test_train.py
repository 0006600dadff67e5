"""Training of the embedded model, for a few steps on shapes, which need no font."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prompts.emoji import world
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer
from tools.train_emoji import stages, training

pytestmark = pytest.mark.filterwarnings("ignore")

STAGES = {"clip": "model", "autoencoder": "diffusion_pytorch_model", "denoiser": "diffusion_pytorch_model"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Write a work folder with 24 images of shapes and their captions."""
    work, rng = tmp_path_factory.mktemp("scenes"), random.Random(0)
    scenes = [scene for scene in (world.random_scene(rng) for _ in range(1000)) if scene.object in world.SHAPES][:24]
    captions = [world.caption(scene, rng) for scene in scenes for _ in range(stages.CAPTIONS)]
    tokenizer = train_tokenizer(captions, 40, work / "tokenizer")
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    images = torch.from_numpy(np.stack([np.asarray(world.render(scene)) for scene in scenes])).permute(0, 3, 1, 2)
    arrays = {"images": images.contiguous(), "ids": ids.int().view(len(scenes), stages.CAPTIONS, CONTEXT)}
    save_file(arrays, work / "scenes.safetensors")
    return work


@pytest.fixture
def train(scenes, tmp_path, monkeypatch):
    """Train all stages in a folder, with a checkpoint every two steps, and return their weights.

    `stop` interrupts each stage at a step.
    """
    monkeypatch.setattr(training, "SAVE_EVERY", 2)

    def run(name, stop=None, seed=0):
        work = tmp_path / name
        work.mkdir()
        for part in scenes.iterdir():
            (work / part.name).symlink_to(part)
        for stage in STAGES:
            arguments = (stage, work, 4, 2, 1e-3, seed, "32-true")
            if stop:
                with monkeypatch.context() as patch:
                    patch.setattr(stages.Training, "on_train_batch_end", raise_at(stop))
                    with pytest.raises(RuntimeError, match="stopped"):
                        training.train(*arguments)
                assert not (work / stage).exists()
            training.train(*arguments)
        return {stage: load_file(work / stage / f"{file}.safetensors") for stage, file in STAGES.items()}

    return run


def raise_at(step):
    def on_train_batch_end(self, *args):
        if self.global_step == step:
            raise RuntimeError("stopped")

    return on_train_batch_end


def are_equal(one, other):
    return all(
        one[stage].keys() == other[stage].keys() and all(torch.equal(x, other[stage][k]) for k, x in one[stage].items())
        for stage in STAGES
    )


@pytest.mark.slow
def test_training_is_reproducible_and_resumes(train):
    complete = train("complete")
    assert are_equal(complete, train("again"))
    assert are_equal(complete, train("interrupted", stop=3))
    assert not are_equal(complete, train("other", seed=1))
