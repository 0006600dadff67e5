"""Every method on every family: searched, resumed, tested and drawn from, or refused in one sentence."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightning_prompts import cli, guide, invert
from lightning_prompts.backbones import load_backbone
from lightning_prompts.callbacks import PromptCheckpoint
from lightning_prompts.main import main
from lightning_prompts.objectives import Sharpness

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a small cat on a red background"
SEARCH = {"--model.sampling_steps": "2", "--model.image_size": "16", "--model.sample_every": "0"}
PICTURE = {"--data.samples": "2", "--data.validation_samples": "2", "--model.tokens": "2"}
PROMPTED = {"--data.prompts": PROMPT, "--model.seeds": "2"}
METHODS = {
    "PH2P": PICTURE,
    "PEZ": PICTURE,
    "GCG": {**PICTURE, "--model.candidates": "3"},
    "TextualInversion": PICTURE,
    "ClipWords": PICTURE,
    "DPODiff": {
        "--data.prompts": PROMPT, "--model.budget": "4", "--model.population": "1", "--model.select": "1", "--model.seeds": "1",
        "--model.gradient_share": "0.5", "--model.schedule": "fix-0", "--model.positive": "[neighbours]", "--model.negative": "[library]",
    },
    "MetricGuidance": {**PROMPTED, "--model.objective": "Sharpness"},
    "SeedInvariance": {**PROMPTED, "--model.seeds_per_step": "1"},
    "HumanFeedback": {
        "--data.prompts": PROMPT, "--model.chooser": "Scripted", "--model.texts": "6", "--model.candidates": "3",
    },
}  # fmt: skip
GUIDES_ITSELF = ("lcm", "flux", "flux-schnell")
REFUSED = {
    **{("ClipWords", family): "reads 554 tokens of width 32 and the model's text encoder" for family in ("flux", "flux-schnell", "pixart")},
    **{("DPODiff", family): "guides itself, so that a negative prompt does nothing; search other words" for family in GUIDES_ITSELF},
    ("DPODiff", "sd-turbo"): "With a guidance of 1 a negative prompt does nothing; give --model.guidance_scale above 1",
}  # fmt: skip
FAMILIES = [
    family for family in families.BUILD if family not in ("sd1", "sd2", "playground")
]  # which other tests are about


class Stopping(PromptCheckpoint):
    """Saves after the second step and stops the program."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer)
        if batch.steps[0] == 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The families' folders, written when they are first asked for."""
    found = {}

    def folder(family):
        if family not in found:
            found[family] = families.save_with_clip(family, tmp_path_factory.mktemp(family))
        return found[family]

    return folder


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def command(name, run, *args):
    """Runs a command; gives its exit code."""
    try:
        main([name, "--run", str(run), "--trainer.accelerator", "cpu", *args])
    except SystemExit as stop:
        return stop.code
    return 0


def settings(method, folder, picture, steps):
    """A search of so many steps."""
    given = {**SEARCH, **METHODS[method]}
    if "--data.prompts" not in given:
        given["--data.images"] = picture
    if method == "HumanFeedback":
        given["--model.chooser.wants"] = picture
    if method != "DPODiff":  # whose budget says how long it searches
        given["--data.steps" if "--data.images" in given else "--model.steps"] = str(steps)
    return ["--model", method, "--model.backbone", folder, *(x for pair in given.items() for x in pair)]


def found(run):
    """What a run has found, but for the seconds it took and the last digit of a cosine."""
    files = {path.name: load_file(path) for path in run.glob("*.safetensors")}
    (problem,) = json.loads((run / "result.json").read_text())["problems"]
    problem["similarity"] = round(problem.get("similarity") or 0.0, 5)
    return {name: value for name, value in problem.items() if name != "seconds"}, files


def test_table_of_the_docs_is_what_is_tested():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = page[page.index("| | sd-turbo") :].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    told = {(row[0], family): cell == "yes" for row in rows for family, cell in zip(head[1:], row[1:], strict=True)}
    assert told == {(method, family): (method, family) not in REFUSED for method in METHODS for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_company_changes_nothing(family, folders, tmp_path):
    """Two problems together come to what each of them comes to alone."""
    backbone = load_backbone(folders(family), image_size=16)
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(files[-1])
    how = {"backbone": backbone, "sampling_steps": 2, "steps": 2, "device": "cpu"}
    pictured = {
        "method": "textual_inversion",
        "start": "random",
        "tokens": 2,
        "samples": 2,
        "validation_samples": 2,
        "lr": 0.02,
    }
    prompts = ["a red cat", "two dogs beside a tree"]
    smooth = {"optimizer": "sgd", "lr": 1.0}  # the sign that AdamOnLion takes turns where a gradient is next to nothing
    together = [*invert(files, **pictured, **how), *guide(prompts, Sharpness(), **smooth, **how)]
    alone = [invert(file, **pictured, **how) for file in files]
    alone += [guide(prompt, Sharpness(), **smooth, **how) for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.record.key == other.record.key
        assert one.record.validation_loss == pytest.approx(other.record.validation_loss, rel=1e-4)
        for found, expected in ((one.embedding, other.embedding), (one.prompt_embeds, other.prompt_embeds)):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family, method, folders, picture, tmp_path, capsys, monkeypatch):
    folder = folders(family)
    before = load_backbone(folder).state_dict()
    run, again = tmp_path / "run", tmp_path / "again"
    code = command("fit", run, *settings(method, folder, picture, 3))
    if reason := REFUSED.get((method, family)):
        assert code == 2
        assert reason in capsys.readouterr().err
        return
    assert code == 0, capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(cli, "PromptCheckpoint", Stopping)
        assert command("fit", again, *settings(method, folder, picture, 3)) == 130
    assert command("fit", again, *settings(method, folder, picture, 3), "--ckpt_path", "last") == 0
    (one, files), (other, theirs) = found(run), found(again)
    assert one == other
    assert files.keys() == theirs.keys()
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, theirs[name][key], atol=1e-5, rtol=1e-5
            )  # texts encoded alone or together
    assert command("test", run) == 0
    assert found(run)[0] == one
    assert command("predict", run, "--seeds", "3") == 0
    assert len(list((run / "pictures").glob("*.png"))) == 1
    after = load_backbone(folder).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
