import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_prompts.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = {"invert": "gcg", "ph2p_lbfgs": "ph2p"}  # of the configs that are not named after theirs
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_on_the_embedded_model(config, tmp_path):
    pixels = np.full((40, 48, 3), 90, dtype=np.uint8)
    pixels[10:30, 10:30] = (220, 30, 40)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    args = [
        "fit",
        "--config",
        str(config),
        "--run",
        str(tmp_path / "run"),
        "--data.images",
        str(tmp_path / "photo.png"),
    ]
    args += ["--data.steps", "2", "--data.samples", "1", "--data.validation_samples", "2"]
    main([*args, "--model.sampling_steps", "2", "--trainer.accelerator", "cpu"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (problem,) = result["problems"]
    assert result["backbone"] == "emoji"
    assert result["method"].lower() == CLASSES.get(config.stem, config.stem.replace("_", ""))
    assert problem["prompt"]
    assert problem["heldout_clip_similarity"] is not None
