import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lightning_prompts import entry_points
from lightning_prompts.commands import plugins
from lightning_prompts.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = Path(__file__).parents[1] / "examples/hill_climbing"
POINT = EntryPoint("HillClimbing", "hill_climbing:HillClimbing", plugins.ENTRY_POINTS)


@pytest.fixture
def declared(monkeypatch):
    """Return a function that declares entry points, as installed packages do."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return lambda *points: monkeypatch.setattr(
        entry_points, "entry_points", lambda group: points if group == plugins.ENTRY_POINTS else ()
    )


@pytest.fixture
def refusal(tmp_path, capsys):
    """Return a function that runs `fit`, asserts that it is refused in one sentence, and returns this sentence."""

    def run(*args):
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--run", str(tmp_path / "run"), *args, "--data.images", "a.png"])
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert not (tmp_path / "run").exists()
        return message

    return run


def command(tiny, image_folder, run):
    return (
        f"fit --run {run} --model HillClimbing --model.backbone {tiny} --model.num_tokens 3 --model.steps 4 "
        f"--model.sampler.num_inference_steps 2 --data.images {image_folder / '0.png'} --data.num_noise_samples 2 "
        "--trainer.accelerator cpu"
    ).split()


@pytest.mark.parametrize("plugin", [(), ("--plugin", "hill_climbing"), ("--plugin=hill_climbing",)])
def test_method_of_another_package_runs_and_resumes(plugin, declared, tiny, image_folder, tmp_path):
    declared(*([] if plugin else [POINT]))
    main([*command(tiny, image_folder, tmp_path / "run"), "--model.n_replace", "2", *plugin])
    (problem,) = json.loads((tmp_path / "run/result.json").read_text())["problems"]
    assert problem["prompt"]
    history = [entry["validation_loss"] for entry in problem["history"]]
    assert history == sorted(history, reverse=True)
    assert "hill_climbing.HillClimbing" in (tmp_path / "run/config.yaml").read_text()
    main(["test", "--run", str(tmp_path / "run"), *plugin])
    main([*command(tiny, image_folder, tmp_path / "run"), "--model.n_replace", "2", "--ckpt_path", "last", *plugin])


@pytest.mark.slow
def test_plugin_is_imported_in_all_processes(tiny, image_folder, tmp_path):
    program = [sys.executable, str(EXAMPLE.parents[1] / "train.py"), *command(tiny, image_folder, tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE), "OMP_NUM_THREADS": "1"}
    args = ["--plugin", "hill_climbing", "--trainer.devices", "2"]
    subprocess.run([*program, *args], check=True, timeout=250, env=environment, capture_output=True)
    assert json.loads((tmp_path / "run/result.json").read_text())["problems"][0]["prompt"]


def test_unusable_plugins_are_refused(declared, refusal, tmp_path, monkeypatch):
    declared()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("import nosuchpackage\n")
    (tmp_path / "empty_plugin.py").write_text("x = 1\n")
    assert "one of ClipWords, DPODiff" in refusal("--model", "NoSuchMethod")
    assert "--plugin nosuchplugin cannot be imported (ModuleNotFoundError" in refusal("--plugin", "nosuchplugin")
    assert "No module named 'nosuchpackage'" in refusal("--plugin", "broken_plugin", "--model", "PEZ")
    assert "--plugin empty_plugin has neither a method nor a family" in refusal(
        "--plugin=empty_plugin", "--model", "PEZ"
    )
    assert "--plugin needs the name of a module" in refusal("--plugin", "--model", "PEZ")
    assert "--plugin needs the name of a module" in refusal("--model", "PEZ", "--plugin=")


@pytest.mark.parametrize(
    ("value", "words"),
    [("nosuchpackage:Method", "cannot be imported"), ("json:JSONDecoder", "is not a subclass of PromptMethod")],
)
def test_unusable_entry_points_are_refused(value, words, declared, refusal):
    declared(EntryPoint("Wrong", value, plugins.ENTRY_POINTS))
    message = refusal("--model", "PEZ")
    assert words in message
    assert "uninstall its package" in message


def test_configs_cannot_import_modules(declared, refusal, tmp_path, monkeypatch):
    declared()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_methods.py").write_text("from lightning_prompts.methods import PEZ\nclass Other(PEZ): pass\n")
    (tmp_path / "config.yaml").write_text("model:\n  class_path: other_methods.Other\n")
    message = refusal("--config", str(tmp_path / "config.yaml"))
    assert "other_methods.Other" in message
    assert "--plugin" in message
    assert "other_methods" not in sys.modules
