"""The arithmetic of searches matches formulas written out here, or PyTorch's own optimizers."""

import pytest
import torch
from searches import fit, set_batch

from lightning_prompts.methods import GCG, PEZ, PH2P, MetricGuidance, TextualInversion
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.objectives import Sharpness
from lightning_prompts.objectives.base import Objective
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.runs.record import Problem, SteeringResult
from lightning_prompts.sampling import SamplerSettings, seeding

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = {"sampler": SamplerSettings(2), "log_images_every_n_steps": 0}


def test_draws_for_different_uses_have_different_seeds():
    names = ("VALIDATION", "INIT", "REGENERATION", "WORD_MAPS", "RERANK", "SEARCH", "FINAL", "CHECK")
    steps = [getattr(seeding, name) for name in names]
    assert set(names) == {
        name for name, value in vars(seeding).items() if isinstance(value, int) and name != "FINAL_SEEDS"
    }
    assert len(set(steps)) == len(steps)
    assert max(steps) < 0  # and those of a search begin at 0
    assert min(steps) == seeding.CHECK  # which goes on downwards


@pytest.mark.parametrize("offset", [0.5, 1e-6, -0.5])
def test_gcg_takes_the_best_candidate_only_if_it_is_better(offset, tiny, image_folder, tmp_path):
    class Rigged(GCG):
        def _losses(self, rows, candidates, sound, samples):
            self.before = self.prompt.project()[rows]
            ids = self.prompt.ids(self.before)
            loss = self.loss(rows, ids, self.prompt.table[ids], samples)
            return loss[:, None] + offset + torch.arange(candidates.shape[1])

    module = Rigged(backbone=tiny, num_tokens=3, candidates=4, topk=8, **FEW)
    fit(module, image_folder, tmp_path, steps=1)
    moved = (module.prompt.project() != module.before).any(1)
    assert moved.all() if offset < 0 else not moved.any()


@pytest.mark.parametrize(("weight", "clip_weight"), [(1.0, 0.3), (0.5, 2.0), (0.0, 3.0), (2.0, 0.0)])
def test_loss_is_the_weighted_sum_of_its_terms(weight, clip_weight, tiny, image_folder, tmp_path):
    module = PEZ(backbone=tiny, num_tokens=3, loss_weights=LossWeights(weight, clip=clip_weight), **FEW)
    fit(module, image_folder / "0.png", tmp_path, steps=1)
    set_batch(module, module.data.folder.load().values())
    rows = torch.tensor([0])
    samples = module.samples(rows, module.data.step())
    token_ids = module.prompt.allowed.nonzero()[3:6].view(1, 3)
    ids = module.prompt.ids(token_ids)
    embeddings = module.prompt.table[ids]
    with torch.no_grad():
        found = module.loss(rows, ids, embeddings, samples)
        told = module.backbone.encode(ids, embeddings)
        noisy = module.backbone.add_noise(samples.latents[0], samples.noise[0], samples.timesteps[0])
        output = module.backbone.denoise(noisy, samples.timesteps[0], told.expand(len(noisy), -1, -1))
        denoising = (output - samples.noise[0]).square().mean()  # the tiny model predicts the noise
        clip = 0.0
        if clip_weight:
            (image,) = module.data.target_images(module.batch.records)
            text = module.clip.text_features(ids)[0]
            clip = 1 - float(text @ torch.nn.functional.normalize(module.clip.features(image), dim=1)[0])
    assert float(found) == pytest.approx(weight * float(denoising) + clip_weight * clip, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "decay"),
    [(PEZ, {}, 0.1), (PEZ, {"weight_decay": 0.4, "lr": 0.3}, 0.4), (TextualInversion, {"weight_decay": 0.2}, 0.2)],
)
def test_steps_are_those_of_torchs_adamw(method, settings, decay, tiny):
    module = method(backbone=tiny, num_tokens=3, **settings, **FEW)
    module.prompt.embeddings.data = torch.randn(2, 3, module.prompt.embeddings.shape[2])
    other = torch.nn.Parameter(module.prompt.embeddings.detach().clone())
    ours, theirs = module.configure_optimizers(), torch.optim.AdamW([other], lr=module.lr, weight_decay=decay)
    for _ in range(4):
        module.prompt.embeddings.grad = torch.randn_like(other)
        other.grad = module.prompt.embeddings.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(module.prompt.embeddings.data, other.data)


@pytest.mark.parametrize(
    ("method", "settings", "projected"),
    [
        (PEZ, {}, True),
        (PH2P, {"projection": "immediate", "optimizer": "adam"}, True),
        (PH2P, {"optimizer": "adam"}, False),
        (PH2P, {"max_iter": 1}, False),
        (TextualInversion, {}, False),
    ],
)
def test_gradient_is_taken_where_the_paper_takes_it(method, settings, projected, tiny, image_folder, tmp_path):
    """PEZ computes it at the nearest tokens, PH2P and textual inversion at the continuous embeddings."""
    taken = []

    class Watched(method):
        def loss(self, rows, ids, embeddings, samples, *rest, **how):
            if embeddings.requires_grad:
                free = self.prompt.embeddings.detach()[rows]
                near = self.prompt.table[self.prompt.project()[rows]]
                assert not torch.allclose(free, near, atol=1e-4)
                taken.append(
                    torch.allclose(embeddings[:, self.prompt.positions], near if projected else free, atol=1e-6)
                )
            return super().loss(rows, ids, embeddings, samples, *rest, **how)

        def init_params(self, rows):
            start = super().init_params(rows)
            return start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))

    fit(Watched(backbone=tiny, num_tokens=3, **settings, **FEW), image_folder / "0.png", tmp_path, steps=2)
    assert taken
    assert all(taken)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [({"optimizer": "adam", "lr": 0.3}, torch.optim.Adam), ({"optimizer": "sgd", "lr": 0.3}, torch.optim.SGD)],
)
def test_ph2p_steps_are_those_of_torchs_optimizers(settings, theirs, tiny):
    module = PH2P(backbone=tiny, num_tokens=3, **settings, **FEW)
    module.prompt.embeddings.data = torch.randn(2, 3, module.prompt.embeddings.shape[2])
    other = torch.nn.Parameter(module.prompt.embeddings.detach().clone())
    optimizers = module.configure_optimizers(), theirs([other], lr=0.3)
    for _ in range(4):
        module.prompt.embeddings.grad = torch.randn_like(other)
        other.grad = module.prompt.embeddings.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(module.prompt.embeddings.data, other.data)


def test_ph2p_tells_its_optimizer_of_new_noise_in_each_step(tiny, image_folder, tmp_path, monkeypatch):
    """So that no pair of gradients of two functions is used as curvature; see tests/optimizers."""
    told, step = [], BatchedLBFGS.step
    monkeypatch.setattr(
        BatchedLBFGS, "step", lambda self, *args, **how: told.append(how["new_function"]) or step(self, *args, **how)
    )
    module = PH2P(backbone=tiny, num_tokens=3, max_iter=2, **FEW)
    fit(module, image_folder / "0.png", tmp_path, steps=3)
    assert told == [True] * 3


class Errors(Objective):
    """An objective whose lower values are better."""

    lowest, highest, higher_is_better = 0.0, 10.0, False

    def forward(self, images, prompts):
        return images.flatten(1).mean(1)


@pytest.mark.parametrize(("watch", "better"), [(Errors(), -1), (Sharpness(), 1)])
@pytest.mark.parametrize("tolerance", [0.0, 0.25])
def test_what_is_watched_may_not_get_worse(watch, better, tolerance, tiny):
    module = MetricGuidance(
        backbone=tiny, objective=Sharpness(weight=2.0), constraint=watch, constraint_tolerance=tolerance, **FEW
    )
    problem = Problem("0" * 16, "a cat", result=SteeringResult(values_before={module.constraint_name: [1.0, 2.0]}))
    for change, kept in ((0.5 * better, True), (0.0, True), (-0.2 * better, bool(tolerance)), (-0.5 * better, False)):
        assert module.acceptable(problem, {module.constraint_name: [1.0 + change, 2.0 + change]}) is kept
