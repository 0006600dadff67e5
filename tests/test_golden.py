"""Every config gives the results in tests/golden/: prompts, losses, records and the order of the callbacks.

`REWRITE_GOLDEN=1 pytest tests/test_golden.py` writes the files again, for changes that are meant to change results.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from lightning_prompts import runner
from lightning_prompts.commands import cli
from lightning_prompts.commands.main import main
from lightning_prompts.engine.checkpoint import PromptCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
MODELS = ("emoji", "sdxl", "flux")
STEERING = ("dpo_diff", "human_feedback", "metric_guidance", "seed_invariance")  # methods that take prompts

COMMON = "--trainer.accelerator cpu --trainer.logger CSVLogger --trainer.logger.save_dir logs"
INVERSION = (
    "--data.images 0.png 1.png 2.png --model.steps 5 --data.num_noise_samples 3 --data.num_validation_samples 4 "
    "--model.score_every_n_steps 2"
)
GCG = "--model.candidates 5 --model.topk 16 --model.prefilter 2"
SHORT = {
    "clip_words": "--data.images 0.png 1.png 2.png --data.num_validation_samples 4",
    "gcg": f"{INVERSION} {GCG}",
    "invert": f"{INVERSION} {GCG} --model.rerank.num_inference_steps 2",
    "pez": INVERSION,
    "pez_clip": INVERSION,
    "ph2p": f"{INVERSION} --model.restart_every 3 --model.optimizer.lr 0.2",
    "ph2p_lbfgs": f"{INVERSION} --model.optimizer.max_iter 2 --model.optimizer.max_step_norm 2",
    "random_tokens": INVERSION,
    "textual_inversion": INVERSION,
    "dpo_diff": (
        "--model.budget 12 --model.population 4 --model.seeds 2 --model.schedule fix-1 --model.gradient_share 0.4"
    ),
    "human_feedback": "--model.steps 3 --model.seeds 2 --model.chooser Scripted --model.chooser.wants 0.png",
    "metric_guidance": "--model.steps 4 --model.seeds 2 --model.score_every_n_steps 2",
    "seed_invariance": "--model.steps 4 --model.seeds 2 --model.score_every_n_steps 2",
}
INSTEAD = {  # for models with distilled guidance, or whose CLIP has other tokens
    ("dpo_diff", "flux"): "--model.negative [] --model.positive [synonyms]",
    ("pez_clip", "flux"): "--model.backbone.vocabulary clip",
    ("seed_invariance", "flux"): "--model.unconditional false",
}
TINY = "--model.backbone.image_size 16 --model.backbone.offline true --scorer scorer"

VOLATILE = ("seconds", "stamps", "version")  # differ between runs, or are not results
RENAMED: dict[str, str] = {}  # renamed fields, metrics and callbacks: golden name to current name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Write three images, the prompts that describe them, and the two tiny models; return their folder."""
    folder = tmp_path_factory.mktemp("inputs")
    for i, (shape, color) in enumerate((("rectangle", "red"), ("ellipse", "blue"), ("rectangle", "green"))):
        image = Image.new("RGB", (64, 64), "white")
        getattr(ImageDraw.Draw(image), shape)((16, 16, 47, 47), color)
        image.save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a red square\na small cat\na large tree\n")
    for family in MODELS[1:]:
        (folder / family).mkdir()
        model = Path(families.save_with_clip(family, folder / family))
        for file in model.rglob("*.safetensors"):
            name_weights(file, "model")
    shutil.copytree(folder / "sdxl/model/clip", folder / "scorer")
    name_weights(folder / "scorer/model.safetensors", "scorer")
    return folder


def name_weights(file, salt):
    """Sample a file's weights again, each by its name alone, independently of a library's initialization."""
    weights = load_file(file)
    alone = all(name.startswith("text_model.") for name in weights)  # a CLIPTextModel of transformers 4 has this prefix
    for name, weight in weights.items():
        if weight.is_floating_point() and (weight.ndim > 1 or (weight.numel() > 1 and weight.std() > 0)):
            key = name.removeprefix("text_model.") if alone else name
            seed = int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:4], "big")
            values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weights[name] = values / math.sqrt(weight[0].numel() if weight.ndim > 1 else weight.numel())
    save_file(weights, file, metadata={"format": "pt"})


def arguments(config, model):
    """Return the command of a short search, whose run is the folder `run`."""
    given = [
        "fit",
        "--config",
        str(ROOT / "configs" / f"{config}.yaml"),
        "--run",
        "run",
        *COMMON.split(),
        *SHORT[config].split(),
    ]
    given += ["--data.prompts", "prompts.txt"] if config in STEERING else ["--model.num_tokens", "3"]
    if config != "clip_words":
        given += ["--model.sampler.num_inference_steps", "2"]
    if config != "human_feedback":  # its user sees one prompt at a time
        given += ["--model.batch_size", "2"]  # of three problems, so that one replaces another
    if model != "emoji":
        given += ["--model.backbone", f"{model}/model", *TINY.split()]
    return given + INSTEAD.get((config, model), "").split()


def record_of(problem):
    """Return the fields of a search in a record, without empty fields and without the losses in its reason."""
    problem |= {"others": 0, **(problem.pop("result") or {})}  # only for human feedback now, formerly for every method
    if problem["reason"]:
        problem["reason"] = re.sub(r"-?\d[\d.e+-]*\d", "#", problem["reason"])
    return {name: value for name, value in problem.items() if name not in VOLATILE and value not in (None, [], {})}


def problems_in(run):
    """Return the records of a run, in the order of its inputs."""
    records = (json.loads(path.read_text()) for path in (run / "problems").glob("*.json"))
    return [record_of(record) for record in sorted(records, key=lambda record: record["index"])]


def metrics_in(logs):
    """Return the logged metrics, one dictionary per line."""
    rows = []
    for file in logs.rglob("metrics.csv"):  # HumanFeedback logs none
        with file.open() as lines:
            rows += [{name: float(text) for name, text in line.items() if text} for line in csv.DictReader(lines)]
    return rows


def rounded(value):
    """Round every number of nested lists and dictionaries to six digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def renamed(value):
    """Replace old names of fields, metrics and callbacks in a golden file by the current ones."""
    if isinstance(value, dict):
        return {RENAMED.get(name, name): renamed(item) for name, item in value.items()}
    return [renamed(item) for item in value] if isinstance(value, list) else value


def assert_close(result, golden, where=""):
    """Compare texts, integers and structure exactly, and other numbers to one part in a thousand.

    Processors round differently.
    """
    if isinstance(golden, dict):
        assert result.keys() == golden.keys(), where
        for name in golden:
            assert_close(result[name], golden[name], f"{where}.{name}")
    elif isinstance(golden, list):
        assert len(result) == len(golden), where
        for i, (one, other) in enumerate(zip(result, golden, strict=True)):
            assert_close(one, other, f"{where}[{i}]")
    elif isinstance(golden, float):
        assert result == pytest.approx(golden, rel=1e-3, abs=1e-4), where
    else:
        assert result == golden, where


def golden_of(config, model):
    return json.loads((GOLDEN / model / f"{config}.json").read_text())


@pytest.fixture
def workspace(inputs, tmp_path, monkeypatch):
    """Work in a folder for this test, with the inputs under relative names, which are part of the keys."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


DEFAULT = {(config, "emoji") for config in ("invert", "ph2p", "dpo_diff")} | {("metric_guidance", "flux")}
CASES = [
    pytest.param(config, model, marks=[] if (config, model) in DEFAULT else [pytest.mark.slow])
    for model in MODELS
    for config in CONFIGS
]


@pytest.mark.parametrize(("config", "model"), CASES)
def test_results_equal_the_golden_files(config, model, workspace, monkeypatch):
    order = []

    class RecordingCLI(cli.CLI):
        def fit(self, *args, **kwargs):
            order.extend(type(callback).__name__ for callback in self.trainer.callbacks)
            super().fit(*args, **kwargs)

    monkeypatch.setattr(cli, "CLI", RecordingCLI)
    main(arguments(config, model))
    result = {"callbacks": order, "problems": problems_in(workspace / "run"), "metrics": metrics_in(workspace / "logs")}
    if os.environ.get("REWRITE_GOLDEN"):
        (GOLDEN / model).mkdir(parents=True, exist_ok=True)
        (GOLDEN / model / f"{config}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    golden = golden_of(config, model)
    assert result["callbacks"] == [RENAMED.get(name, name) for name in golden["callbacks"]]
    assert_close(result["problems"], renamed(golden["problems"]))
    assert_close(result["metrics"], renamed(golden["metrics"]))


@pytest.mark.parametrize(
    "config", [pytest.param(config, marks=[] if config == "gcg" else [pytest.mark.slow]) for config in CONFIGS]
)
def test_resumed_search_equals_the_golden_files(config, workspace, monkeypatch):
    class Stopping(PromptCheckpoint):
        steps = 0

        def on_train_batch_end(self, trainer, *args):
            self._save(trainer)
            self.steps += 1
            if self.steps == (1 if config == "clip_words" else 3):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", Stopping)
        with pytest.raises(SystemExit):
            main(arguments(config, "emoji"))
    main([*arguments(config, "emoji"), "--ckpt_path", "last"])
    assert_close(problems_in(workspace / "run"), renamed(golden_of(config, "emoji")["problems"]))


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for config in CONFIGS if config != "human_feedback"])
def test_two_ranks_equal_the_golden_files(config, workspace):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(config, "emoji"), "--trainer.devices", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_close(problems_in(workspace / "run"), renamed(golden_of(config, "emoji")["problems"]))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_validate_and_test_equal_the_golden_files(config, workspace, capsys):
    """`validate` repeats the losses, and `test` the scores."""
    main(arguments(config, "sdxl"))
    golden = renamed(golden_of(config, "sdxl")["problems"])
    if config != "human_feedback":  # the user's choices have no loss
        capsys.readouterr()
        main(["validate", "--run", "run"])
        printed = [float(loss) for loss in re.findall(r"(?m)^(\d+\.\d+)  ", capsys.readouterr().out)]
        losses = [abs(problem["validation_loss"]) for problem in golden]
        if config == "metric_guidance":  # shows the metric, not the weighted loss
            losses = [sum(problem["metric_after"]) / len(problem["metric_after"]) for problem in golden]
        assert_close(sorted(printed), sorted(losses))
    main(["test", "--run", "run", "--scorer", "scorer"])
    assert_close(problems_in(workspace / "run"), golden)
