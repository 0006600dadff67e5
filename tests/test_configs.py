import json
from pathlib import Path

import families
import pytest
import yaml
from PIL import Image

from lightning_prompts.backbones import hub
from lightning_prompts.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = sorted((Path(__file__).parents[1] / "configs/models").glob("*.yaml"))
SHORT = (
    "--model.steps 2 --data.num_noise_samples 1 --data.num_validation_samples 2 --model.sampler.num_inference_steps 2"
)
FAMILY_OF = {"sd15": "sd1", "sd21": "sd2", "sd35": "sd3"}  # names in tests/families.py


@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_model_config_composes_with_a_method_config(config, tmp_path, monkeypatch):
    """The config names a model on the hub, which a tiny model of its family replaces here."""
    image = tmp_path / "photo.png"
    Image.new("RGB", (16, 16), "red").save(image)
    folder = families.save_with_clip(FAMILY_OF.get(config.stem, config.stem), tmp_path)
    monkeypatch.setitem(hub.SHORT_NAMES, config.stem, "no/model")
    monkeypatch.setattr(hub, "local_folder", lambda name: Path(folder if name == config.stem else name))
    given = [
        "--config",
        "configs/gcg.yaml",
        "--config",
        str(config),
        "--data.images",
        str(image),
        "--model.candidates",
        "2",
    ]
    small = [
        "--model.backbone.image_size",
        "16",
        "--model.clip",
        f"{folder}/clip",
        "--model.backbone.offline",
        "true",
        "--scorer",
        f"{folder}/clip",
    ]
    monkeypatch.setattr("lightning_prompts.callbacks.scores.default_clip", lambda backbone: f"{folder}/clip")
    main(
        [
            "fit",
            *given,
            *small,
            *SHORT.split(),
            "--run",
            str(tmp_path / "run"),
            "--trainer.accelerator",
            "cpu",
        ]
    )
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]
    assert saved["backbone"]["name"] == config.stem
    assert saved["candidates"] == 2
    assert json.loads((tmp_path / "run/result.json").read_text())["problems"][0]["prompt"]


@pytest.mark.parametrize("flags_first", [True, False])
@pytest.mark.parametrize("given", ["flag", "config", "group"])
def test_backbone_name_composes_with_its_group(given, flags_first, tiny, image_folder, tmp_path):
    """`--model.backbone NAME` is the group's name, in flags and YAML, before or after other settings of the group."""
    config = tmp_path / "backbone.yaml"
    value = {"name": tiny, "clip_skip": 1} if given == "group" else tiny
    config.write_text(yaml.safe_dump({"model": {"init_args": {"backbone": value}}}))
    named = ["--model.backbone", tiny] if given == "flag" else ["--config", str(config)]
    rest = ["--model.backbone.image_size", "16", "--model.backbone.vocabulary", "clip"]
    command = ["fit", "--config", "configs/pez.yaml", "--run", str(tmp_path / "run")]
    command += rest + named if flags_first else named + rest
    command += [
        "--data.images",
        str(image_folder / "0.png"),
        "--model.steps",
        "1",
        "--model.sampler.num_inference_steps",
        "1",
    ]
    main([*command, "--model.num_tokens", "2", "--trainer.accelerator", "cpu"])
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]["backbone"]
    assert (saved["name"], saved["image_size"], saved["vocabulary"]) == (tiny, 16, "clip")
    assert saved.get("clip_skip") == (1 if given == "group" else None)
