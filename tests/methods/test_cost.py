"""The denoiser samples in a record match those that the denoiser processed."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from searches import fit

from lightning_prompts.backbones import sampling_loop
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import (
    GCG,
    PEZ,
    PH2P,
    TRAINER,
    ClipWords,
    DPODiff,
    MetricGuidance,
    RandomTokens,
    SeedInvariance,
    TextualInversion,
)
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.rerank import Rerank
from lightning_prompts.objectives import Sharpness
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = {"sampler": SamplerSettings(3), "log_images_every_n_steps": 0}
INVERTERS = [
    (PEZ, {}),
    (PEZ, {"loss_weights": LossWeights(denoising=0.0, clip=1.0)}),
    (PH2P, {"optimizer": torch.optim.Adam, "restart_every": 2}),
    (PH2P, {"optimizer": partial(BatchedLBFGS, max_iter=2)}),
    (PH2P, {"optimizer": partial(BatchedLBFGS, max_iter=2, line_search_fn="strong_wolfe")}),
    (GCG, {"candidates": 3, "topk": 8}),
    (GCG, {"candidates": 2, "topk": 8, "prefilter": 2, "rerank": Rerank(1.0, 3, 2)}),
    (TextualInversion, {}),
    (RandomTokens, {}),
    (ClipWords, {}),
]
OTHERS = [
    (DPODiff, {"budget": 6, "population": 2, "schedule": "fix-1", "gradient_share": 0.5}),
    (
        DPODiff,
        {
            "budget": 6,
            "population": 2,
            "sampler": SamplerSettings(3, 1.0),
            "negative": [],
            "positive": ["synonyms"],
            "solver": "evolution",
        },
    ),
    (
        DPODiff,
        {
            "budget": 6,
            "population": 2,
            "schedule": "fix-0",
            "grad_steps": 2,
            "gradient_share": 0.8,
            "sampler": SamplerSettings(3, 1.0),
            "negative": [],
            "positive": ["synonyms"],
        },
    ),
    (MetricGuidance, {"objective": Sharpness(), "steps": 3}),
    (
        MetricGuidance,
        {
            "objective": Sharpness(),
            "steps": 3,
            "sampler": SamplerSettings(3, 1.0),
            "grad_steps": 2,
            "score_every_n_steps": 2,
        },
    ),
    (SeedInvariance, {"steps": 3, "seeds_per_step": 3, "compare": "latents", "stages": [1, 3]}),
    (
        SeedInvariance,
        {"steps": 2, "compare": "latents", "stages": [2], "grad_steps": 1, "sampler": SamplerSettings(3, 1.0)},
    ),
]


def count_denoiser_samples(module):
    """Count the samples of the denoiser, and those with a gradient."""
    counts = {"forward": 0, "backward": 0}
    forward = module.backbone.denoiser.forward

    def count(sample, *args, **kwargs):
        counts["forward"] += len(sample)
        output = forward(sample, *args, **kwargs)
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: counts.update(backward=counts["backward"] + len(gradient)))
        return output

    module.backbone.denoiser.forward = count
    return counts


def without_counting(function, counts):
    """Exclude a function from the count."""

    def run(*args):
        before = dict(counts)
        result = function(*args)
        counts.update(before)
        return result

    return run


@pytest.mark.parametrize(("method", "settings"), INVERTERS)
def test_cost_of_inversion_counts_every_denoiser_sample(method, settings, tiny, image_folder, tmp_path):
    module = method(backbone=tiny, num_tokens=2, score_every_n_steps=2, **settings, **FEW)
    counts = count_denoiser_samples(module)
    problems = fit(module, image_folder, tmp_path, steps=3, num_noise_samples=3, num_validation_samples=4)
    assert sum(problem.unet_samples for problem in problems) == counts["forward"] + counts["backward"] > 0


@pytest.mark.parametrize(("method", "settings"), OTHERS)
def test_cost_of_steering_counts_every_denoiser_sample(method, settings, tiny, tmp_path, monkeypatch):
    # A checkpointed call is computed twice, the second time for its gradient alone.
    monkeypatch.setattr(sampling_loop, "checkpoint", lambda function, *arguments, **how: function(*arguments))
    module, data = method(backbone=tiny, seeds=2, **FEW | settings), Prompts(["a small cat", "two dogs"])
    counts = count_denoiser_samples(module)
    if method is SeedInvariance:  # the samples of target images are not counted
        for name in ("set_rows", "targets"):
            monkeypatch.setattr(module, name, without_counting(getattr(module, name), counts))
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)})
    trainer.fit(module, datamodule=data)
    spent = sum(problem.unet_samples for problem in data.folder.load().values())
    assert spent == counts["forward"] + counts["backward"] > 0
