"""The embedded model's training, at a few steps on shapes, which need no font."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prompts.emoji import stages, train, world
from lightning_prompts.emoji.tokenizer import CONTEXT, train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

STAGES = {"clip": "model", "autoencoder": "diffusion_pytorch_model", "denoiser": "diffusion_pytorch_model"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A work folder with 24 pictures of shapes and their captions."""
    work, rng = tmp_path_factory.mktemp("scenes"), random.Random(0)
    drawn = [scene for scene in (world.random_scene(rng) for _ in range(1000)) if scene.object in world.SHAPES][:24]
    captions = [world.caption(scene, rng) for scene in drawn for _ in range(stages.CAPTIONS)]
    tokenizer = train_tokenizer(captions, 40, work / "tokenizer")
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    pictures = torch.from_numpy(np.stack([np.asarray(world.draw(scene)) for scene in drawn])).permute(0, 3, 1, 2)
    arrays = {"pictures": pictures.contiguous(), "ids": ids.int().view(len(drawn), stages.CAPTIONS, CONTEXT)}
    save_file(arrays, work / "scenes.safetensors")
    return work


@pytest.fixture
def weights(scenes, tmp_path, monkeypatch):
    """Trains all stages in a folder, saving every two steps, and gives their weights; `stop` breaks each stage off after a step."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)

    def run(name, stop=None, seed=0):
        work = tmp_path / name
        work.mkdir()
        for part in scenes.iterdir():
            (work / part.name).symlink_to(part)
        for stage in STAGES:
            arguments = (stage, work, 4, 2, 1e-3, seed, "32-true")
            if stop:
                with monkeypatch.context() as patch:
                    patch.setattr(stages.Training, "on_train_batch_end", breaking(stop))
                    with pytest.raises(RuntimeError, match="stopped"):
                        train.train(*arguments)
                assert not (work / stage).exists()
            train.train(*arguments)
        return {stage: load_file(work / stage / f"{file}.safetensors") for stage, file in STAGES.items()}

    return run


def breaking(step):
    def on_train_batch_end(self, *args):
        if self.global_step == step:
            raise RuntimeError("stopped")

    return on_train_batch_end


def equal(one, other):
    return all(
        one[stage].keys() == other[stage].keys() and all(torch.equal(x, other[stage][k]) for k, x in one[stage].items())
        for stage in STAGES
    )


@pytest.mark.slow
def test_training_repeats_and_goes_on_where_it_stopped(weights):
    unbroken = weights("unbroken")
    assert equal(unbroken, weights("again"))
    assert equal(unbroken, weights("broken", stop=3))
    assert not equal(unbroken, weights("other", seed=1))
