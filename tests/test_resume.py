import json
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightning_prompts import runner
from lightning_prompts.commands import cli
from lightning_prompts.commands.main import main
from lightning_prompts.engine.checkpoint import PromptCheckpoint, last_checkpoint

# The command line silences warnings of libraries, and pytest restores them.
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "PEZ": [],
    "PH2P": ["--model.optimizer.max_iter", "2"],
    "PH2P projected": ["--model.optimizer.max_iter", "2", "--model.projection", "delayed"],
    "GCG": ["--model.candidates", "3"],
    "TextualInversion": ["--model.optimizer.lr", "0.1"],
    "RandomTokens": [],
    "PH2P restarted": ["--model.optimizer", "Adam", "--model.restart_every", "2"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Create two images."""
    folder = tmp_path_factory.mktemp("images")
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def arguments_of(tiny, images):
    """Return the arguments of a search with six steps."""

    def arguments(run, method="PEZ"):
        args = ["fit", "--run", str(run), "--trainer.accelerator", "cpu", "--model", method.split()[0]]
        args += [
            "--model.backbone",
            tiny,
            "--model.num_tokens",
            "2",
            "--model.sampler.num_inference_steps",
            "2",
            *METHODS[method],
        ]
        args += ["--data.images", f"{images}/0.png", f"{images}/1.png"]
        return [*args, "--model.steps", "6", "--data.num_noise_samples", "1", "--data.num_validation_samples", "2"]

    return arguments


@pytest.fixture(scope="module")
def whole(arguments_of, tmp_path_factory):
    """Return the folder of an uninterrupted run of a method; no test changes it."""

    @cache
    def run(method="PEZ"):
        folder = tmp_path_factory.mktemp("whole")
        main(arguments_of(folder / "run", method))
        return folder / "run"

    return run


@pytest.fixture
def command(arguments_of, tmp_path):
    """Return the arguments of a search in this test's own folder."""
    return lambda run, method="PEZ": arguments_of(tmp_path / run, method)


def stopping(step, error=KeyboardInterrupt):
    """Return a callback that saves after every step and stops the program after one of them."""

    class Stopping(PromptCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self._save(trainer)
            if batch.steps[0] + 1 == step:
                raise error

    return Stopping


def stop(monkeypatch, args, step):
    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", stopping(step))
        with pytest.raises(SystemExit) as stopped:
            main(args)
    return stopped.value.code


def steps_of(monkeypatch, args):
    """Return the steps that a command takes, in order."""
    steps = []

    class Counting(PromptCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(batch.steps[0])
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", Counting)
        main(args)
    return steps


def results_of(run):
    """Return the results without fields that differ between equal runs."""
    result = json.loads((Path(run) / "result.json").read_text())
    for problem in result["problems"]:
        del problem["seconds"]
    return result


def checkpoints(run):
    return sorted((Path(run) / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.exact if name == "TextualInversion" else ()) for name in METHODS]
)
def test_stopped_search_resumes_identically(command, whole, tmp_path, monkeypatch, method):
    unbroken, broken = whole(method), tmp_path / "broken"
    assert stop(monkeypatch, command("broken", method), 3) == 130
    for record in (broken / "problems").glob("*.json"):
        assert json.loads(record.read_text())["prompt"]  # the best prompt so far is on disk
    assert last_checkpoint(broken / "checkpoints") == checkpoints(broken)[-1]
    assert steps_of(monkeypatch, [*command("broken", method), "--ckpt_path", "last"]) == [3, 4, 5]
    assert results_of(broken) == results_of(unbroken)
    assert (broken / "prompt.txt").read_bytes() == (unbroken / "prompt.txt").read_bytes()
    embeddings, others = (load_file(run / "embedding.safetensors") for run in (broken, unbroken))
    assert embeddings.keys() == others.keys()
    assert all(torch.equal(embeddings[key], others[key]) for key in others)


def test_search_stopped_twice_resumes_identically(command, whole, tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO", "lightning_prompts"):
        stop(monkeypatch, command("broken"), 2)
    assert f"--run {tmp_path / 'broken'} --ckpt_path last resumes it" in caplog.text
    stop(monkeypatch, [*command("broken"), "--ckpt_path", "last"], 5)
    main([*command("broken"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "broken") == results_of(whole())


def test_checkpoint_holds_only_the_prompts(command, tmp_path, monkeypatch):
    stop(monkeypatch, command("broken", "PH2P"), 3)
    paths = checkpoints(tmp_path / "broken")
    assert len(paths) == 2  # older checkpoints are removed
    for path in paths:
        assert path.stat().st_size < 100_000
        checkpoint = torch.load(path, weights_only=True)
        assert list(checkpoint["state_dict"]) == ["prompt.embeddings"]
        assert checkpoint["state_dict"]["prompt.embeddings"].shape == (2, 2, 32)
        assert checkpoint["state_dict"]["prompt.embeddings"].dtype == torch.float32
    assert not list((tmp_path / "broken").rglob("*.tmp"))


def test_broken_checkpoint_is_skipped(command, whole, tmp_path, monkeypatch):
    stop(monkeypatch, command("broken"), 4)
    before, newest = checkpoints(tmp_path / "broken")
    data = newest.read_bytes()
    for damaged in (b"", bytes(len(data)), b"no checkpoint", data[: len(data) // 2]):
        newest.write_bytes(damaged)
        assert last_checkpoint(tmp_path / "broken" / "checkpoints") == before
    main([*command("broken"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "broken") == results_of(whole())


DAMAGED = {
    "no batch": lambda saved: saved.pop("batch"),
    "a number too few": lambda saved: saved["batch"]["steps"].pop(),
    "a word for a number": lambda saved: saved["batch"]["steps"].__setitem__(0, "two"),
    "a record with an unknown field": lambda saved: saved["batch"]["records"][0].__setitem__("mood", "blue"),
    "an optimizer without groups": lambda saved: saved["optimizer_states"][0].pop("param_groups"),
    "no fit loop": lambda saved: saved["loops"].pop("fit_loop"),
    "no version of Lightning": lambda saved: saved.pop("pytorch-lightning_version"),
}
FOREIGN = {
    "another parameter": lambda saved: saved["state_dict"].update(other=saved["state_dict"].popitem()[1]),
    "prompts of another length": lambda saved: saved["state_dict"].update(
        {name: tensor[:, :1] for name, tensor in saved["state_dict"].items()}
    ),
    "no optimizer": lambda saved: saved.update(optimizer_states=[{}]),
}


@pytest.fixture(scope="module")
def stopped_run(arguments_of, tmp_path_factory):
    """Return the folder of a stopped run; no test changes it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, arguments_of(folder), 4)
    return folder


def change(path, edit):
    """Change a checkpoint."""
    saved = torch.load(path, weights_only=True)
    edit(saved)
    torch.save(saved, path)


@pytest.mark.parametrize("edit", DAMAGED.values(), ids=DAMAGED)
def test_incomplete_checkpoint_is_skipped(stopped_run, tmp_path, edit):
    shutil.copytree(stopped_run, tmp_path / "run")
    before, newest = checkpoints(tmp_path / "run")
    change(newest, edit)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") == before


@pytest.mark.parametrize("edit", FOREIGN.values(), ids=FOREIGN)
def test_checkpoint_of_another_search_is_refused(command, stopped_run, tmp_path, capsys, edit):
    shutil.copytree(stopped_run, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    change(newest, edit)
    with pytest.raises(SystemExit) as stopped:
        main([*command("run"), "--ckpt_path", "last"])
    assert stopped.value.code == 2
    assert "; give the settings that the run was begun with.\n" in capsys.readouterr().err


def test_ckpt_path_last_starts_a_new_run(command, whole, tmp_path):
    main([*command("new"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "new") == results_of(whole())


def test_resuming_a_finished_run_changes_nothing(command, whole, tmp_path):
    main(command("again"))
    main([*command("again"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "again") == results_of(whole())


@pytest.mark.parametrize(("other", "message"), [("2.png", "--data.images"), ("no.png", "no.png")])
def test_resuming_with_other_images_is_refused(
    command, whole, tmp_path, monkeypatch, image_folder, capsys, other, message
):
    stop(monkeypatch, command("broken"), 3)
    with pytest.raises(SystemExit) as stopped:
        main([*command("broken"), "--ckpt_path", "last", "--data.images", str(image_folder / other)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    main(["test", "--run", str(tmp_path / "broken")])  # with the settings of the run
    assert len(results_of(tmp_path / "broken")["problems"]) == 2


def test_search_stopped_by_the_trainer_resumes_identically(command, whole, tmp_path, monkeypatch):
    class StoppingTrainer(PromptCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch.steps[0] == 2  # as --trainer.max_time does

    with monkeypatch.context() as patch:
        patch.setattr(runner, "PromptCheckpoint", StoppingTrainer)
        main(command("broken"))
    assert [problem["status"] for problem in results_of(tmp_path / "broken")["problems"]] == ["open", "open"]
    main([*command("broken"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "broken") == results_of(whole())


def test_fewer_steps_than_done_end_the_search(command, tmp_path, monkeypatch):
    stop(monkeypatch, command("broken"), 5)
    main([*command("broken"), "--ckpt_path", "last", "--model.steps", "4"])
    problems = results_of(tmp_path / "broken")["problems"]
    assert {problem["status"] for problem in problems} <= {"done", "not improved"}
    assert [problem["unet_samples"] for problem in problems] == [
        5 * 2 + (1 + 5 + 1) * 2
    ] * 2  # five steps, seven scorings


def test_moved_and_added_images_are_in_order(command, images, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.mkdir()
    Image.open(images / "1.png").save(moved / "b.png")
    stop(monkeypatch, [*command("grown"), "--data.images", str(images / "1.png")], 3)
    Image.open(images / "0.png").save(moved / "a.png")
    (moved / "c.png").write_text("no image")
    main([*command("grown"), "--ckpt_path", "last", "--data.images", str(moved)])
    problems = results_of(tmp_path / "grown")["problems"]
    assert [problem["target"] for problem in problems] == ["a.png", "b.png", "c.png"]
    assert [problem["status"] == "failed" for problem in problems] == [False, False, True]
    first = tmp_path / "grown" / "problems" / f"{problems[1]['key']}.json"
    assert json.loads(first.read_text())["paths"] == [str(moved / "b.png")]


def test_later_commands_use_the_moved_images(command, images, tmp_path, monkeypatch):
    before, after = tmp_path / "before.png", tmp_path / "after.png"
    Image.open(images / "0.png").save(before)
    stop(monkeypatch, [*command("moved"), "--data.images", str(before)], 3)
    before.rename(after)
    main([*command("moved"), "--ckpt_path", "last", "--data.images", str(after)])
    main(["test", "--run", str(tmp_path / "moved")])
    assert [problem["target"] for problem in results_of(tmp_path / "moved")["problems"]] == ["after.png"]


def test_resuming_from_an_older_checkpoint_replaces_newer_ones(command, whole, tmp_path, monkeypatch):
    stop(monkeypatch, command("broken"), 5)
    older, _ = checkpoints(tmp_path / "broken")
    stop(monkeypatch, [*command("broken"), "--ckpt_path", str(older)], 5)
    last = last_checkpoint(tmp_path / "broken" / "checkpoints")
    assert last.stat().st_mtime_ns == max(path.stat().st_mtime_ns for path in checkpoints(tmp_path / "broken"))
    main([*command("broken"), "--ckpt_path", "last"])
    assert [p["prompt"] for p in results_of(tmp_path / "broken")["problems"]] == [
        p["prompt"] for p in results_of(whole())["problems"]
    ]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--model.optimizer.lr", "0.3"], ["--model.optimizer.lr 0.1", "with 0.3"]),
        (["--model.optimizer", "SGD"], ['--model.optimizer "torch.optim.AdamW"', 'with "torch.optim.SGD"']),
        (["--model.num_tokens", "3"], ["--model.num_tokens 2", "with 3"]),
        (["--data.timestep_range", "[0,500]"], ["--data.timestep_range [500, 1000]", "with [0, 500]"]),
        (["--data.seed", "1"], ["--data.seed 0", "with 1"]),
    ],
)
def test_resuming_with_other_settings_is_refused(command, tmp_path, monkeypatch, capsys, setting, words):
    stop(monkeypatch, command("broken"), 3)
    before = (tmp_path / "broken" / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main([*command("broken"), "--ckpt_path", "last", *setting])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(text in error for text in words)
    assert "Traceback" not in error
    assert (tmp_path / "broken" / "config.yaml").read_bytes() == before


def test_resuming_with_another_method_is_refused(command, monkeypatch, capsys):
    stop(monkeypatch, command("broken"), 3)
    with pytest.raises(SystemExit) as stopped:
        main([*command("broken", "PH2P"), "--ckpt_path", "last"])
    assert stopped.value.code == 2
    assert "methods.PEZ" in capsys.readouterr().err


def test_image_added_to_a_finished_run_is_searched_completely(command, images, whole, tmp_path):
    one = f"{images}/0.png"
    main([*command("grown"), "--data.images", one, "--model.patience", "1", "--model.steps", "6"])
    (first,) = results_of(tmp_path / "grown")["problems"]
    assert first["unet_samples"] < results_of(whole())["problems"][0]["unet_samples"]
    main([*command("grown"), "--ckpt_path", "last"])
    grown = results_of(tmp_path / "grown")["problems"]
    assert grown[0]["prompt"] == first["prompt"]
    whole_one = results_of(whole())["problems"][1]
    assert grown[1]["unet_samples"] == whole_one["unet_samples"]
    for name in ("initial_validation_loss", "validation_loss"):  # the batch differs, and with it the last digits
        assert grown[1][name] == pytest.approx(whole_one[name], rel=1e-5)


def test_retry_searches_failed_problems_again(command, whole, tmp_path, monkeypatch):
    stop(monkeypatch, command("broken"), 3)
    (newest,) = checkpoints(tmp_path / "broken")[-1:]
    checkpoint = torch.load(newest, weights_only=True)
    empty = {
        "prompt": None,
        "token_ids": None,
        "validation_loss": None,
        "initial_validation_loss": None,
        "history": [],
    }
    checkpoint["batch"]["records"][1].update(status="failed", reason="The prompt stopped being finite.", **empty)
    checkpoint["batch"]["active"][1] = False
    torch.save(checkpoint, newest)
    record = tmp_path / "broken" / "problems" / f"{checkpoint['batch']['records'][1]['key']}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **checkpoint["batch"]["records"][1]}))
    main([*command("broken"), "--ckpt_path", "last"])
    assert [problem["status"] == "failed" for problem in results_of(tmp_path / "broken")["problems"]] == [False, True]
    assert "stopped being finite" in (tmp_path / "broken" / "failed.jsonl").read_text()
    main([*command("broken"), "--ckpt_path", "last", "--data.retry", "true"])
    assert not (tmp_path / "broken" / "failed.jsonl").exists()
    again, unbroken = results_of(tmp_path / "broken")["problems"], results_of(whole())["problems"]
    for one, other in zip(again, unbroken, strict=True):  # the batch differs, and with it the last digits
        assert one["status"] == other["status"]
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["missing.ckpt", "broken.ckpt", "text.ckpt"])
def test_invalid_checkpoint_file_is_refused(command, tmp_path, capsys, name):
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    (tmp_path / "text.ckpt").write_text("a red cat on a blue background")
    with pytest.raises(SystemExit) as stopped:
        main([*command("new"), "--ckpt_path", str(tmp_path / name)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert name in error
    assert len(error.strip().splitlines()) <= 2


KILLED = """
import os, signal, sys
import torch
from lightning_prompts import runner
from lightning_prompts.commands.main import main

torch.set_num_threads(1)

class Killed(runner.PromptCheckpoint):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer)
        if batch.steps[0] == 3:
            os.kill(os.getpid(), signal.SIG{})

runner.PromptCheckpoint = Killed
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signal_name", "code"), [("KILL", -signal.SIGKILL), ("TERM", 128 + signal.SIGTERM)])
def test_search_killed_after_a_checkpoint_resumes_identically(command, whole, tmp_path, signal_name, code):
    program = [sys.executable, "-c", KILLED.format(signal_name), *command("broken")]
    ended = subprocess.run(program, cwd=Path(cli.__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert (f"--run {tmp_path / 'broken'} --ckpt_path last resumes it" in ended.stdout) == (signal_name == "TERM")
    assert checkpoints(tmp_path / "broken")
    main([*command("broken"), "--ckpt_path", "last"])
    assert results_of(tmp_path / "broken") == results_of(whole())


def test_search_killed_at_any_time_leaves_prompts(command, whole, tmp_path):
    args = [sys.executable, "-m", "lightning_prompts", *command("broken"), "--model.steps", "100000"]
    with subprocess.Popen(args, cwd=Path(cli.__file__).parents[2], stdout=subprocess.DEVNULL) as program:
        deadline, records = time.monotonic() + 90, tmp_path / "broken" / "problems"
        while not any('"prompt": "' in path.read_text() for path in records.glob("[!.]*.json")):
            assert time.monotonic() < deadline
            assert program.poll() is None
            time.sleep(0.02)
        program.kill()
    for path in records.glob("[!.]*.json"):
        json.loads(path.read_text())
    main([*command("broken"), "--ckpt_path", "last"])
    pairs = zip(results_of(tmp_path / "broken")["problems"], results_of(whole())["problems"], strict=True)
    for broken, unbroken in pairs:  # the killed run may have better prompts
        assert broken["status"] in ("done", "not improved")
        assert broken["validation_loss"] <= unbroken["validation_loss"] + 1e-6
