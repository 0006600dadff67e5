"""Search, resume, test and predict with every method on every family, or refuse it in one sentence."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from inputs import noise
from searches import result_of

from lightning_prompts import invert, metric_guidance, runner
from lightning_prompts.backbones import load_backbone
from lightning_prompts.commands.main import main
from lightning_prompts.engine.checkpoint import PromptCheckpoint
from lightning_prompts.methods import PEZ, DPODiff, HumanFeedback, MetricGuidance, SeedInvariance
from lightning_prompts.methods.inversion.rerank import Rerank
from lightning_prompts.objectives import Sharpness
from lightning_prompts.python_search import CONFIGS
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a small cat on a red background"
SEARCH = {
    "--model.sampler.num_inference_steps": "2",
    "--model.backbone.image_size": "16",
    "--model.log_images_every_n_steps": "0",
}
IMAGE = {"--data.num_noise_samples": "2", "--data.num_validation_samples": "2", "--model.num_tokens": "2"}
PROMPTED = {"--data.prompts": PROMPT, "--model.seeds": "2"}
METHODS = {
    "PH2P": {**IMAGE, "--model.optimizer.max_iter": "3"},
    "PEZ": IMAGE,
    "GCG": {**IMAGE, "--model.candidates": "3"},
    "TextualInversion": IMAGE,
    "ClipWords": IMAGE,
    "RandomTokens": IMAGE,
    "DPODiff": {
        "--data.prompts": PROMPT,
        "--model.budget": "4",
        "--model.population": "1",
        "--model.elites": "1",
        "--model.seeds": "1",
        "--model.gradient_share": "0.5",
        "--model.schedule": "fix-0",
        "--model.positive": "[neighbors]",
        "--model.negative": "[library]",
    },
    "MetricGuidance": {**PROMPTED, "--model.objective": "Sharpness"},
    "SeedInvariance": {**PROMPTED, "--model.seeds_per_step": "1"},
    "HumanFeedback": {
        "--data.prompts": PROMPT,
        "--model.chooser": "Scripted",
        "--model.texts": "6",
        "--model.candidates": "3",
    },
}
GUIDES_ITSELF = ("lcm", "flux", "flux-schnell")
REFUSED = {
    **{
        ("DPODiff", family): "has guidance built in, so a negative prompt does nothing; search other words"
        for family in GUIDES_ITSELF
    },
    (
        "DPODiff",
        "sd-turbo",
    ): "With --model.sampler.guidance_scale 1, a negative prompt does nothing; give a value above 1",
}
FAMILIES = [
    "sd-turbo",
    "lcm",
    "sdxl",
    "sd3",
    "sd3, T5",
    "flux",
    "flux-schnell",
    "pixart",
]  # other tests use sd1 and sd2


DEFAULT = {
    *REFUSED,
    ("PH2P", "sd3"),
    ("PEZ", "flux"),
    ("GCG", "sdxl"),
    ("TextualInversion", "sd3, T5"),
    ("ClipWords", "pixart"),
    ("RandomTokens", "lcm"),
    ("DPODiff", "sd3"),
    ("MetricGuidance", "sd-turbo"),
    ("SeedInvariance", "flux-schnell"),
    ("HumanFeedback", "sdxl"),
}


def params():
    """Return all cells; those that do not run by default are marked as slow."""
    for family in FAMILIES:
        for method in METHODS:
            yield pytest.param(family, method, marks=[] if (method, family) in DEFAULT else [pytest.mark.slow])


def slow_but(default, names):
    """Return names, all but one of which are marked as slow."""
    return [name if name == default else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Stopping(PromptCheckpoint):
    """Save after the second step and stop the program."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer)
        if batch.steps[0] == 1:
            raise KeyboardInterrupt


@pytest.fixture
def image(tmp_path):
    noise().save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def command(name, run, *args):
    """Run a command; return its exit code."""
    try:
        main([name, "--run", str(run), "--trainer.accelerator", "cpu", *args])
    except SystemExit as stop:
        return stop.code
    return 0


def settings(family, method, folder, image, steps):
    """Return the arguments of a search with a number of steps."""
    given = {**SEARCH, **METHODS[method], **({"--model.backbone.vocabulary": "t5"} if family.endswith("T5") else {})}
    if "--data.prompts" not in given:
        given["--data.images"] = image
    if method == "HumanFeedback":
        given["--model.chooser.wants"] = image
    if method != "DPODiff":  # its budget is the length of the search
        given["--model.steps"] = str(steps)
    return ["--model", method, "--model.backbone", folder, *(x for pair in given.items() for x in pair)]


def test_table_in_the_docs_equals_the_tested_cells():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = page[page.index("| | sd-turbo") :].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    documented = {
        (row[0], family): cell == "yes" for row in rows for family, cell in zip(head[1:], row[1:], strict=True)
    }
    assert documented == {
        (method, family): (method, family) not in REFUSED for method in METHODS for family in FAMILIES
    }


@pytest.mark.parametrize("family", slow_but("sd3", [family for family in FAMILIES if "," not in family]))
def test_batch_of_two_equals_each_alone(family, folders, tmp_path):
    """Two problems in one batch get the results of each alone."""
    backbone = load_backbone(folders(family), image_size=16)
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        noise(seed=i).save(files[-1])
    how = {"backbone": backbone, "sampler": SamplerSettings(2), "steps": 2, "device": "cpu"}
    of_images = {
        "method": "textual_inversion",
        "init": "random",
        "num_tokens": 2,
        "num_noise_samples": 2,
        "num_validation_samples": 2,
        "optimizer": {"lr": 0.02},
    }
    prompts = ["a red cat", "two dogs beside a tree"]
    # The sign in AdamOnLion flips where a gradient is almost zero.
    smooth = {"optimizer": partial(torch.optim.SGD, lr=1.0)}
    batch = [*invert(files, **of_images, **how), *metric_guidance(prompts, Sharpness(), **smooth, **how)]
    alone = [invert(file, **of_images, **how) for file in files]
    alone += [metric_guidance(prompt, Sharpness(), **smooth, **how) for prompt in prompts]
    for one, other in zip(batch, alone, strict=True):
        assert one.record.key == other.record.key
        assert one.record.validation_loss == pytest.approx(other.record.validation_loss, rel=1e-4)
        for tensor, expected in ((one.embedding, other.embedding), (one.prompt_embeds, other.prompt_embeds)):
            assert (tensor is None) == (expected is None)
            if tensor is not None:
                torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)


def test_default_cells_cover_every_family_and_method():
    assert {family for _, family in DEFAULT - REFUSED.keys()} == set(FAMILIES)
    assert {method for method, _ in DEFAULT - REFUSED.keys()} == set(METHODS)


@pytest.mark.parametrize(("family", "method"), list(params()))
def test_method_on_family_runs_and_resumes(family, method, folders, image, tmp_path, capsys, monkeypatch):
    folder = folders(family)
    before = files_of(folder)
    run, again, given = tmp_path / "run", tmp_path / "again", settings(family, method, folder, image, 3)
    code = command("fit", run, *given)
    if reason := REFUSED.get((method, family)):
        assert code == 2
        assert reason in capsys.readouterr().err
        return
    assert code == 0, capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", Stopping)
        assert command("fit", again, *given) == 130
    assert command("fit", again, *given, "--ckpt_path", "last") == 0
    (one, files), (other, theirs) = result_of(run), result_of(again)
    assert one == other
    assert files.keys() == theirs.keys()
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[name][key], atol=1e-5, rtol=1e-5)  # texts encoded alone or batch
    assert command("test", run) == 0
    assert result_of(run)[0] == one
    assert command("predict", run, "--seeds", "3") == 0
    assert len(list((run / "images").glob("*.png"))) == 1
    assert files_of(folder) == before


def files_of(folder):
    """Return the files of a model."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*")}


FEW = {"sd-turbo": 1, "lcm": 4, "flux-schnell": 4}
WITHOUT_NEGATIVE = {
    "dpo_diff": ["--model.negative", "[]", "--model.positive", "[neighbors]", "--model.similarity.threshold", "-1"],
    "seed_invariance": ["--model.unconditional", "false"],
}
SHORT = {
    "invert": ["--model.steps", "1", "--model.candidates", "2"],
    "textual_inversion": ["--model.steps", "1"],
    "dpo_diff": ["--model.budget", "1", "--model.population", "1", "--model.solver", "random", "--model.seeds", "1"],
    "metric_guidance": ["--model.steps", "1", "--model.seeds", "1"],
    "seed_invariance": ["--model.steps", "1", "--model.seeds", "1"],
    "human_feedback": ["--model.steps", "1", "--model.seeds", "1", "--model.texts", "5", "--model.chooser", "Scripted"],
}


@pytest.mark.parametrize("config", SHORT)
@pytest.mark.parametrize("family", slow_but("sd-turbo", FEW))
def test_configs_sample_in_the_default_steps_of_the_model(family, config, folders, image, tmp_path, capsys):
    """Few-step models take their own one or four steps, with unchanged configs of shorter length."""
    args = [
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        "--model.backbone",
        folders(family),
        "--model.backbone.image_size",
        "16",
    ]
    args += SHORT[config] + WITHOUT_NEGATIVE.get(config, [])
    args += (
        ["--data.images", image, "--data.num_noise_samples", "1"]
        if config in ("invert", "textual_inversion")
        else ["--data.prompts", PROMPT]
    )
    if config == "human_feedback":
        args += ["--model.chooser.wants", image]
    assert command("fit", tmp_path / "run", *args) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run/result.json").read_text())
    sampling = result["settings"]["sampling"]
    assert result["settings"]["model"]["sampler"]["num_inference_steps"] is None
    assert sampling["num_inference_steps"] == FEW[family]
    assert sampling.get("rerank_steps") == (FEW[family] if config == "invert" else None)
    if config == "dpo_diff":  # images of the prompt and of its candidate
        assert result["problems"][0]["unet_samples"] == 2 * FEW[family]


def test_default_sampling_steps_are_those_of_the_model(folders):
    """At most 10 if the search itself generates images; a given number takes precedence."""
    objective = {"objective": Sharpness()}
    turbo, schnell, flux = (
        load_backbone(folders(name), image_size=16) for name in ("sd-turbo", "flux-schnell", "flux")
    )
    for backbone, own, most in ((turbo, 1, 1), (schnell, 4, 4), (flux, 28, 10)):
        generating = [
            DPODiff(backbone=backbone, negative=[]),
            SeedInvariance(backbone=backbone),
            HumanFeedback(backbone=backbone),
        ]
        assert [
            method.sampler.num_inference_steps
            for method in [*generating, MetricGuidance(backbone=backbone, **objective)]
        ] == [most] * 4
        inverter = PEZ(backbone=backbone, num_tokens=2)
        assert inverter.sampler.num_inference_steps == own
        assert reranking_steps(backbone, Rerank(1.0)) == most
        assert (
            MetricGuidance(backbone=backbone, sampler=SamplerSettings(12), **objective).sampler.num_inference_steps
            == 12
        )
        assert reranking_steps(backbone, Rerank(1.0, num_inference_steps=12)) == 12


def reranking_steps(backbone, rerank):
    """Return the denoising steps of the images by which prompts are reranked."""
    return PEZ(backbone=backbone, num_tokens=2, rerank=rerank).reranker.sampler.num_inference_steps
