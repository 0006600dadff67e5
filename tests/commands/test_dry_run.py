"""`dry-run` measures a search and writes nothing."""

import re

import pytest
import torch

from lightning_prompts.commands.dry_run import duration, peak_memory, reset_peak_memory
from lightning_prompts.commands.main import main

CPU = ["--trainer.accelerator", "cpu"]
SHORT = ["--model.sampler.num_inference_steps", "2", "--model.microbatch", "8"]


def test_dry_run_prints_memory_and_time_and_writes_nothing(tiny, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = (
        f"dry-run --model PH2P --model.backbone {tiny} --model.score_every_n_steps 8 --model.steps 40 "
        f"--data ImagesToPrompts --data.images {image_folder}"
    )
    main([*command.split(), *SHORT, *CPU])
    output = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "3 problems, microbatch 8" in output
    for part in ("weights", "scoring", "a step", "the results"):
        (most,) = re.findall(rf"{part} +([\d.]+) GiB", output)
        assert 0 < float(most) < 20 if part != "weights" else float(most) < 0.1
    assert "A search of 40 steps and 6 scorings would take" in output
    for setting in (
        "backbone.dtype bfloat16",
        "microbatch 4",
        "backbone.save_memory [gradient_checkpointing]",
        "backbone.image_size 8",
    ):
        assert f"--model.{setting} " in output
    assert "cpu_offload" not in output  # on the CPU there is nothing to move


@pytest.mark.parametrize(
    "method",
    [
        ["MetricGuidance", "--model.objective", "Sharpness"],
        ["DPODiff", "--model.positive", "[neighbors]", "--model.negative", "[]"],
    ],
    ids=["embeddings", "words"],
)
def test_dry_run_measures_methods_on_prompts(method, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = (
        ["--model.schedule", "fix-0"]
        if method[0] == "DPODiff"
        else ["--model.backbone.save_memory", "[gradient_checkpointing]"]
    )
    main(["dry-run", "--model", *method, "--model.backbone", tiny, "--data.prompts", "a red cat", *extra, *SHORT, *CPU])
    output = capsys.readouterr().out
    assert "the results" in output
    assert ("gradient_checkpointing" in output) == (method[0] == "DPODiff")


def test_dry_run_refuses_human_feedback(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["dry-run", "--model", "HumanFeedback", "--model.backbone", tiny, "--data.prompts", "a red cat", *CPU])
    assert stop.value.code == 2
    assert "A user's choices cannot be measured" in capsys.readouterr().err


def test_peak_memory_counts_since_the_reset():
    device, size = torch.device("cpu"), 2**28
    reset_peak_memory(device)
    before = peak_memory(device)
    allocated = torch.ones(size, dtype=torch.uint8)
    assert peak_memory(device) - before >= 0.9 * size
    del allocated
    assert peak_memory(device) - before >= 0.9 * size
    reset_peak_memory(device)
    assert peak_memory(device) - before < 0.5 * size


def test_duration_uses_readable_units():
    assert [duration(seconds) for seconds in (12.3, 99.4, 130, 5900, 9000)] == [
        "12 s",
        "99 s",
        "2 min",
        "98 min",
        "2.5 h",
    ]
