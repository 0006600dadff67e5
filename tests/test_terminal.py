"""Printed text is escaped, and a search continues when its terminal is closed."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from pytorch_lightning.profilers import SimpleProfiler

from lightning_prompts import terminal
from lightning_prompts.terminal import say

ROOT = Path(__file__).parents[1]
HOSTILE = "a\x1b[31mred\x1b[0m\rerror: forged\nResults are in /tmp\u202egnp.exe\x07"


def test_control_characters_are_escaped(capsys):
    say(HOSTILE, "second")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert all(char.isprintable() for line in out.splitlines() for char in line)
    assert out.endswith("\nsecond\n")
    assert "error: forged" in out  # printed within its line


def test_characters_that_a_stream_cannot_encode_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    terminal.prepare()
    say("ünï 犬")
    logging.getLogger("lightning_prompts.test").info("a %s", "犬\nforged\x1b[2J")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\xfcn\\xef \\u72ac\na \\u72ac forged\\x1b[2J\n"


class ClosedStream(io.StringIO):
    attempts = 0

    def write(self, text):
        self.attempts += 1
        raise BrokenPipeError(32, "Broken pipe")


def test_closed_stream_is_ignored():
    stream = ClosedStream()
    say("one", stream=stream)
    say("two", stream=stream)
    assert stream.attempts == 2


@pytest.mark.parametrize("closed", ["pipe", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_search_succeeds_when_its_output_is_closed(closed, tiny, tmp_path):
    """The name has escapes and a newline; an ASCII terminal closes after the first line, or the disk is full."""
    if closed == "full" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    name = "p\x1b[2J\nforged.png"
    Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "fit",
        "--run",
        str(tmp_path / "run"),
        "--model=PEZ",
        f"--model.backbone={tiny}",
        "--model.num_tokens=2",
        "--model.sampler.num_inference_steps=2",
        "--data=ImagesToPrompts",
        "--data.images",
        str(tmp_path / name),
        "--model.steps=2",
        "--data.num_noise_samples=1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    if closed == "full":
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
        code, err = done.returncode, done.stderr
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        first = process.stdout.readline()
        process.stdout.close()
        code, err = process.wait(), process.stderr.read()
        process.stderr.close()
        assert first.startswith(b"step 0  p\\x1b[2J forged.png  ")
    assert (code, err) == (0, b"")
    assert (tmp_path / "run" / "result.json").exists()


def test_profiler_report_keeps_its_lines(capsys):
    terminal.prepare()
    profiler = SimpleProfiler()
    with profiler.profile("one action"):
        pass
    profiler.describe()
    out = capsys.readouterr().out
    assert "Profiler Report" in out
    assert any("one action" in line and len(line) < 200 for line in out.splitlines())
