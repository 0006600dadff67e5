import json
from pathlib import Path

import families
import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_prompts.backbones import hub
from lightning_prompts.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = {"invert": "gcg", "ph2p_lbfgs": "ph2p", "pez_clip": "pez"}  # of the configs that are not named after theirs
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHORT_OF_PICTURES = "--data.steps 2 --data.samples 1 --data.validation_samples 2 --model.sampling_steps 2"
SHORT = {  # of those that begin with a prompt
    "dpo_diff": "--model.budget 3 --model.population 2 --model.seeds 1 --model.sampling_steps 2 --model.schedule fix-1",
    "human_feedback": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2 --model.chooser Scripted --model.chooser.wants {}",
    "metric_guidance": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2",
    "seed_invariance": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2",
}


FAMILY_OF = {"sd15": "sd1", "sd21": "sd2", "sd35": "sd3"}  # of tests/families.py, where it has another name


@pytest.mark.parametrize("config", sorted(CONFIGS[0].parent.glob("models/*.yaml")), ids=lambda path: path.stem)
def test_config_of_a_model_follows_that_of_a_method(config, tmp_path, monkeypatch):
    """It names a model on the hub, in whose place there is one of its family here."""
    picture = tmp_path / "photo.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    folder = families.save_with_clip(FAMILY_OF.get(config.stem, config.stem), tmp_path)
    monkeypatch.setitem(hub.SHORT_NAMES, config.stem, "no/model")
    monkeypatch.setattr(hub, "local_folder", lambda name: Path(folder if name == config.stem else name))
    given = [
        "--config",
        "configs/gcg.yaml",
        "--config",
        str(config),
        "--data.images",
        str(picture),
        "--model.candidates",
        "2",
    ]
    small = [
        "--model.image_size",
        "16",
        "--model.clip",
        f"{folder}/clip",
        "--model.offline",
        "true",
        "--scorer",
        f"{folder}/clip",
    ]
    monkeypatch.setattr("lightning_prompts.callbacks.scores.clip_of", lambda backbone: f"{folder}/clip")
    main(
        [
            "fit",
            *given,
            *small,
            *SHORT_OF_PICTURES.split(),
            "--run",
            str(tmp_path / "run"),
            "--trainer.accelerator",
            "cpu",
        ]
    )
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]
    assert saved["backbone"] == config.stem
    assert saved["candidates"] == 2
    assert json.loads((tmp_path / "run/result.json").read_text())["problems"][0]["prompt"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_on_the_embedded_model(config, tmp_path):
    photo = tmp_path / "photo.png"
    pixels = np.full((40, 48, 3), 90, dtype=np.uint8)
    pixels[10:30, 10:30] = (220, 30, 40)
    Image.fromarray(pixels).save(photo)
    given = ["--data.images", str(photo), *SHORT_OF_PICTURES.split()]
    if config.stem in SHORT:
        settings = SHORT[config.stem].format(photo).split()
        given = ["--data.prompts", "a small bunny on a crimson background", *settings]
    main(["fit", "--config", str(config), "--run", str(tmp_path / "run"), "--trainer.accelerator", "cpu", *given])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (problem,) = result["problems"]
    assert result["backbone"] == "emoji"
    assert result["method"].lower() == CLASSES.get(config.stem, config.stem.replace("_", ""))
    assert problem["prompt"]
    assert problem["heldout_after" if config.stem in SHORT else "heldout_clip_similarity"] is not None
