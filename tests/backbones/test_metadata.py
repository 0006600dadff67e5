"""Defaults from the metadata.json of a model's folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_prompts.backbones import EMOJI, load_backbone
from lightning_prompts.backbones.hub import local_folder
from lightning_prompts.backbones.metadata import Metadata, read_metadata
from lightning_prompts.callbacks import Scores
from lightning_prompts.emoji import world
from lightning_prompts.errors import UserError
from lightning_prompts.methods import PEZ
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.sampling import SamplerSettings
from tools.train_emoji.export import describe


def read(name):
    return read_metadata(name, local_folder(name))


@pytest.fixture
def model(tiny, tmp_path):
    """Copy the tiny model; return a function that writes its metadata."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))

    def write(content):
        (folder / "metadata.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(folder)

    return write


def test_metadata_sets_the_defaults(model, tiny):
    without = load_backbone(tiny)
    assert without.metadata == Metadata()
    backbone = load_backbone(model({"num_inference_steps": 7, "guidance_scale": 2, "license": "another key"}))
    assert (backbone.default_steps, backbone.default_guidance) == (7, 2.0)
    assert PEZ(backbone=backbone).sampling_settings == {"num_inference_steps": 7, "guidance_scale": 2.0}
    given = PEZ(backbone=backbone, sampler=SamplerSettings(3, 1.5)).sampling_settings
    assert given == {"num_inference_steps": 3, "guidance_scale": 1.5}
    backbone = load_backbone(model({"num_inference_steps": 7}))
    assert (backbone.default_steps, backbone.default_guidance) == (7, without.default_guidance)


def test_paths_are_relative_to_the_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorer").mkdir()
    metadata = read(model({"scorer": "../scorer", "dictionary": "model_index.json"}))
    assert (metadata.scorer, metadata.dictionary) == (
        str(tmp_path / "scorer"),
        str(tmp_path / "model" / "model_index.json"),
    )
    assert read("model") == replace(metadata, scorer="scorer", dictionary="model/model_index.json")
    assert read(model({"scorer": "openai/clip-vit-base-patch32"})).scorer == "openai/clip-vit-base-patch32"
    assert read(model({"scorer": f"{tmp_path}/scorer"})).scorer == f"{tmp_path}/scorer"


def test_scorer_of_the_metadata_is_used(model, tmp_path):
    """Naming the CLIP of the search is refused, which shows that the scorer was read."""
    method = PEZ(backbone=model({"scorer": "clip"}), loss_weights=LossWeights(clip=0.1))
    with pytest.raises(UserError, match="would not be held out"):
        Scores().heldout(method)
    assert Scores(scorer=str(EMOJI.parent / "scorer")).heldout(method).name == str(EMOJI.parent / "scorer")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"num_inference_steps": "many"}, "num_inference_steps: Input should be a valid integer"),
        ({"num_inference_steps": 0}, "num_inference_steps must be positive, got 0"),
        ({"guidance_scale": -1}, "guidance_scale must be a finite number of at least 0, got -1"),
        ({"synonyms": {"dog": "puppy"}}, "synonyms: Input should be a valid"),
        ([], "Input should be a"),
        ('{"scorer": ', "Invalid JSON"),
    ],
)
def test_unusable_metadata_is_refused(content, reason, model):
    with pytest.raises(
        UserError, match=rf"^The metadata.json of the model .* \(.*{reason}.*\); correct or remove it\.$"
    ):
        load_backbone(model(content))


def test_metadata_of_the_embedded_model_is_that_of_its_training(tmp_path):
    (tmp_path / "model").mkdir()
    describe(tmp_path / "model", tmp_path / "scorer")
    for name in ("metadata.json", "dictionary.txt"):
        assert (tmp_path / "model" / name).read_text() == (EMOJI / name).read_text()
    metadata = read("emoji")
    assert (metadata.num_inference_steps, metadata.guidance_scale) == (25, 3.0)
    assert metadata.scorer == str(EMOJI.parent / "scorer")
    assert set(Path(metadata.dictionary).read_text().split()) == world.caption_words()
    assert metadata.synonyms == {word: synonyms for word, synonyms in world.SYNONYMS.items() if synonyms}
