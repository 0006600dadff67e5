"""Runs with relative paths can be read from other folders, and after they were moved."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lightning_prompts.commands.main import main
from lightning_prompts.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def project(tiny, tmp_path, monkeypatch):
    """Create a folder with a model, images, and a run inside it on two of the images, one of which is damaged."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    shutil.copytree(tiny, "models/tiny")
    os.mkdir("photos")
    Image.new("RGB", (16, 16), "red").save("photos/a.png")
    Image.new("RGB", (16, 16), "white").save("negative.png")
    Path("photos/b.png").write_bytes(b"nothing")
    main(
        (
            "fit --run runs/one --model=PEZ --model.backbone=models/tiny --model.num_tokens=2 "
            "--model.sampler.num_inference_steps=2 --data=ImagesToPrompts --data.images=photos "
            "--data.negative_images negative.png --model.steps=1 --data.num_noise_samples=1"
        ).split()
    )
    return project


def results_of(run):
    result = json.loads((run / "result.json").read_text())
    return [(one["target"], one["prompt"], one["clip_similarity"]) for one in result["problems"]]


def run_later_commands(run):
    for command in ("validate", "test", "predict"):
        main([command, "--run", str(run)])


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_run_can_be_read_from_another_folder(moved, project, tmp_path, monkeypatch, capsys):
    before = results_of(project / "runs" / "one")
    (failed,) = [json.loads(line) for line in (project / "runs/one/failed.jsonl").read_text().splitlines()]
    assert failed["file"] == str(project / "photos" / "b.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if moved:
        project = Path(shutil.move(project, tmp_path / "renamed"))
    run = project / "runs" / "one"
    capsys.readouterr()
    run_later_commands(Path(os.path.relpath(run)))
    assert "left out" not in capsys.readouterr().out
    assert results_of(run) == before
    assert json.loads((run / "failed.jsonl").read_text())["file"] == str(project / "photos" / "b.png")
    assert list((run / "images").iterdir())
    assert not list(elsewhere.iterdir())
    assert RunFolder(run).load()[next(iter(RunFolder(run).load()))].paths == ["photos/a.png"]  # as given


def test_files_of_the_same_name_in_another_folder_are_not_used(project, tmp_path, monkeypatch, capsys):
    """Relative paths keep the meaning that they had when the search ran."""
    before = results_of(project / "runs" / "one")
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    Image.new("RGB", (16, 16), "blue").save(other / "photos" / "a.png")
    monkeypatch.chdir(other)
    main(["test", "--run", str(project / "runs" / "one")])
    assert results_of(project / "runs" / "one") == before


def test_paths_in_a_command_are_relative_to_the_current_folder(project, tmp_path, monkeypatch):
    shutil.copytree(project / "models" / "tiny" / "clip", tmp_path / "elsewhere" / "scorer")
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["test", "--run", str(project / "runs" / "one"), "--scorer", "scorer"])
    (problem, _) = json.loads((project / "runs/one/result.json").read_text())["problems"]
    assert problem["heldout_clip_similarity"] == pytest.approx(problem["clip_similarity"])
