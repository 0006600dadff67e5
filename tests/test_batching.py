"""With more problems than fit into a batch, each result is the same as alone, also after an interruption."""

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from inputs import noise
from PIL import Image

from lightning_prompts import runner
from lightning_prompts.callbacks import results
from lightning_prompts.commands.main import main
from lightning_prompts.data.prompts import find_prompts
from lightning_prompts.engine.checkpoint import PromptCheckpoint
from lightning_prompts.methods import GCG, PEZ, PH2P
from lightning_prompts.runs.record import Problem, unreadable_key
from lightning_prompts.runs.reports import failed_line

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "PEZ": ["--model", "PEZ"],
    "PH2P": ["--model", "PH2P", "--model.optimizer.max_iter", "2"],
    "PH2P adam": "--model PH2P --model.optimizer Adam --model.optimizer.lr 0.1 --model.restart_every 2".split(),
    "GCG": ["--model", "GCG", "--model.candidates", "3"],
    "DPODiff": [
        *("--model", "DPODiff", "--model.schedule", "fix-1", "--model.gradient_share", "0.4", "--model.seeds", "1"),
        *("--model.budget", "8", "--model.population", "4", "--model.sampler.guidance_scale", "2"),
    ],
    "MetricGuidance": [
        *("--model", "MetricGuidance", "--model.objective", "Sharpness", "--model.seeds", "2", "--model.steps", "4"),
        *("--model.seeds_per_step", "1", "--model.optimizer", "Adam", "--model.shift_every", "3"),
    ],
    "SeedInvariance": [
        *("--model", "SeedInvariance", "--model.seeds", "1", "--model.steps", "4", "--model.stages", "[1, 2]"),
        *("--model.compare", "latents"),
    ],
}  # fmt: skip
INVERTERS = ("PEZ", "PH2P", "PH2P adam", "GCG")
DEFAULT = ("PH2P adam",)  # killed in the default run; other tests of this kind are slow
REDUNDANT = ("PEZ", "PH2P adam", "GCG")  # left out of `make test-exact`, since other tests make the same calls
PROMPTS = ["a cat", "two dogs beside a large tree", "a red square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create five images and three prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(5):
        noise(seed=i).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(autouse=True)
def fixed_model_name(tiny, monkeypatch):
    """Keep the model's name, which random draws depend on, since GCG's candidates sometimes have equal losses."""
    monkeypatch.chdir(Path(tiny).parent)


@pytest.fixture(scope="module")
def command(tiny, folder):
    """Return the arguments of a search."""

    def arguments(run, method, *extra, images=None):
        args = [
            "fit",
            "--run",
            str(run),
            "--trainer.accelerator",
            "cpu",
            *METHODS[method],
            "--model.backbone",
            Path(tiny).name,
        ]
        args += ["--model.sampler.num_inference_steps", "3", "--model.log_images_every_n_steps", "0"]
        if method in INVERTERS:
            args += ["--data.images", str(images or folder), "--model.num_tokens", "2", "--model.steps", "4"]
            args += ["--data.num_noise_samples", "1", "--data.num_validation_samples", "2"]
        else:
            args += ["--data.prompts", str(folder / "prompts.txt")]
        return [*args, *extra]

    return arguments


def results_of(run):
    """Return the results without fields that differ between equal runs."""
    problems = json.loads((Path(run) / "result.json").read_text())["problems"]
    for problem in problems:
        del problem["seconds"]
    return problems


def assert_close(some, others):
    """Compare results except for the last digits, which depend on the samples in a call."""
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in ("target", "key", "status", "prompt", "negative_prompt", "unet_samples", "words"):
            assert one.get(name) == other.get(name), name
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
        assert one["initial_validation_loss"] == pytest.approx(other["initial_validation_loss"], rel=1e-4)


class RecordingCheckpoint(PromptCheckpoint):
    """Record the problems of each batch, and stop the program after one of the steps."""

    batches: list[list[tuple[str, int]]] = []  # noqa: RUF012
    stop = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pairs = zip(pl_module.batch.records, pl_module.batch.steps, strict=True)
        self.batches.append([(problem.target, done) for problem, done in pairs])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(runner, "PromptCheckpoint", RecordingCheckpoint)
    monkeypatch.setattr(RecordingCheckpoint, "batches", [])
    monkeypatch.setattr(RecordingCheckpoint, "stop", 0)
    return RecordingCheckpoint


@pytest.mark.parametrize(
    "method",
    [
        "GCG",
        *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "GCG"),
    ],
)
def test_batch_size_does_not_change_results(method, command, tmp_path, recording):
    main(command(tmp_path / "all", method))
    assert len(recording.batches[0]) == (5 if method in INVERTERS else 3)
    recording.batches.clear()
    main(command(tmp_path / "two", method, "--model.batch_size", "2"))
    assert max(len(batch) for batch in recording.batches) == 2
    assert_close(results_of(tmp_path / "two"), results_of(tmp_path / "all"))


@pytest.mark.parametrize("method", ["GCG", pytest.param("PH2P adam", marks=pytest.mark.slow)])
def test_finished_problems_are_replaced_in_the_batch(method, command, tmp_path, recording):
    """With patience, problems end at different steps, so the problems of a batch are at different steps."""
    how = ("--model.steps", "12", "--model.patience", "2", "--model.num_tokens", "4")
    main(command(tmp_path / "all", method, *how))
    recording.batches.clear()
    main(command(tmp_path / "two", method, *how, "--model.batch_size", "2"))
    assert any(len({done for _, done in batch}) == 2 for batch in recording.batches)
    order = list(dict.fromkeys(target for batch in recording.batches for target, _ in batch))
    assert order == [f"{i}.png" for i in range(5)]
    assert_close(results_of(tmp_path / "two"), results_of(tmp_path / "all"))


def marks(method):
    """Return the marks that decide when a test of a method runs."""
    exact = [] if method in REDUNDANT else [pytest.mark.exact]
    return exact if method in DEFAULT else [*exact, pytest.mark.slow]


@pytest.mark.parametrize("method", [pytest.param(name, marks=marks(name)) for name in METHODS])
def test_search_killed_at_any_step_resumes_identically(method, command, tmp_path, recording, rounding):
    patience = {"PEZ": 2, "MetricGuidance": 1, "SeedInvariance": 1}.get(method, 1000)
    how = ("--model.patience", str(patience), "--model.batch_size", "2", "--model.microbatch", "3")
    main(command(tmp_path / "whole", method, *how))
    steps, whole = len(recording.batches), results_of(tmp_path / "whole")
    for stop in (
        (1, steps // 2, steps - 1) if method in INVERTERS else (steps // 2,)
    ):  # other methods have such tests of their own
        run = tmp_path / str(stop)
        recording.batches.clear()
        recording.stop = stop
        with pytest.raises(SystemExit) as stopped:
            main(command(run, method, *how))
        assert stopped.value.code == 130
        recording.stop = 0
        main([*command(run, method, *how), "--ckpt_path", "last"])
        for one, other in zip(results_of(run), whole, strict=True):
            assert one == other, (stop, {name for name in one if one[name] != other[name]})


def test_finished_images_are_not_read_again(command, folder, tmp_path, recording, monkeypatch):
    """Finished problems are known by their files, so resuming does not begin by reading all images."""
    from lightning_prompts.engine import target_dataset

    read = []
    load = target_dataset.load_image
    monkeypatch.setattr(
        target_dataset, "load_image", lambda path, *how: read.append(Path(path).name) or load(path, *how)
    )
    recording.stop = 9  # while the fifth image is searched
    how = ("--model.batch_size", "1", "--data.workers", "0")
    with pytest.raises(SystemExit):
        main(command(tmp_path / "run", "PEZ", *how))
    read.clear()
    recording.stop = 0
    main([*command(tmp_path / "run", "PEZ", *how), "--ckpt_path", "last"])
    assert "0.png" not in read[: read.index("4.png")]
    assert [problem["status"] != "open" for problem in results_of(tmp_path / "run")] == [True] * 5


def test_results_jsonl_gets_a_line_when_a_problem_is_done(command, tmp_path, recording, monkeypatch):
    lines = []
    append = results.append_line

    def append_and_count(folder, problem, rank=0):
        append(folder, problem, rank)
        lines.append(len((folder.path / "results.jsonl").read_text().splitlines()))

    monkeypatch.setattr(results, "append_line", append_and_count)
    main(command(tmp_path / "run", "PEZ", "--model.batch_size", "2"))
    assert lines == [1, 2, 3, 4, 5]
    problems = json.loads((tmp_path / "run" / "result.json").read_text())["problems"]
    assert [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()] == problems
    assert all(problem["clip_similarity"] is None or problem["clip_similarity"] <= 1 for problem in problems)
    table = pq.read_table(tmp_path / "run" / "results.parquet")
    for name in ("key", "prompt", "validation_loss", "unet_samples", "status", "token_ids"):
        assert table[name].to_pylist() == [problem[name] for problem in problems]


def test_number_of_workers_does_not_change_results(command, tmp_path, monkeypatch):
    """Workers are threads, since a process that is forked beside the threads of a search may hang."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    for workers in ("0", "2"):
        main(command(tmp_path / workers, "PEZ", "--model.batch_size", "2", "--data.workers", workers))
    assert results_of(tmp_path / "0") == results_of(tmp_path / "2")


def test_failed_images_are_listed_and_retried_alone(command, folder, tmp_path, capsys, recording):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.open(folder / f"{i}.png").save(images / f"{i}.png")
    good = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(good[: len(good) // 2])
    run = tmp_path / "run"
    main(command(run, "PEZ", images=images))
    assert [problem["status"] for problem in results_of(run)].count("failed") == 1
    (line,) = (json.loads(line) for line in (run / "failed.jsonl").read_text().splitlines())
    assert line["file"] == str(images / "1.png")
    assert "damaged or cut short" in line["reason"]
    assert "Why 1 of 3 failed is in" in capsys.readouterr().out
    recording.batches.clear()
    main([*command(run, "PEZ", images=images), "--ckpt_path", "last"])
    assert recording.batches == []  # it is recorded as failed
    (images / "1.png").write_bytes(good)
    main([*command(run, "PEZ", images=images), "--ckpt_path", "last", "--data.retry", "true"])
    assert {target for batch in recording.batches for target, _ in batch} == {"1.png"}
    assert not (run / "failed.jsonl").exists()
    whole = command(tmp_path / "whole", "PEZ", images=images)
    main(whole)
    assert_close(results_of(run), results_of(tmp_path / "whole"))
    (images / "1.png").write_bytes(b"nothing")
    main(command(tmp_path / "other", "PEZ", images=images))
    (images / "1.png").write_bytes(good)
    main(command(tmp_path / "alone", "PEZ", images=tmp_path / "other" / "failed.jsonl"))
    (alone,) = results_of(tmp_path / "alone")
    assert alone["validation_loss"] == pytest.approx(results_of(run)[1]["validation_loss"], rel=1e-4)


def test_list_of_failed_images_is_an_input(command, folder, tmp_path):
    """A missing file is searched once it exists; a broken line stays a failed entry, never a prompt or file."""
    listed = tmp_path / "list.jsonl"
    lines = [{"file": str(folder / "0.png")}, {"file": "late.png", "caption": "a cat"}, {"nothing": 1}]
    listed.write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    main(command(tmp_path / "one", "PEZ", images=listed))
    failed = [json.loads(line) for line in (tmp_path / "one" / "failed.jsonl").read_text().splitlines()]
    named = [
        {"file": str(tmp_path / "late.png"), "caption": "a cat"},
        {"line": f"line 3 of {listed}"},
        {"line": f"line 4 of {listed}"},
    ]
    assert [{key: line[key] for key in line if key != "reason"} for line in failed] == named
    Image.open(folder / "1.png").save(tmp_path / "late.png")
    main(command(tmp_path / "two", "PEZ", images=tmp_path / "one" / "failed.jsonl"))
    (late, *broken) = results_of(tmp_path / "two")
    assert (late["status"] in ("done", "not improved"), late["target"]) == (True, "late.png")
    again = [json.loads(line) for line in (tmp_path / "two" / "failed.jsonl").read_text().splitlines()]
    assert again == failed[1:]
    assert len(broken) == 2


def test_list_of_failed_prompts_is_an_input(tiny, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "a cat"}\n{"nothing": 1}\n')
    first = find_prompts([str(tmp_path / "list.jsonl")])
    assert [line.text for line in first if not line.error] == ["a cat"]
    problem = Problem(unreadable_key([first[1].text]), first[1].text, status="failed", reason=first[1].error)
    (tmp_path / "failed.jsonl").write_bytes(
        failed_line(problem) + failed_line(Problem("0" * 16, "a dog", reason="It failed."))
    )
    assert find_prompts([str(tmp_path / "failed.jsonl")]) == [first[1], ("a dog", None)]


@pytest.mark.parametrize("method", [PH2P, *(pytest.param(method, marks=pytest.mark.slow) for method in (PEZ, GCG))])
def test_finished_problems_are_evicted_from_caches(method, command, tmp_path, monkeypatch):
    modules = []
    monkeypatch.setattr(method, "on_train_end", lambda self: modules.append(self), raising=False)
    main(command(tmp_path / "run", method.__name__, "--model.batch_size", "1", "--model.rerank.weight", "1"))
    (module,) = modules
    data = module.trainer.datamodule
    for kept in (data._images, data._latents, module.search_clip._image_features):
        assert len(kept) <= 1
    assert len(module.batch) == len(module.latents) == 1
    assert torch.isfinite(module.batch.parameter).all()


@pytest.fixture
def small_disk(tmp_path):
    """Create a file system with one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("method", ["PEZ", pytest.param("MetricGuidance", marks=pytest.mark.slow)])
def test_search_continues_on_a_full_disk_and_resumes(
    method, command, small_disk, tmp_path, monkeypatch, capsys, caplog
):
    """The search continues, reports what it could not write, and can resume when there is space again."""
    how = ("--model.batch_size", "2")
    main(command(tmp_path / "whole", method, *how))

    class Filling(PromptCheckpoint):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            Filling.steps += 1
            if Filling.steps == 2:
                with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
                    while True:
                        ballast.write(bytes(512))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", Filling)
        with pytest.raises(SystemExit) as stopped:
            main(command(small_disk / "run", method, *how))
    assert stopped.value.code == 2
    assert "No space left" in capsys.readouterr().err
    assert "could not be written" in caplog.text
    assert "the run continues" in caplog.text
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    main([*command(small_disk / "run", method, *how), "--ckpt_path", "last"])
    assert results_of(small_disk / "run") == results_of(tmp_path / "whole")
