"""A setting without effect is refused, with its name and the setting that it depends on."""

import re
from dataclasses import fields, is_dataclass

import pytest
import torch
from searches import fit

from lightning_prompts.commands.main import main
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PEZ, PH2P, ClipWords, DPODiff, MetricGuidance, RandomTokens, SeedInvariance
from lightning_prompts.methods.dpo_diff.semantic_similarity import Similarity
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.rerank import Rerank
from lightning_prompts.objectives import Sharpness
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("method", "given", "unused"),
    [
        (PH2P, {}, {"project_every": 2}),
        (PH2P, {"projection": "immediate"}, {"project_every": 2}),
        (GCG, {}, {"rerank": Rerank(images=3)}),
        (PEZ, {}, {"rerank": Rerank(num_inference_steps=3)}),
        (RandomTokens, {}, {"loss_weights": LossWeights(clip=0.5)}),
        (ClipWords, {}, {"loss_weights": LossWeights(denoising=0)}),
        (MetricGuidance, {"objective": Sharpness()}, {"constraint_tolerance": 0.1}),
        (SeedInvariance, {"compare": "latents"}, {"pixels": 0.5}),
        (SeedInvariance, {"compare": "latents"}, {"clip": "another"}),
        (DPODiff, {"solver": "evolution"}, {"optimizer": torch.optim.RMSprop}),
        (DPODiff, {"solver": "random"}, {"optimizer": torch.optim.SGD}),
        (DPODiff, {"solver": "evolution"}, {"temperature": (2.0, 1.0)}),
        (DPODiff, {"solver": "random"}, {"schedule": "fix-0"}),
        (DPODiff, {"solver": "random"}, {"init_keep_prob": 0.3}),
        (DPODiff, {"solver": "gradient"}, {"mutation": 0.3}),
        (DPODiff, {}, {"similarity": Similarity(0.8)}),
        (DPODiff, {}, {"similarity": Similarity(encoder="another")}),
        (DPODiff, {}, {"protected_words": ["dog"]}),
        (DPODiff, {}, {"neighbors": 3}),
        (DPODiff, {}, {"dictionary": "words.json"}),
    ],
)
def test_setting_without_effect_is_refused(method, given, unused, tiny):
    ((name, value),) = unused.items()
    if is_dataclass(value):  # a group, with one setting that is not at its default
        (name,) = [f"{name}.{own.name}" for own in fields(value) if getattr(value, own.name) != own.default]
    method(backbone=tiny, **given)  # is valid without the setting
    with pytest.raises(UserError, match=rf"--model\.{re.escape(name)} has no effect"):
        method(backbone=tiny, **given, **unused)


@pytest.mark.parametrize(
    ("given", "effect"),
    [
        ({"projection": "delayed", "project_every": 2}, lambda method: method.project_every == 2),
        ({"rerank": Rerank(1.0, 3, 3)}, lambda method: method.reranker.images == 3),
    ],
)
def test_setting_with_effect_is_accepted(given, effect, tiny):
    assert effect(PH2P(backbone=tiny, **given))


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("GCG", "metric"),
        ("TextualInversion", "metric"),
        ("RandomTokens", "metric"),
        ("ClipWords", "init"),
        ("HumanFeedback", "batch_size"),
        ("HumanFeedback", "patience"),
        ("HumanFeedback", "score_every_n_steps"),
    ],
)
def test_method_has_no_settings_without_use(method, setting, tmp_path, capsys):
    data = "Prompts" if method == "HumanFeedback" else "ImagesToPrompts"
    given = ["--data", data, "--data.prompts" if data == "Prompts" else "--data.images", "one"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--run", str(tmp_path / "run"), "--model", method, *given, f"--model.{setting}", "2"])
    error = capsys.readouterr().err
    assert f"--model.{setting} is unknown" in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_loaded_backbone_is_used_unchanged(tiny, image_folder, tmp_path):
    loaded = RandomTokens(backbone=tiny).backbone
    module = RandomTokens(backbone=loaded, sampler=SamplerSettings(2))
    fit(module, image_folder / "0.png", tmp_path, steps=1)
    assert module.backbone is loaded
