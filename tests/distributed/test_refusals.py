"""Invalid divisions are refused before the model is loaded, and differences between ranks before the search."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from lightning_prompts.commands import cli
from lightning_prompts.commands.main import main
from lightning_prompts.commands.processes import processes
from lightning_prompts.distributed import handshake, shard_indices
from lightning_prompts.engine.batch import fit_shape, merge
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import PARENT
from lightning_prompts.methods import PEZ, TRAINER
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "image_folder"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def refusal(image_folder, tmp_path, monkeypatch, capsys):
    """Return a function that asserts that settings are refused before the model is loaded, and returns the message."""

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lightning_prompts.backbones.settings.load_backbone", loaded)

    def run(*settings, command="fit", config="configs/pez.yaml", given=True, name=True):
        inputs = ["--data.images", str(image_folder)] if given else []
        folder = ["--run", str(tmp_path / "run")] if name else []
        with pytest.raises(SystemExit) as stopped:
            main([command, "--config", config, *inputs, *folder, *settings])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--trainer.devices", "2", "--trainer.strategy", "ddp"], "give --trainer.strategy problems"),
        (["--trainer.devices", "2", "--trainer.strategy", "fsdp"], "--trainer.strategy 'fsdp' divides a model"),
        (["--trainer.devices", "4", "--trainer.accelerator", "gpu"], "since this machine has no GPU; give cpu or auto"),
        (["--trainer.num_nodes", "2"], "start the command on them with torchrun or srun"),
    ],
)
def test_unsuitable_trainer_settings_are_refused(refusal, settings, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert message in refusal(*settings)


def test_human_feedback_needs_one_process(refusal):
    settings = ("--trainer.devices", "2", "--data.prompts", "a cat")
    assert "asks one user" in refusal(*settings, config="configs/human_feedback.yaml", given=False)


@pytest.fixture
def torchrun(monkeypatch):
    """Set the environment of the second of four processes, two on each of two machines."""
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_devices_other_than_torchruns_are_refused(refusal, torchrun):
    message = refusal("--trainer.devices", "8")
    assert "torchrun has started 2 processes on 2 machines, but --trainer.devices is 8" in message
    assert "leave both out" in message


def test_processes_of_a_launcher_need_a_run_folder(refusal, torchrun):
    assert "need a common folder; give --run runs/NAME" in refusal(name=False)


def test_slurm_tasks_need_a_number_per_node(refusal, monkeypatch):
    variables = {
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NAME": "x",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "give --ntasks-per-node" in refusal()


@pytest.mark.parametrize(
    ("strategy", "given", "chosen", "parts"),
    [
        ("auto", 3, "problems", 2),
        ("auto", 1, "samples", 1),
        ("samples", 3, "samples", 1),
        ("problems", 1, "problems", 2),
    ],
)
def test_strategy_is_chosen_by_the_number_of_inputs(strategy, given, chosen, parts, image_folder, monkeypatch, caplog):
    class Reached(Exception):
        pass

    chosen_strategies = []

    def prepared(self, config, parts):
        chosen_strategies.append((config.trainer.strategy, parts))
        raise Reached

    monkeypatch.setattr(cli.CLI, "_prepare_fit", prepared)
    images = str(image_folder) if given == 3 else str(image_folder / "0.png")
    with pytest.raises(Reached):
        main(
            (
                f"fit --config configs/pez.yaml --data.images {images} --run x --trainer.accelerator cpu "
                f"--trainer.devices 2 --trainer.strategy {strategy}"
            ).split()
        )
    assert chosen_strategies == [(chosen, parts)]
    assert ("1 of 2 processes have nothing to do" in caplog.text) == (strategy == "problems")


@pytest.mark.parametrize(
    ("command", "settings", "chosen"),
    [
        ("test", {}, ("problems", 2, 2)),
        ("validate", {"strategy": "samples"}, ("problems", 2, 2)),  # as the run's config has it
        ("predict", {}, ("problems", 2, 2)),
        ("predict", {"devices": 1}, ("auto", 1, 1)),
        ("predict", {"path": ["a", "b"]}, ("auto", 1, 1)),
        ("predict", {"mix": ["runs/a", "runs/b"]}, ("auto", 1, 1)),
        ("test", {"method": "HumanFeedback"}, ("auto", 1, 1)),
        ("check", {}, ("auto", 1, 1)),
        ("show-space", {"strategy": "problems"}, ("auto", 1, 1)),
    ],
)
def test_commands_that_divide_a_run(command, settings, chosen):
    given = {"devices": 2, "strategy": "auto", "path": None, "mix": None, "method": "PEZ", **settings}
    trainer = SimpleNamespace(accelerator="cpu", num_nodes=1, devices=given["devices"], strategy=given["strategy"])
    model = SimpleNamespace(class_path=f"lightning_prompts.methods.{given['method']}")
    config = SimpleNamespace(trainer=trainer, model=model, path=given["path"], mix=given["mix"])
    with processes(config, command, Path("runs/x")) as parts:
        assert (trainer.strategy, trainer.devices, parts) == chosen
        assert (PARENT in os.environ) == (parts > 1)  # Lightning starts the others


def test_strategy_that_divides_no_run_is_refused():
    trainer = SimpleNamespace(accelerator="cpu", num_nodes=1, devices=2, strategy="ddp")
    config = SimpleNamespace(trainer=trainer, model=SimpleNamespace(class_path="lightning_prompts.methods.PEZ"))
    with (
        pytest.raises(UserError, match=r"--trainer\.strategy 'ddp' divides"),
        processes(config, "test", Path("runs/x")),
    ):
        pass


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((2, "x", None), "The ranks see different images: rank 0 has 3 and rank 1 has 2;"),
        ((3, "x", None), "rank 0 has 3 and rank 1 has 3, but not the same;"),
        (
            (0, "x", "There is no file or folder 'image_folder'; check the path."),
            "Rank 1 found no images: There is no",
        ),
    ],
)
def test_ranks_with_different_images_are_refused(other, message, tiny, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prompts.engine.datamodule.all_gather_object", lambda own: [own, other])
    trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        trainer.fit(
            PEZ(backbone=tiny, num_tokens=2, steps=1, sampler=SamplerSettings(2)),
            datamodule=ImagesToPrompts(str(image_folder)),
        )


def test_message_lists_all_settings_that_differ_from_the_run(tiny, image_folder, tmp_path, capsys):
    args = (
        f"fit --run {tmp_path / 'run'} --trainer.accelerator cpu --model PEZ --model.backbone {tiny} "
        f"--model.num_tokens 2 --model.sampler.num_inference_steps 2 --data.images {image_folder} --model.steps 1 "
        "--data.num_validation_samples 1"
    ).split()
    main(args)
    with pytest.raises(SystemExit):
        main([*args, "--ckpt_path", "last", "--model.optimizer.lr", "0.5", "--data.seed", "3"])
    assert (
        "was started with --model.optimizer.lr 0.1, --data.seed 0 and cannot resume with 0.5, 3;"
        in capsys.readouterr().err
    )


# --- communication of ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (12, 4), (13, 4), (40, 16), (7, 1)])
def test_shards_cover_every_sample_in_the_calls_of_one_process(count, size, ranks, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
    several, shares = [], set()
    for rank in range(ranks):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        own, share = shard_indices(count, size)
        several.append(list(own))
        shares.add(share)
    assert shares == {len(several[0])} == {max(map(len, several))}  # ranks exchange equal numbers of samples
    assert [number for numbers in several for number in numbers][:count] == list(range(count))
    assert all(
        numbers == [count - 1] for numbers in several[-(-count // len(several[0])) :]
    )  # no sample is left for these ranks
    if -(-count // ranks) >= size:
        assert all(numbers[0] % size == 0 or numbers[0] == count - 1 for numbers in several)


def test_handshake_ignores_entries_of_dead_processes():
    """Each process may read entries that processes of an earlier start left in the store."""
    from threading import Thread

    store = torch.distributed.HashStore()
    for attempt in range(3):
        names = {}

        def connect(rank, names=names):
            names[rank] = handshake(store, rank, 3)

        threads = [Thread(target=connect, args=(rank,)) for rank in ((2, 1, 0) if attempt % 2 else (0, 1, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(names) == 3
        assert len(set(names.values())) == 1


def checkpoint(keys, steps, width, **batch):
    """Create a batch of problems whose rows hold their numbers of steps."""
    rows = torch.tensor(steps, dtype=torch.float).view(-1, 1).expand(-1, width).clone()
    state = {0: {"mean": rows.clone(), "step": torch.tensor(steps), "lr": torch.tensor(0.5)}} if keys else {}
    return {
        "epoch": 1,
        "batch": {
            "records": [{"key": key} for key in keys],
            "steps": steps,
            "active": [True] * len(keys),
            "parts": 2,
            **batch,
        },
        "state_dict": {"prompt": rows},
        "optimizer_states": [{"state": state, "param_groups": []}],
    }


def test_checkpoints_of_several_ranks_are_merged():
    some = [
        checkpoint(["a", "b"], [3, 5], 2),
        checkpoint(["c", "d", "b"], [4, 2, 7], 3, active=[True, False, True]),
        checkpoint(["e"], [9], 1),
    ]
    whole = merge(some, lambda record: record["key"] != "e")
    assert [record["key"] for record in whole["batch"]["records"]] == ["a", "c", "b"]  # b at its latest step
    assert whole["batch"]["steps"] == [3, 4, 7]
    assert whole["state_dict"]["prompt"].tolist() == [[3, 3, 0], [4, 4, 4], [7, 7, 7]]
    state = whole["optimizer_states"][0]["state"][0]
    assert state["mean"].tolist() == whole["state_dict"]["prompt"].tolist()
    assert state["step"].tolist() == [3, 4, 7]
    assert float(state["lr"]) == 0.5
    assert whole["epoch"] == 1


def test_checkpoints_without_an_optimizer_are_merged():
    """Lightning saves the state {} if there is no optimizer."""
    some = [checkpoint([key], [1], 2) | {"optimizer_states": [{}]} for key in "ab"]
    assert merge(some, lambda record: True)["optimizer_states"] == [{}]


def test_merge_without_open_problems_is_empty():
    whole = merge([checkpoint(["a"], [1], 2)], lambda record: False)
    assert whole["batch"]["records"] == []
    assert whole["state_dict"]["prompt"].shape == (0, 2)


def test_fit_shape_truncates_or_pads_rows():
    rows = torch.arange(6.0).view(1, 2, 3)
    assert fit_shape(rows, (2, 3)) is rows
    assert fit_shape(rows, (1, 4)).tolist() == [[[0, 1, 2, 0]]]
    assert fit_shape(rows, (3, 2)).tolist() == [[[0, 1], [3, 4], [0, 0]]]
