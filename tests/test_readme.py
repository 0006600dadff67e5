"""Every train.py command in the README and the docs runs, with shorter searches."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lightning_prompts.commands.main import main
from lightning_prompts.methods import refinement

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
SHORT = [
    "--model.steps=2",
    "--data.num_noise_samples=1",
    "--data.num_validation_samples=2",
    "--model.sampler.num_inference_steps=2",
]
SHORT_OF_PROMPTS = {
    "dpo_diff": ["--model.schedule=fix-1", "--model.budget=3", "--model.population=2"],
    "metric_guidance": ["--model.steps=2"],
    "seed_invariance": ["--model.steps=3", "--model.sampler.num_inference_steps=3"],
    "human_feedback": ["--model.steps=2", "--model.chooser=Scripted", "--model.chooser.wants=photo.png"],
}
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "train.py fit" in page.read_text()
]


def commands(page):
    """Return the lines of a page's shell blocks, without comments."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    return [words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))]


def content(file):
    """Return what the shell substitutes for `$(cat file)`."""
    return Path(file[1]).read_text().rstrip("\n")


def run_processes(args):
    """Run a command for several processes, with two instead of many, on one machine instead of four."""
    replacements = {"8": "2", "4": "1", "N": "0", "HOST": "localhost", "runs/big": f"runs/{args[0]}"}
    command = [sys.executable, *(replacements.get(word, word) for word in args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Create a folder like the repository's root, with images in it."""
    for name in ("benchmarks", "configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    colors = {"photo": "red", "photos/a": "green", "photos/b": "blue", "fox": "orange", "ball": "white"}
    for name, color in colors.items():
        Image.new("RGB", (80, 64), color).save(tmp_path / f"{name}.png")
    save_file({"<fox>": torch.randn(1, 128)}, tmp_path / "fox.safetensors")
    (tmp_path / "prompts.txt").write_text("a small dog on a red background\na bicycle on a crimson background\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # instead of a database, whose package is not a dependency
    monkeypatch.syspath_prepend(ROOT / "examples/hill_climbing")  # which docs/extending.md exports
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no input
    return tmp_path


PARAMS = [pytest.param(page, id=page.stem, marks=[] if page.stem == "README" else [pytest.mark.slow]) for page in PAGES]


@pytest.mark.parametrize("page", PARAMS)
def test_commands_in_the_page_run(page, workspace, tiny):
    for program, *args in commands(page):
        if program == "python" and args[0] == "train.py":
            hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
            args = [word.replace("sqlite:///mlflow.db", "file:mlflow") for word in args]
            args = [tiny if word == hub else re.sub(r"\$\(cat (.*?)\)", content, word) for word in args[1:]]
            short = SHORT
            if "--data.prompts" in args:
                method = Path(args[args.index("--config") + 1]).stem
                short = ["--model.sampler.num_inference_steps=2", "--model.seeds=1", *SHORT_OF_PROMPTS[method]]
            short = [*short, "--trainer.accelerator=cpu"] if args[0] in ("fit", "check", "dry-run") else []
            if any(word.startswith("configs/models/") for word in args):  # their weights are not available here
                short += ["--model.backbone", tiny, "--model.backbone.image_size=16"]
            if "--trainer.devices" in args:
                run_processes(["train.py", *args, *short])
            else:
                main([*args, *short, *(["--generations=2", "--population=2"] if "--mix" in args else [])])
        elif program == "torchrun":
            run_processes(["-m", "torch.distributed.run", *args, *SHORT, "--trainer.accelerator=cpu"])
        elif program == "tensorboard":
            inspected = subprocess.run(
                [sys.executable, "-m", "tensorboard.main", "--inspect", *args],
                capture_output=True,
                text=True,
                check=True,
            )
            assert "train/loss" in inspected.stdout
    if page.name == "README.md":
        run = workspace / "runs" / "mine"
        listed = re.findall(
            r"^\| `([^`…]+)", page.read_text().partition("is in a run folder")[2].partition("The fields")[0], re.M
        )
        missing = [name for name in listed if not list(run.glob(f"{name.rstrip('/')}*"))]
        assert not missing
        assert listed
        assert len(list((run / "images").iterdir())) == 2 * 4


@pytest.mark.slow
def test_python_code_in_the_page_runs(workspace, capsys, monkeypatch):
    monkeypatch.setattr(refinement, "FINAL_SEEDS", 2)
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    short = code.replace("steps=30", "steps=6").replace("steps=5", "steps=2")
    assert short.count("steps=2") == 2
    names = {}
    exec(compile(short, "docs/python.md", "exec"), names)
    assert names["result"].prompt in capsys.readouterr().out
    assert (workspace / "again.png").exists()
    assert sum(names["sharp"].details.metric_after) > sum(names["sharp"].details.metric_before)
    assert names["invariant"].details.target_seed == 7


@pytest.mark.slow
def test_trainer_in_the_page_runs(workspace):
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    main(
        "fit --config configs/ph2p.yaml --data.images photos --run runs/mine --trainer.accelerator cpu".split() + SHORT
    )
    names = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    assert [images.shape[:3] for images in names["images"]] == [(1, 2, 3)] * 2
