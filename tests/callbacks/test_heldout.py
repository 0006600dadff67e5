"""Held-out scores come from a CLIP that is not used by the search, in any folder and precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from searches import fit
from transformers import CLIPModel

from lightning_prompts.backbones import EMOJI
from lightning_prompts.callbacks import Results, Scores
from lightning_prompts.commands.main import main
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PH2P, ClipWords, DPODiff, HumanFeedback, MetricGuidance, SeedInvariance
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.rerank import Rerank
from lightning_prompts.methods.steering.human_feedback import Scripted
from lightning_prompts.objectives import ClipQuality, ClipSimilarity, Sharpness
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = {"sampler": SamplerSettings(2), "log_images_every_n_steps": 0}


@pytest.fixture
def copied(tiny, tmp_path):
    """Copy the weights of the tiny model's CLIP to another folder as float16."""
    folder = shutil.copytree(f"{tiny}/clip", tmp_path / "another")
    CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def other(tiny, tmp_path):
    """Create a CLIP of the same shape with other weights."""
    folder = shutil.copytree(f"{tiny}/clip", tmp_path / "other")
    torch.manual_seed(1)
    CLIPModel(CLIPModel.from_pretrained(folder).config).save_pretrained(folder)
    return str(folder)


def chooser(tiny, image_folder):
    scripted = Scripted(str(image_folder / "0.png"))
    scripted.clip = ClipSimilarity(f"{tiny}/clip")  # as `open` does
    return scripted


@pytest.mark.parametrize(
    "create_method",
    [
        lambda tiny, image_folder: PH2P(backbone=tiny, loss_weights=LossWeights(clip=0.1), **FEW),
        lambda tiny, image_folder: PH2P(backbone=tiny, rerank=Rerank(0.1), **FEW),
        lambda tiny, image_folder: PH2P(backbone=tiny, init="clip_words", **FEW),
        lambda tiny, image_folder: GCG(backbone=tiny, prefilter=2, **FEW),
        lambda tiny, image_folder: ClipWords(backbone=tiny, **FEW),
        lambda tiny, image_folder: DPODiff(backbone=tiny, schedule="fix-0", **FEW),
        lambda tiny, image_folder: MetricGuidance(backbone=tiny, objective=ClipQuality(), **FEW),
        lambda tiny, image_folder: MetricGuidance(
            backbone=tiny, objective=Sharpness(), constraint=ClipQuality(), **FEW
        ),
        lambda tiny, image_folder: SeedInvariance(backbone=tiny, **FEW),
        lambda tiny, image_folder: HumanFeedback(backbone=tiny, chooser=chooser(tiny, image_folder), **FEW),
    ],
)
def test_clip_of_the_search_is_refused_by_its_weights(create_method, tiny, image_folder, copied, other):
    method = create_method(tiny, image_folder)
    for scorer in (f"{tiny}/clip", copied):
        with pytest.raises(UserError, match="would not be held out"):
            Scores(scorer=scorer).heldout(method)
    assert Scores(scorer=other).heldout(method).name == other


def test_clip_that_the_search_does_not_use_may_score(tiny, copied):
    for method in (
        PH2P(backbone=tiny, **FEW),
        GCG(backbone=tiny, **FEW),
        SeedInvariance(backbone=tiny, compare="latents", **FEW),
    ):
        assert Scores(scorer=copied).heldout(method).name == copied


def test_scorer_of_the_embedded_model_is_held_out():
    method = ClipWords(backbone="emoji", **FEW)
    assert Scores().heldout(method)
    assert not ClipSimilarity(str(EMOJI.parent / "scorer")).has_same_image_encoder(method.clip)


@pytest.mark.parametrize("change", [0.05, -0.05])
def test_clip_with_changed_weights_is_another_encoder(change, tiny, copied):
    one, two = ClipSimilarity(f"{tiny}/clip"), ClipSimilarity(copied)
    assert one.has_same_image_encoder(two)
    two.clip.vision_model.post_layernorm.weight.data[3] += change
    assert not one.has_same_image_encoder(two)


def test_refused_scorer_leaves_no_run_folder(tiny, image_folder, copied, tmp_path, capsys):
    run = tmp_path / "run"
    args = [
        "fit",
        "--model",
        "ClipWords",
        f"--model.backbone={tiny}",
        "--data",
        "ImagesToPrompts",
        f"--data.images={image_folder / '0.png'}",
    ]
    with pytest.raises(SystemExit, match="2"):
        main([*args, "--run", str(run), "--scorer", copied])
    assert "--scorer" in capsys.readouterr().err
    assert not run.exists()


def test_refused_scorer_keeps_earlier_scores(tiny, image_folder, copied, other, tmp_path, capsys):
    run = tmp_path / "run"
    args = [
        "fit",
        "--model",
        "ClipWords",
        f"--model.backbone={tiny}",
        "--data",
        "ImagesToPrompts",
        f"--data.images={image_folder / '0.png'}",
    ]
    main([*args, "--run", str(run), "--scorer", other, "--model.steps", "1"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert json.loads((run / "result.json").read_text())["problems"][0]["heldout_clip_similarity"]
    for command in (["test", "--run", str(run)], [*args, "--run", str(run), "--ckpt_path", "last"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--scorer", copied])
        assert "would not be held out" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before


def test_python_calls_refuse_the_clip_of_the_search(tiny, image_folder, copied, tmp_path):
    with pytest.raises(UserError, match="would not be held out"):
        fit(
            ClipWords(backbone=tiny, **FEW),
            image_folder / "0.png",
            tmp_path / "run",
            [Results(Scores(scorer=copied))],
            steps=1,
        )
    assert not Path(tmp_path / "run" / "result.json").exists()
