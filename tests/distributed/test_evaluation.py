"""`validate`, `test` and `predict` find with two processes what they find with one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from inputs import noise
from PIL import Image
from ranks import run_ranks

from lightning_prompts.commands.main import main
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.loaders import PredictSettings
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import PEZ, MetricGuidance
from lightning_prompts.objectives import ClipText
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import noise_of

SHORT = "--trainer.accelerator cpu --model.steps 1 --model.batch_size 2 --model.sampler.num_inference_steps 2"
PEZ_SETTINGS = "--model.num_tokens 2 --data.num_noise_samples 1 --data.num_validation_samples 3"
STEERING = "--model MetricGuidance --model.objective ClipText --model.seeds 2"
PROMPTS = "a red cat\ntwo dogs beside a tree\na small square\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images: more than a batch of each rank, and an odd number."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        noise(seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def inverted(tiny, images, tmp_path_factory):
    """Return a finished run on five images, whose records have scores that nothing could have."""
    run = tmp_path_factory.mktemp("inverted") / "run"
    fit = f"fit --model PEZ {SHORT} {PEZ_SETTINGS} --model.backbone {tiny} --data.images {images} --run {run}"
    main(fit.split())
    return spoil(run)


@pytest.fixture(scope="module")
def steered(tiny, tmp_path_factory):
    """Return a finished run on three prompts, whose records have scores that nothing could have."""
    folder = tmp_path_factory.mktemp("steered")
    (folder / "prompts.txt").write_text(PROMPTS)
    fit = f"fit {STEERING} {SHORT} --model.backbone {tiny} --data.prompts {folder}/prompts.txt --run {folder}/run"
    main(fit.split())
    return spoil(folder / "run")


def spoil(run):
    """Change the scores of all records, so that `test` must score each again, and remove what it writes."""
    for file in (run / "problems").glob("*.json"):
        record = json.loads(file.read_text())
        scores = {"clip_similarity": 9.0} if "clip_similarity" in record["result"] else {"fresh_metric_after": [9.0]}
        file.write_text(json.dumps(record | {"result": record["result"] | scores}))
    for name in ("result.json", "grid.png"):
        (run / name).unlink()
    for file in (run / "problems").glob("*.png"):
        file.unlink()
    return run


@pytest.fixture
def copy(tmp_path):
    """Copy a run under a name."""

    def copied(run, name="run"):
        return Path(shutil.copytree(run, tmp_path / name))

    return copied


def command(name, run, *settings, ranks=1, code=0, launcher="torchrun"):
    """Run a command on a run with a number of processes, and return what they print."""
    said = run.with_suffix(".log")
    said.unlink(missing_ok=True)
    codes = run_ranks([name, "--run", str(run), *settings], said, ranks, launcher)
    assert codes == [code] * ranks, said.read_text()[-3000:]
    return said.read_text()


def problems(run):
    return json.loads((run / "result.json").read_text())["problems"]


def assert_close(one, other):
    """Compare what JSON holds; numbers agree to one part in 10,000, or where they are cosines near 0, to 1e-5."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert other == (pytest.approx(one, rel=1e-4, abs=1e-5) if isinstance(one, float) else one)


def assert_same_images(one, other):
    """Compare the PNG files of two folders; rounding may change a pixel by one."""
    names = sorted(path.name for path in one.glob("*.png"))
    assert names
    assert names == sorted(path.name for path in other.glob("*.png"))
    for name in names:
        pixels = [np.asarray(Image.open(folder / name), dtype=int) for folder in (one, other)]
        assert abs(pixels[0] - pixels[1]).max() <= 1, name


def losses(said):
    return re.findall(r"(?m)^(\d+\.\d+)  (.*)", said)


def mean_loss(said):
    """Return the loss in Lightning's table."""
    return float(re.search(r"validation/loss\s+│\s+(\S+)", said)[1])


def test_two_ranks_test_as_one(inverted, copy):
    one, two = copy(inverted, "one"), copy(inverted, "two")
    command("test", one)
    said = command("test", two, ranks=2)
    assert 9.0 not in [problem["clip_similarity"] for problem in problems(one)]
    assert_close(problems(two), problems(one))
    assert_same_images(two / "problems", one / "problems")
    assert_same_images(two, one)
    assert said.count("Results are in") == 1
    assert said.count("similarity") == 5
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_ranks_test_embeddings_as_one(steered, copy, launcher):
    one, two = copy(steered, "one"), copy(steered, "two")
    command("test", one)
    command("test", two, ranks=2, launcher=launcher)
    assert_close(problems(two), problems(one))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["inverted", "steered"])
def test_two_ranks_validate_as_one(method, copy, request):
    """Five problems on two ranks: the mean of the ranks' means would be another."""
    run = copy(request.getfixturevalue(method))
    one, two = command("validate", run), command("validate", run, ranks=2)
    assert len(losses(one)) == (5 if method == "inverted" else 3)
    for (loss, text), (other, same) in zip(losses(one), losses(two), strict=True):
        assert text == same  # also in the same order
        assert float(other) == pytest.approx(float(loss), rel=1e-4, abs=2e-5)
    values = [float(loss) for loss, _ in losses(one)]
    assert mean_loss(one) == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert mean_loss(two) == pytest.approx(mean_loss(one), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("--prompts", '["a cat", "two dogs", "a red square"]')])
def test_two_ranks_predict_as_one(settings, inverted, copy):
    one, two = copy(inverted, "one"), copy(inverted, "two")
    said = command("predict", one, "--seeds", "0,1", *settings)
    said_by_two = command("predict", two, "--seeds", "0,1", *settings, ranks=2)
    assert_same_images(two / "images", one / "images")
    lines = [sorted(re.findall(r"\S+\.png  .*", text)) for text in (said, said_by_two.replace(str(two), str(one)))]
    assert len(lines[0]) == (6 if settings else 10)
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_ranks_without_a_prompt_have_nothing_to_do(inverted, copy):
    run = copy(inverted)
    for file in sorted((run / "problems").glob("*.json"))[1:]:
        file.unlink()
    one = command("validate", run)
    assert losses(command("validate", run, ranks=2)) == losses(one)
    command("test", run, ranks=2)
    assert len(problems(run)) == 1
    command("predict", run, ranks=2)
    assert len(list((run / "images").iterdir())) == 1


@pytest.mark.slow
def test_no_rank_has_a_prompt(inverted, copy):
    run = copy(inverted)
    for file in (run / "problems").glob("*.json"):
        file.unlink()
    for name in ("validate", "predict"):
        assert "no prompts yet" in command(name, run, ranks=2, code=2)


@pytest.mark.slow
def test_a_changed_image_of_one_rank_keeps_its_scores(inverted, images, copy, tmp_path):
    run = copy(inverted)
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    Image.new("RGB", (16, 16), "green").save(moved / "1.png")
    for file in (run / "problems").glob("*.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"paths": [str(moved / record["target"])]}))
    said = command("test", run, ranks=2)
    assert said.count("1.png is left out, and its scores stay as they are") == 1
    assert [problem["clip_similarity"] == 9.0 for problem in problems(run)] == [False, True, False, False, False]
    assert [text.split()[0] for _, text in losses(command("validate", run, ranks=2))] == [
        f"{i}.png" for i in (0, 2, 3, 4)
    ]


@pytest.mark.slow
def test_a_damaged_record_stops_all_ranks_before_anything_changes(inverted, copy):
    run = copy(inverted)
    record = sorted((run / "problems").glob("*.json"))[0]
    record.write_bytes(record.read_bytes()[:-20])
    before = {path.name: path.read_bytes() for path in (run / "problems").iterdir()}
    for name in ("test", "validate", "predict"):
        said = command(name, run, ranks=2, code=2)
        assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()
        assert record.name in said
    assert {path.name: path.read_bytes() for path in (run / "problems").iterdir()} == before
    assert not (run / "result.json").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_stops_all_and_keeps_what_the_others_found(steered, copy):
    run = copy(steered)
    second = problems_in_order(run)[1]["key"]  # the second rank's
    (run / "problems" / f"{second}.safetensors").write_bytes(b"no")
    said = command("test", run, ranks=2, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1
    assert "cannot be read as embeddings" in errors[0]
    assert "Traceback" not in said
    scored = [record["result"]["fresh_metric_after"] != [9.0] for record in problems_in_order(run)]
    assert scored == [True, False, True]
    assert not (run / "result.json").exists()


def problems_in_order(run):
    records = [json.loads(file.read_text()) for file in (run / "problems").glob("*.json")]
    return sorted(records, key=lambda record: record["index"])


# --- a Trainer of the user's own


def own_trainer(run, **settings):
    """Return a Trainer with none of this package's callbacks or settings, but those that keep tests fast and quiet."""
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=run, **settings,
    )  # fmt: skip


def pez(tiny, images):
    method = PEZ(backbone=tiny, num_tokens=2, steps=1, batch_size=2, sampler=SamplerSettings(2))
    return method, ImagesToPrompts(str(images), num_noise_samples=1, num_validation_samples=3)


@pytest.mark.slow
def test_own_trainer_tests_and_predicts(tiny, images, inverted, copy):
    """The records get their scores, and `predict` returns the images."""
    one, run = copy(inverted, "one"), copy(inverted)
    command("test", one)
    method, data = pez(tiny, images)
    own_trainer(run).test(method, datamodule=data, verbose=False)
    scores = {record["key"]: record["result"]["clip_similarity"] for record in problems_in_order(run)}
    assert scores == {p["key"]: pytest.approx(p["clip_similarity"], rel=1e-4, abs=1e-5) for p in problems(one)}
    (losses,) = own_trainer(run).validate(method, datamodule=data, verbose=False)
    recorded = [record["validation_loss"] for record in problems_in_order(run)]
    assert losses["validation/loss"] == pytest.approx(sum(recorded) / 5, rel=1e-4)
    data.predict_settings = PredictSettings(seeds=(3, 4))
    found = own_trainer(run).predict(method, datamodule=data)
    assert [images.shape for images in found] == [(1, 2, 3, 16, 16)] * 5
    noise = noise_of((3, 4), method.backbone.latent_shape)
    for record, several in zip(problems_in_order(run), found, strict=True):
        with torch.no_grad():
            expected = method.generate([record["prompt"]] * 2, noise)
        assert torch.allclose(several[0], expected, atol=1e-4)
    data.predict_settings = PredictSettings(prompts=("a red cat",), negative="a dog")
    ((single,),) = own_trainer(run).predict(method, datamodule=data)
    expected = method.generate(["a red cat"], noise_of((0,), method.backbone.latent_shape), "a dog")
    assert torch.allclose(single, expected, atol=1e-4)


def steer_on_two_ranks(args):
    """Test and predict with two ranks of a Trainer of the user's own; save the images that a rank gets."""
    tiny, run = args
    method = MetricGuidance(
        backbone=tiny, objective=ClipText(), seeds=2, steps=1, batch_size=2, sampler=SamplerSettings(2)
    )
    trainer = own_trainer(run, strategy="problems", devices=2)
    data = Prompts(f"{Path(run).parent}/prompts.txt")
    trainer.test(method, datamodule=data, verbose=False)
    images = torch.cat(trainer.predict(method, datamodule=data))
    torch.save(images, Path(run) / f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
def test_own_trainer_with_two_ranks(tiny, steered, copy, tmp_path):
    one, run = copy(steered, "one"), copy(steered)
    command("test", one)
    command("predict", one)
    said = tmp_path / "said.log"
    assert run_ranks((tiny, str(run)), said, ranks=2, program=steer_on_two_ranks) == [0, 0], said.read_text()
    assert_close(
        [record["result"]["fresh_metric_after"] for record in problems_in_order(run)],
        [record["result"]["fresh_metric_after"] for record in problems_in_order(one)],
    )
    first, second = (torch.load(run / f"rank{rank}.pt") for rank in (0, 1))
    for record, image in zip(problems_in_order(one), (first[0], second[0], first[1]), strict=True):
        pixels = np.asarray(Image.open(one / "images" / f"{record['key']}-seed0.png"), dtype=float)
        ours = ((image[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
        assert abs(pixels - ours).max() <= 1.5
