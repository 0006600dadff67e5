import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_prompts.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = {"invert": "gcg", "ph2p_lbfgs": "ph2p"}  # of the configs that are not named after theirs
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHORT_OF_PICTURES = "--data.steps 2 --data.samples 1 --data.validation_samples 2 --model.sampling_steps 2"
SHORT = {  # of those that begin with a prompt
    "dpo_diff": "--model.budget 3 --model.population 2 --model.seeds 1 --model.sampling_steps 2 --model.schedule fix-1",
    "human_feedback": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2 --model.chooser Scripted --model.chooser.wants {}",
    "metric_guidance": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2",
    "seed_invariance": "--model.steps 2 --model.seeds 1 --model.sampling_steps 2",
}


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
