import itertools
import json
from collections import Counter
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from pytorch_lightning.strategies import Strategy
from searches import set_batch
from torch.nn import functional
from transformers import CLIPModel

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text, round_trip
from lightning_prompts.callbacks import Results
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts, Step
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PEZ, PH2P, TRAINER, ClipWords, RandomTokens, TextualInversion
from lightning_prompts.methods.inversion.losses import LossWeights
from lightning_prompts.methods.inversion.rerank import Rerank
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import Denoising
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.sampling import Microbatch, SamplerSettings
from lightning_prompts.sampling.seeding import (
    RERANK,
    VALIDATION,
    derive_seed,
    draw_noise,
    draw_timesteps,
    image_indices,
    validation_timesteps,
)

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = [PEZ, PH2P, GCG, TextualInversion, RandomTokens, ClipWords]
HARD = [method for method in METHODS if method is not TextualInversion]
DATA = {"num_noise_samples": 2, "num_validation_samples": 2}


def search(module, images, folder, **data):
    """Run a search and return its problems."""
    trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=folder)
    module.steps = data.pop("steps", 3)
    data = ImagesToPrompts([str(image) for image in images], **{**DATA, **data})
    trainer.fit(module, datamodule=data)
    problems = list(data.folder.load().values())
    assert problems  # so that loops over them check something
    return problems


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=HARD)
def hard(request):
    """Return an inversion method whose prompts are text."""
    return request.param


def settings(method, **given):
    own = {GCG: {"candidates": 3, "topk": 4}, ClipWords: {"beams": 2}}
    own[PH2P] = {"optimizer": partial(BatchedLBFGS, max_iter=2)}
    return {"num_tokens": 3, "steps": 3, "sampler": SamplerSettings(2), **own.get(method, {}), **given}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    "method", [method for method in METHODS if method is not ClipWords]
)  # these models have no CLIP
def test_only_the_prompt_trains(method, family, request, image_folder, tmp_path):
    module = method(backbone=str(request.getfixturevalue(family)), **settings(method))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["prompt.embeddings"]
    before = {name: x.clone() for name, x in module.backbone.state_dict().items()}
    table = module.prompt.table.clone()
    problems = search(module, [image_folder], tmp_path / "run")
    after = module.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(module.prompt.table, table)
    assert all(p.grad is None for p in module.backbone.parameters())
    assert not any(part.training for part in module.backbone.modules())
    assert list(module.state_dict()) == ["prompt.embeddings"]
    assert len(problems) == 3
    for problem in problems:
        assert problem.validation_loss <= problem.initial_validation_loss


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        (PEZ, {}),
        (PEZ, {"loss_weights": LossWeights(denoising=0, clip=1)}),
        (PEZ, {"loss_weights": LossWeights(clip=0.1)}),
        (PEZ, {"init": "clip_words"}),
        (PH2P, {}),
        (PH2P, {"optimizer": partial(BatchedLBFGS, max_iter=2, line_search_fn="strong_wolfe")}),
        (PH2P, {"projection": "immediate"}),
        (PH2P, {"optimizer": torch.optim.Adam, "restart_every": 2}),
        (PH2P, {"optimizer": torch.optim.SGD}),
        (GCG, {}),
        (GCG, {"n_replace": 2, "loss_weights": LossWeights(clip=0.1)}),
        (PEZ, {"rerank": Rerank(1, 3, 2)}),
        (TextualInversion, {"optimizer": partial(torch.optim.AdamW, lr=0.1)}),
        (TextualInversion, {"optimizer": partial(BatchedLBFGS, max_iter=2)}),
        (TextualInversion, {"optimizer": partial(torch.optim.Muon, lr=0.1)}),
        (RandomTokens, {}),
        (ClipWords, {}),
    ],
)
def test_batch_equals_each_image_alone(method, extra, tiny, image_folder, tmp_path):
    paths, chosen = sorted(image_folder.iterdir()), {"backbone": tiny, "microbatch": 2, **settings(method, **extra)}
    batch_results = search(method(**chosen), paths, tmp_path / "run")
    for i, path in enumerate(paths):
        (alone,) = search(method(**chosen), [path], tmp_path / f"run{i}")
        assert alone.key == batch_results[i].key
        assert alone.prompt == batch_results[i].prompt
        assert alone.token_ids == batch_results[i].token_ids
        assert alone.validation_loss == pytest.approx(batch_results[i].validation_loss, abs=1e-5)
        assert alone.initial_validation_loss == pytest.approx(batch_results[i].initial_validation_loss, abs=1e-5)
        assert alone.unet_samples == batch_results[i].unet_samples


def test_search_is_reproducible(method, tiny, image_folder, tmp_path):
    runs = [search(method(backbone=tiny, **settings(method)), [image_folder], tmp_path / str(i)) for i in range(2)]
    for first, second in zip(*runs, strict=True):
        assert (first.token_ids, first.validation_loss) == (second.token_ids, second.validation_loss)


def test_seed_changes_the_search(method, tiny, image_folder, tmp_path):
    seen = []

    class Recording(method):
        def init_params(self, rows):
            seen.append(super().init_params(rows))
            return seen[-1]

        def step(self, batch, rows):
            samples = self.samples(rows, batch)
            seen.append(torch.cat([samples.timesteps.flatten(), samples.noise.flatten()]))
            super().step(batch, rows)

    runs = [
        search(Recording(backbone=tiny, **settings(method)), [image_folder], tmp_path / str(seed), seed=seed)
        for seed in range(2)
    ]
    losses = [[problem.initial_validation_loss for problem in problems] for problems in runs]
    assert losses[0] != losses[1]
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(second) > 1
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "optimizer",
    [partial(BatchedLBFGS, max_iter=5), partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=1.0)],
)
def test_ph2p_lowers_the_loss(optimizer, tiny, image_folder, tmp_path):
    losses = []

    class Recording(PH2P):
        def step(self, batch, rows):
            samples = self.samples(
                rows, Step([0] * len(batch.steps), batch.timesteps)
            )  # with the noise of the first step in all steps
            self.samples = lambda rows, batch: samples
            with torch.no_grad():
                losses.append(self.loss(rows, *self.prompt(rows), samples))
            super().step(batch, rows)

    module = Recording(backbone=tiny, num_tokens=3, sampler=SamplerSettings(2), optimizer=optimizer)
    module.backbone.name = "tiny"  # random draws depend on the name, and the folder's name changes
    search(module, [image_folder], tmp_path / "run", steps=12, num_validation_samples=3)
    assert losses[-1].mean() < losses[0].mean()
    assert (torch.stack(losses).diff(dim=0) < 0).float().mean() > 0.6


def test_prompts_round_trip_as_text(hard, tiny, image_folder, tmp_path):
    module = hard(backbone=tiny, template="a photo of {} background", **settings(hard))
    for problem in search(module, [image_folder], tmp_path / "run"):
        text = problem.prompt
        assert text.startswith("a photo of ")
        assert text.endswith(" background")
        words = text.removeprefix("a photo of ").removesuffix(" background")
        texts, same = round_trip(module.vocabulary.tokenizer, torch.tensor([problem.token_ids]))
        assert texts == [words]
        assert same.all()
        whole = encode_text(module.vocabulary.tokenizer, [text], module.vocabulary.length)
        assert torch.equal(module.prompt.ids(torch.tensor([problem.token_ids])), whole)


def test_validation_loss_is_that_of_the_text(hard, tiny, image_folder, tmp_path):
    """The loss in a record can be computed from the prompt, the image and the validation noise alone."""
    module = hard(backbone=tiny, **settings(hard))
    problems = search(module, [image_folder], tmp_path / "run")
    backbone = load_backbone(tiny)
    for row, problem in enumerate(problems):
        ids = encode_text(backbone.text_encoders[0].tokenizer, [problem.prompt], backbone.text_encoders[0].length)
        timesteps = validation_timesteps(2, 500, 1000)
        noise = draw_noise(0, [problem.key], VALIDATION, 2, backbone.latent_shape, "cpu")[0]
        latents = module.latents[row].expand(2, -1, -1, -1)
        with torch.no_grad():
            prompt_embeds = backbone.encode(ids.expand(2, -1))
            output = backbone.denoise(backbone.add_noise(latents, noise, timesteps), timesteps, prompt_embeds)
            loss = (output - backbone.target(latents, noise, timesteps)).square().mean()
        assert problem.validation_loss == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("guidance", [1, 3])
def test_rerank_images_equal_the_pipelines(guidance, tiny, image_folder, tmp_path):
    """With a weight, the CLIP similarity of images that diffusers samples is added to the prompt's loss."""
    module = PEZ(backbone=tiny, num_tokens=3, sampler=SamplerSettings(2, guidance))
    plain = search(module, [image_folder], tmp_path / "plain", steps=1)
    rerank = {"rerank": Rerank(0.5, 2, 3)}
    module = PEZ(backbone=tiny, num_tokens=3, sampler=SamplerSettings(2, guidance), microbatch=4, **rerank)
    reranked = search(module, [image_folder], tmp_path / "reranked", steps=1)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(f"{tiny}/clip")

    @torch.no_grad()
    def features(images):
        larger = functional.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
        return functional.normalize(clip.visual_projection(clip.vision_model(larger).pooler_output), dim=-1)

    for path, without, problem in zip(sorted(image_folder.iterdir()), plain, reranked, strict=True):
        entry = problem.history[0]
        assert entry["prompt"] == without.history[0]["prompt"]
        latents = draw_noise(0, [problem.key], RERANK, 2, module.backbone.latent_shape, "cpu")[0]
        images = pipeline(
            [entry["prompt"]] * 2, latents=latents, num_inference_steps=3, guidance_scale=guidance, output_type="pt"
        ).images
        target = to_tensor(load_image(path, 16, "crop", (255, 255, 255)))[None]
        distance = 1 - (features(images * 2 - 1) @ features(target).T).mean()
        assert entry["validation_loss"] == pytest.approx(
            without.history[0]["validation_loss"] + 0.5 * float(distance), abs=1e-4
        )
        scorings = 2  # of the initial prompt, and after the step
        calls = 4  # PNDM's for three steps
        assert problem.unet_samples == without.unet_samples + scorings * 2 * calls * (2 if guidance > 1 else 1)


def test_banned_words_never_appear(hard, tiny, image_folder, tmp_path):
    banned = list("aeiou")
    for problem in search(hard(backbone=tiny, banned_words=banned, **settings(hard)), [image_folder], tmp_path / "run"):
        assert problem.prompt
        assert not set(problem.prompt.lower()) & set(banned)


def test_prompts_use_only_allowed_words(hard, tiny, image_folder, tmp_path):
    words = ["a", "b", "7", "?"]
    for problem in search(hard(backbone=tiny, allowed_words=words, **settings(hard)), [image_folder], tmp_path / "run"):
        assert set(problem.prompt.split()) <= set(words)
        assert len(problem.token_ids) == 3


def test_gcg_candidates_use_only_allowed_words(tiny, image_folder, tmp_path):
    class Recording(GCG):
        def _losses(self, rows, candidates, sound, samples):
            assert sound.any()
            assert self.prompt.allowed[candidates[sound]].all()
            checked.append(len(candidates))
            return super()._losses(rows, candidates, sound, samples)

    checked, own = [], {**settings(GCG), "topk": 50, "candidates": 20}
    search(Recording(backbone=tiny, allowed_words=["a", "b", "7"], **own), [image_folder], tmp_path / "run")
    assert checked == [3] * 3  # three images in each of three steps


def test_single_allowed_word_fills_the_prompt(hard, tiny, image_folder, tmp_path):
    for problem in search(hard(backbone=tiny, allowed_words=["b"], **settings(hard)), [image_folder], tmp_path / "run"):
        assert problem.prompt == "b b b"


def test_clip_words_are_the_result_even_if_random_tokens_are_better(tiny, image_folder, tmp_path):
    class HigherLoss(ClipWords):
        def evaluate(self, rows, prompt_embeds):
            self.scored = getattr(self, "scored", 0) + 1
            return super().evaluate(rows, prompt_embeds) + self.scored

    module = HigherLoss(backbone=tiny, **settings(ClipWords))
    problems = search(module, [image_folder], tmp_path / "run", steps=1)
    for problem, words in zip(problems, module.clip_words(torch.arange(len(problems)), 2).tolist(), strict=True):
        assert problem.token_ids == words
        assert problem.status == "not improved"


def test_problem_whose_losses_are_never_finite_fails(hard, tiny, image_folder, tmp_path):
    class Broken(hard):
        def evaluate(self, rows, prompt_embeds):
            return torch.full((len(rows),), torch.nan)

    for problem in search(Broken(backbone=tiny, **settings(hard)), [image_folder], tmp_path / "run"):
        assert problem.status == "failed"
        assert "not a finite number" in problem.reason


def test_template_with_a_banned_word_is_refused(tiny):
    with pytest.raises(UserError, match=r"--model.template has a banned word, got 'a photo of \{\}'"):
        PEZ(backbone=tiny, template="a photo of {}", banned_words=["photo"])


def test_data_module_can_be_used_for_another_run(tiny, image_folder, tmp_path):
    data, prompts = ImagesToPrompts(str(image_folder), **DATA), []
    for name, seed in (("one", 0), ("two", 1)):
        data.seed = seed
        trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=tmp_path / name)
        trainer.fit(PEZ(backbone=tiny, **settings(PEZ)), datamodule=data)
        assert all(problem.unet_samples for problem in data.folder.load().values())
        prompts.append([problem.prompt for problem in data.folder.load().values()])
    assert prompts[0] != prompts[1]


def test_repaired_image_leaves_no_failed_record(tiny, image_folder, tmp_path):
    whole = (image_folder / "0.png").read_bytes()
    (image_folder / "0.png").write_bytes(b"")
    for _ in range(2):
        search(PEZ(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "run")
        (image_folder / "0.png").write_bytes(whole)
    assert len(list((tmp_path / "run" / "problems").glob("*.json"))) == 3


def test_equal_images_share_a_result(tiny, image_folder, tmp_path, caplog):
    (image_folder / "copy.png").write_bytes((image_folder / "0.png").read_bytes())
    problems = search(PEZ(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "run")
    assert len(problems) == 3
    assert "copy.png has the pixels of 0.png; they share one result." in caplog.text


def test_patience_finishes_problems(tiny, image_folder, tmp_path):
    module = PEZ(backbone=tiny, optimizer=partial(torch.optim.AdamW, lr=1e-12), patience=2, **settings(PEZ))
    problems = search(module, [image_folder], tmp_path / "run", steps=50)
    assert not len(module.batch.active_rows())
    assert all(problem.prompt for problem in problems)
    for problem in problems:  # nothing improves: the initial prompt and two steps are scored
        assert problem.status == "not improved"
        assert problem.unet_samples == 2 * 2 * 2 + 3 * 2


def test_restart_keeps_half_of_the_best_prompts_tokens(tiny, image_folder, tmp_path):
    restarts = []

    class Recording(PH2P):
        def set_rows(self, problems):
            super().set_rows(problems)
            reset_rows = self.batch.reset_rows

            def watched(rows, values):
                reset_rows(rows, values)
                token_ids = self.prompt.project()
                (state,) = self.trainer.optimizers[0].state.values()
                assert not any(value.any() for value in state.values())
                records = self.batch.records
                restarts.append(
                    [(record.token_ids, ids) for record, ids in zip(records, token_ids.tolist(), strict=True)]
                )

            self.batch.reset_rows = watched

    module = Recording(
        backbone=tiny, optimizer=torch.optim.Adam, restart_every=2, num_tokens=6, sampler=SamplerSettings(2)
    )
    search(module, [image_folder], tmp_path / "run", steps=7)
    assert len(restarts) == 3  # before the steps 2, 4 and 6
    for best, restarted in (pair for restart in restarts for pair in restart):
        assert sum(one == other for one, other in zip(best, restarted, strict=True)) in (
            3,
            4,
        )  # a new token may equal the old one
        assert module.prompt.allowed[restarted].all()
    assert len({tuple(restarted) for restart in restarts for _, restarted in restart}) == 9


def test_row_without_a_finite_gradient_skips_the_step(tiny, image_folder, tmp_path, caplog):
    class Broken(PEZ):
        def loss(self, rows, *given):
            loss = super().loss(rows, *given)
            factor = torch.ones(3)
            if self.trainer.global_step == 1:
                factor[0] = torch.inf
            return loss * factor

        def step(self, batch, rows):
            before = self.prompt.embeddings.detach().clone()
            super().step(batch, rows)
            moved = (self.prompt.embeddings.detach() != before).flatten(1).any(1).tolist()
            assert moved == [batch.steps[0] != 1, True, True]

    problems = search(Broken(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "run")
    assert caplog.text.count("0.png was not finite in 1 of the steps up to 2") == 1
    healthy = search(PEZ(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "healthy")
    assert [p.token_ids for p in problems[1:]] == [p.token_ids for p in healthy[1:]]


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize(("method", "extra"), [(PEZ, {}), (PH2P, {"projection": "delayed"})])
@pytest.mark.parametrize("times", [1, 6])
def test_nonfinite_embeddings_are_reset_to_the_best_prompt(
    times, method, extra, value, tiny, image_folder, tmp_path, caplog
):
    class Broken(method):
        def step(self, batch, rows):
            before = self.prompt.embeddings.detach().clone()
            super().step(batch, rows)
            if batch.steps[0] in range(1, 1 + times) and self.batch[0].record.target == "0.png":
                self.prompt.embeddings.data[0] = value
            elif batch.steps[0] == 2:  # after the first time
                best = self.embeddings_of(self.batch[0].record)
                assert torch.equal(before[0], best)
                assert [row.halvings for row in self.batch.rows] == [1, 0, 0]
                if method is PEZ:  # Adam's first step is as long as its step size
                    assert float((self.prompt.embeddings[0] - best).abs().max().detach()) == pytest.approx(
                        0.5 * 0.1, rel=0.2
                    )

    problems = search(Broken(backbone=tiny, **settings(method, **extra)), [image_folder], tmp_path / "run", steps=8)
    first, *others = problems
    how = " with half the step size" if method is PEZ else "."  # not with L-BFGS, whose history assumes whole steps
    assert caplog.text.count(f"continuing from its best prompt{how}") == min(times, 5)
    assert ("finite" in str(first.reason)) == (times == 6)
    assert first.prompt
    assert (first.unet_samples < others[0].unet_samples) == (times == 6)
    assert all(problem.status in ("done", "not improved") and "finite" not in str(problem.reason) for problem in others)
    alone = search(method(backbone=tiny, **settings(method, **extra)), [image_folder], tmp_path / "healthy", steps=8)
    assert [p.token_ids for p in alone[1:]] == [p.token_ids for p in others]


@pytest.mark.parametrize("projection", ["final", "immediate"])
def test_step_to_nonfinite_embeddings_is_undone(projection, tiny, image_folder, tmp_path):
    class Steep(PH2P):
        def loss(self, rows, *given):
            factor = torch.ones(3)
            factor[0] = 1e25  # the first step of the first image overflows
            return super().loss(rows, *given) * factor[rows]

    own = {**settings(PH2P), "projection": projection, "optimizer": partial(BatchedLBFGS, lr=1e-2, max_iter=2)}
    problems = search(Steep(backbone=tiny, **own), [image_folder], tmp_path / "run")
    healthy = search(PH2P(backbone=tiny, **own), [image_folder], tmp_path / "healthy")
    assert [p.token_ids for p in problems[1:]] == [p.token_ids for p in healthy[1:]]
    assert problems[0].prompt


def test_trainer_alone_writes_records_and_results(tiny, image_folder, tmp_path):
    """Searches run from Python, without the command line."""
    how = TRAINER | {"accelerator": "cpu", "logger": False, "enable_checkpointing": True}
    trainer = pl.Trainer(**how, default_root_dir=tmp_path, callbacks=[Results()])
    trainer.fit(PEZ(backbone=tiny, **settings(PEZ)), datamodule=ImagesToPrompts(str(image_folder), **DATA))
    result = json.loads((tmp_path / "result.json").read_text())
    assert [problem["target"] for problem in result["problems"]] == ["0.png", "1.png", "2.png"]


# --- gradients


@pytest.fixture
def double(sd):
    """Return each of the two backbones in float64, with embeddings (2, L, D) and 3 samples per problem for a loss."""
    backbone = load_backbone(str(sd)).double()
    vocabulary = backbone.vocabulary
    ids = encode_text(vocabulary.tokenizer, ["a red cat", "two dogs beside a tree"], vocabulary.length)
    samples = torch.randn(4, 2, 3, *backbone.latent_shape, dtype=torch.float64)
    embeddings = vocabulary.table[ids] + 0.01 * torch.randn(2, vocabulary.length, vocabulary.table.shape[1])
    return backbone, ids, embeddings, samples[0], torch.tensor([[10, 500, 999], [0, 700, 300]]), samples[1]


def slope(double, loss):
    """Compute losses and their gradient with respect to the prompts' embeddings."""
    backbone, ids, embeddings, latents, timesteps, noise = double
    embeddings = embeddings.clone().requires_grad_()
    losses = loss(backbone, backbone.encode(ids, embeddings), latents, timesteps, noise)
    (gradient,) = torch.autograd.grad((losses * torch.tensor([1.0, 2.0])).sum(), embeddings)
    return losses.detach(), gradient


def plain_loss(backbone, prompt_embeds, latents, timesteps, noise):
    """Compute the loss by its definition, in one batch."""
    embeds, (x, eps), t = (
        prompt_embeds.repeat_interleave(3, 0),
        (v.flatten(0, 1) for v in (latents, noise)),
        timesteps.flatten(),
    )
    output = backbone.denoise(backbone.add_noise(x, eps, t), t, embeds)
    return (output - backbone.target(x, eps, t)).square().mean((1, 2, 3)).view(2, 3).mean(1)


@pytest.mark.parametrize("microbatch", [1, 2, 4, 16])
def test_denoising_gradient_equals_autograd(double, microbatch):
    losses, gradient = slope(double, Denoising(Microbatch(microbatch)))
    expected, expected_gradient = slope(double, plain_loss)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-11)
    assert expected_gradient.abs().max() > 1e-8
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)


def test_denoising_without_gradients_gives_the_same_losses(double):
    backbone, ids, embeddings, *rest = double
    with torch.no_grad():
        losses = Denoising(Microbatch(4))(backbone, backbone.encode(ids, embeddings), *rest)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, slope(double, plain_loss)[0], rtol=1e-9, atol=1e-11)


def test_results_are_written_before_teardown(tiny, image_folder, tmp_path, monkeypatch):
    leave, seen = Strategy.teardown, []

    def teardown(self):
        seen.append((tmp_path / "run" / "result.json").exists())
        leave(self)

    monkeypatch.setattr(Strategy, "teardown", teardown)
    how = TRAINER | {"logger": False, "enable_checkpointing": True}
    trainer = pl.Trainer(**how, callbacks=[Results()], default_root_dir=tmp_path / "run")
    trainer.fit(PEZ(backbone=tiny, **settings(PEZ)), datamodule=ImagesToPrompts(str(image_folder), **DATA))
    assert seen == [True]


@pytest.fixture
def with_negative_images(sd, image_folder, tmp_path):
    """Create a batch of two targets with two negative images in float64; return the method and its data."""
    paths = [str(path) for path in sorted(image_folder.iterdir())]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    module = PH2P(backbone=str(sd), loss_weights=LossWeights(negative=0.7), microbatch=2, **settings(PH2P))
    data = ImagesToPrompts(paths[:2], negative_images=[paths[2], str(tmp_path / "red.png")], **DATA)
    trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=tmp_path / "run")
    trainer.strategy.connect(module)
    data.trainer, trainer.datamodule, module.trainer = trainer, data, trainer
    data.setup("fit")
    module.double()
    set_batch(module, list(data.arrivals))
    module.latents = [latents.double() for latents in module.latents]
    return module, data


@pytest.mark.parametrize(("samples", "num_images"), [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 6))])
def test_each_image_is_used_equally_often_at_all_timesteps(samples, num_images):
    seen = Counter()
    for step in range(num_images**2):
        turns = image_indices(step, samples, num_images).tolist()
        assert len(turns) == samples
        assert (
            max(Counter(turns).values()) - min([Counter(turns)[i] for i in range(num_images)]) <= 1
        )  # also within a step
        seen.update(enumerate(turns))
    assert seen == {(k, image): num_images for k in range(samples) for image in range(num_images)}


def test_subjects_with_different_numbers_of_images_may_share_a_batch(tiny, image_folder, tmp_path):
    paths = [str(path) for path in sorted(image_folder.iterdir())]
    several = tmp_path / "images.jsonl"
    rows = [{"file": paths, "subject": "three"}, {"file": paths[:2], "subject": "two"}]
    several.write_text("\n".join(map(json.dumps, rows)))
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(rows[1]))
    chosen = {**DATA, "num_validation_samples": 4, "num_noise_samples": 3}
    batch_results = search(PEZ(backbone=tiny, **settings(PEZ)), [several], tmp_path / "batch_results", **chosen)
    (two,) = search(PEZ(backbone=tiny, **settings(PEZ)), [alone], tmp_path / "two", **chosen)
    assert batch_results[1].key == two.key
    assert batch_results[1].validation_loss == pytest.approx(two.validation_loss, rel=1e-5)
    assert batch_results[1].initial_validation_loss == pytest.approx(two.initial_validation_loss, rel=1e-5)


@pytest.mark.parametrize("which", ["subject", "negative"])
def test_more_images_than_validation_samples_are_refused(which, tiny, image_folder, tmp_path):
    more = {"one_subject": True} if which == "subject" else {"negative_images": str(image_folder)}
    with pytest.raises(UserError, match=r"3 images .* give --data.num_validation_samples 3 or more"):
        search(PEZ(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "run", **more)
    assert not (tmp_path / "run" / "problems").exists()


def test_negative_images_alternate(with_negative_images):
    module, data = with_negative_images
    negatives = data.negative_latents(module.backbone)
    assert len(negatives) == 2
    for step in (VALIDATION, 0, 1, 2):
        samples = module.samples(torch.arange(2), Step([step] * 2, torch.full((2, 3), 700)))
        assert samples.negative.shape == samples.latents.shape == samples.noise.shape
        turns = image_indices(max(step, 0), 3, 2)
        for row in range(2):
            for n in range(3):
                assert torch.equal(samples.negative[row, n], negatives[turns[n]].to(samples.negative))
        last = samples[torch.tensor([1])]
        assert torch.equal(last.negative[0], samples.negative[1])


def test_loss_subtracts_that_of_negative_images(with_negative_images):
    """Compute both terms by their definition, with the same timesteps and noise."""
    module, data = with_negative_images
    rows, batch = torch.arange(2), Step([1] * 2, torch.tensor([[10, 500, 999], [0, 700, 300]]))
    samples, backbone = module.samples(rows, batch), module.backbone
    module.prompt.embeddings.data = module.init_params(torch.arange(2)).double()
    ids, embeddings = module.prompt(rows)
    prompt_embeds = backbone.encode(ids, embeddings)
    positive, negative = (
        plain_loss(backbone, prompt_embeds, latents, samples.timesteps, samples.noise.double())
        for latents in (
            samples.latents,
            data.negative_latents(backbone)[torch.tensor([1, 0, 1])].expand(2, -1, -1, -1, -1),
        )
    )
    assert not torch.allclose(positive, negative)
    loss = module.loss(rows, ids, embeddings, samples)
    torch.testing.assert_close(loss, positive - 0.7 * negative, rtol=1e-6, atol=1e-8)
    gradients = [
        torch.autograd.grad(side.sum(), module.prompt.embeddings, retain_graph=True)[0]
        for side in (loss, positive - 0.7 * negative)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_gradient_with_negative_images_equals_finite_differences(with_negative_images):
    module, _ = with_negative_images
    rows = torch.arange(2)
    samples = module.samples(rows, Step([0] * 2, torch.tensor([[10, 500, 999], [0, 700, 300]])))
    module.prompt.embeddings.data = module.init_params(torch.arange(2)).double()
    prompts = module.prompt.embeddings
    (gradient,) = torch.autograd.grad(module.loss(rows, *module.prompt(rows), samples).sum(), prompts)
    direction = torch.randn_like(prompts)
    h = 1e-5
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            prompts.add_(sign * h * direction)
            losses.append(module.loss(rows, *module.prompt(rows), samples).sum())
            prompts.sub_(sign * h * direction)
    slope = (losses[0] - losses[1]) / (2 * h)
    assert slope.abs() > 1e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8)


def test_negative_images_change_the_key_and_double_the_cost(tiny, image_folder, tmp_path):
    paths = sorted(image_folder.iterdir())
    (alone,) = search(PEZ(backbone=tiny, **settings(PEZ)), paths[:1], tmp_path / "alone")
    (other,) = search(
        PEZ(backbone=tiny, **settings(PEZ)),
        paths[:1],
        tmp_path / "other",
        negative_images=[str(path) for path in paths[1:]],
    )
    assert other.key != alone.key
    assert other.unet_samples == 2 * alone.unet_samples


@pytest.mark.parametrize(("content", "message"), [(None, "There is no file"), ("no image", "is not an image")])
def test_unreadable_negative_image_is_refused(tiny, image_folder, tmp_path, content, message):
    bad = tmp_path / "bad.png"
    if content:
        bad.write_text(content)
    with pytest.raises(UserError, match=rf"(?s)^{message}.*bad\.png|^[^\n]*bad\.png[^\n]*{message}"):
        search(PEZ(backbone=tiny, **settings(PEZ)), [image_folder], tmp_path / "run", negative_images=str(bad))
    assert not (tmp_path / "run" / "problems").exists()


def test_straight_through_gradient_is_that_at_the_projected_embeddings(sd):
    backbone = load_backbone(str(sd))
    vocabulary = backbone.vocabulary
    prompt = TokenEmbeddings(vocabulary, "a {} cat", 3)
    start = prompt.allowed.nonzero()[:6, 0].view(2, 3)
    prompt.embeddings.data = prompt.table[start]
    prompt.embeddings.data += 1e-3 * torch.randn_like(prompt.embeddings)
    assert torch.equal(prompt.project(), start)

    def loss(embeddings, ids):
        return backbone.encode(ids, embeddings)[:, :8].sin().sum()

    ids, embeddings = prompt(torch.arange(2), straight_through=True)
    torch.testing.assert_close(embeddings.detach(), prompt.table[ids])
    loss(embeddings, ids).backward()

    projected = prompt.table[ids].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(projected, ids), projected)
    assert gradient.abs().max() > 0
    rounding = 1e-4 * float(gradient.abs().max())
    torch.testing.assert_close(prompt.embeddings.grad, gradient[:, prompt.positions], rtol=1e-4, atol=rounding)


def test_rows_of_a_prompt_can_be_selected(sd):
    prompt = TokenEmbeddings(load_backbone(str(sd)).vocabulary, "{}", 2)
    prompt.embeddings.data = prompt.table[prompt.allowed.nonzero()[:6, 0].view(3, 2)]
    ids, embeddings = prompt(torch.tensor([2, 0]))
    everything = prompt(torch.arange(3))
    assert torch.equal(ids, everything[0][[2, 0]])
    assert torch.equal(embeddings, everything[1][[2, 0]])


# --- randomness


def test_draws_depend_only_on_seed_key_and_step():
    whole = draw_noise(3, ["a", "b", "c"], 5, 4, (2, 3), "cpu")
    assert torch.equal(draw_noise(3, ["c"], 5, 4, (2, 3), "cpu")[0], whole[2])
    torch.randn(7)
    assert torch.equal(draw_noise(3, ["b", "a"], 5, 2, (2, 3), "cpu"), whole[[1, 0], :2])
    times = draw_timesteps(3, ["a", "b", "c"], 5, 4, 0, 1000)
    assert torch.equal(draw_timesteps(3, ["c", "a"], 5, 4, 0, 1000), times[[2, 0]])


def test_draws_leave_the_global_generator_unchanged():
    before = torch.get_rng_state()
    draw_noise(0, ["a"], 0, 2, (4,), "cpu")
    draw_timesteps(0, ["a"], 0, 2, 0, 1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_differ():
    coordinates = [
        (seed, key, step, k) for seed in range(3) for key in ("a", "b") for step in range(-3, 5) for k in range(4)
    ]
    assert len({derive_seed(*each) for each in coordinates}) == len(coordinates)


def test_validation_noise_is_never_used_in_training():
    training = torch.stack([draw_noise(0, ["a"], step, 4, (16,), "cpu")[0] for step in range(50)])
    validation = draw_noise(0, ["a"], VALIDATION, 4, (16,), "cpu")[0]
    assert VALIDATION < 0
    for sample in validation:
        assert not (training == sample).all(-1).any()


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (500, 1000), (999, 1000), (0, 1), (3, 8)])
@pytest.mark.parametrize("samples", [1, 4, 9])
def test_timesteps_are_in_the_range_and_stratified(low, high, samples):
    times = torch.stack([draw_timesteps(0, ["a", "b"], step, samples, low, high) for step in range(100)])
    assert times.dtype == torch.long
    assert low <= times.min()
    assert times.max() < high
    assert (times.sort(-1).values == times).all()  # each from its own part of the range
    fixed = validation_timesteps(samples, low, high)
    assert low <= fixed.min()
    assert fixed.max() < high


def test_timesteps_cover_the_range_uniformly():
    times = torch.cat([draw_timesteps(0, ["a"], step, 4, 0, 10).flatten() for step in range(300)])
    counts = times.bincount(minlength=10)
    assert (counts > 60).all()  # 120 expected
