"""Wrong inputs, broken files and hostile settings end in one sentence and exit code 2, and change nothing.

The cases are in the tables beside this file. A case has a `command`, or a `base` from below with its `args`; with
`each`, it is one case for each value in place of {}. `words` must be in the message ("." for no particular ones),
`more` is added to the end, `damage` names the damage to a copy of a finished run, and `seconds` limits the time. {tiny}
is a model, {inputs} the folder of broken files, {run} a finished run, {damaged} its damaged copy, and {new} a folder
that must not exist before or after.
"""

import io
import json
import os
import pickle
import shlex
import shutil
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

from lightning_prompts.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent
METHOD = {"pez": "PEZ", "ph2p": "PH2P", "gcg": "GCG"}
ON_PROMPTS = {
    "dpo": "DPODiff",
    "metric": "MetricGuidance",
    "invariance": "SeedInvariance",
    "feedback": "HumanFeedback",
    "prompts": "DPODiff",
}
OPTIONS = {"metric": " --model.objective=Sharpness", "prompts": " --model.positive=[neighbors] --model.negative=[]"}
SAMPLER = "--model.sampler.num_inference_steps"
BASES = {
    **{
        f"fit {name}": (
            f"fit --run={{new}} --model={method} --model.backbone={{tiny}} {SAMPLER}=4 "
            "--data=ImagesToPrompts --data.images={inputs}/a.png"
        )
        for name, method in METHOD.items()
    },
    **{
        f"fit {name}": (
            f"fit --run={{new}} --model={method} --model.backbone={{tiny}} {SAMPLER}=4{OPTIONS.get(name, '')} "
            f"--data=Prompts{'' if name == 'prompts' else ' --data.prompts=cat'}"
        )
        for name, method in ON_PROMPTS.items()
    },
    "fit only": "fit --run={new} --model=PEZ --model.backbone={tiny} --data=ImagesToPrompts",
    "fit again": (
        f"fit --run={{damaged}} --ckpt_path=last --model=PEZ --model.backbone={{tiny}} --model.num_tokens=2 "
        f"{SAMPLER}=2 --data=ImagesToPrompts --data.images={{inputs}}/a.png --model.steps=1 --data.num_noise_samples=1"
    ),
}


class Evil:
    """A pickle that would create a file."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def broken_files(inputs):
    """Write the files that the tables name."""
    red = Image.new("RGB", (64, 64), "red")
    red.putpixel((3, 3), (0, 255, 0))
    red.save(inputs / "a.png")
    png = (inputs / "a.png").read_bytes()
    huge = bytearray(png)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    deep = "[" * 100_000
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    files = {
        "cut.png": png[: len(png) // 2],
        "empty.png": b"",
        "text.png": b"no image",
        "svg.png": b"<svg xmlns='x'/>",
        "huge.png": bytes(huge),
        "empty.csv": b"",
        "nocolumn.csv": b"name\nx\n",
        "missing.csv": b"file\nnowhere.png\n",
        "binary.csv": os.urandom(500),
        "nul.csv": b"file\n\0\n",
        "utf16.csv": "file\na.png\n".encode("utf-16"),
        "list.jsonl": b"[1]\n",
        "numbers.jsonl": b"1\n2\n",
        "deep.jsonl": deep.encode(),
        "missing.jsonl": b'{"file": "nowhere.png"}\n',
        "blank.txt": b"\n \n",
        "binary.txt": b"\xff\xfe\xfa\n",
        "empty.tar": b"",
        "text.tar": b"no archive",
        "shard.tar.gz": b"\x1f\x8b",
        "cut.safetensors": struct.pack("<Q", 10**6) + b"{}",
        "text.safetensors": b"no tensors",
        "empty.safetensors": b"",
        "text.pt": b"no pickle",
        "evil.pt": pickle.dumps(Evil()),
        "text.json": b"{",
        "list.json": b"[1]",
        "deep.json": deep.encode(),
        "empty.yaml": b"",
        "list.yaml": b"- 1\n",
        "text.yaml": b"hello",
        "utf16.yaml": "model: PEZ\n".encode("utf-16"),
        "binary.yaml": os.urandom(300),
        "deep.yaml": ("a: " + "[" * 10_000 + "]" * 10_000).encode(),
        "bomb.yaml": f"a0: &a0 [x]\n{bomb}".encode(),
        "tab.yaml": b"model:\n\tclass_path: PEZ\n",
        "noinit.yaml": b"model:\n  class_path: PEZ\n  init_args:\n",
        "badclass.yaml": b"model:\n  class_path: NoSuchMethod\n",
        "evil.yaml": b"model: !!python/object/apply:os.mkdir [evil]\n",
        "badkey.yaml": b"model:\n  class_path: PEZ\nnonsense: 1\n",
    }
    for name, content in files.items():
        (inputs / name).write_bytes(content)
    red.resize((4, 4)).save(inputs / "tiny.png")
    (inputs / "folder.png").mkdir()
    save_file({"unrelated": np.zeros((2, 2), np.float32)}, inputs / "other.safetensors")
    torch.save({"x": 1, "y": complex}, inputs / "pickle.pt")
    with tarfile.open(inputs / "cut.tar", "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(png)
        archive.addfile(member, io.BytesIO(png))
    (inputs / "cut.tar").write_bytes((inputs / "cut.tar").read_bytes()[:600])
    with tarfile.open(inputs / "deviceonly.tar", "w") as archive:
        device = tarfile.TarInfo("0.png")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)


def damage(run, how):
    """Damage the files of a run."""
    (record,) = (run / "problems").glob("*.json")
    content = record.read_bytes()
    changed = json.loads(content)
    config = (run / "config.yaml").read_bytes()
    damages = {
        "record cut": lambda: record.write_bytes(content[: len(content) // 2]),
        "record empty": lambda: record.write_bytes(b""),
        "record of a newer version": lambda: record.write_text(json.dumps(changed | {"version": 99})),
        "record with another field": lambda: record.write_text(json.dumps(changed | {"new": 1})),
        "record of a list": lambda: record.write_text("[1]"),
        "record with a wrong type": lambda: record.write_text(json.dumps(changed | {"prompt": 3})),
        "record renamed": lambda: record.rename(record.with_name("0123456789abcdef.json")),
        "record gone": record.unlink,
        "problems gone": lambda: shutil.rmtree(run / "problems"),
        "problems a file": lambda: (shutil.rmtree(run / "problems"), (run / "problems").write_text("x")),
        "config empty": lambda: (run / "config.yaml").write_bytes(b""),
        "config cut": lambda: (run / "config.yaml").write_bytes(config[: len(config) // 3] + b"\n  {"),
        "config of a list": lambda: (run / "config.yaml").write_bytes(b"- 1\n"),
        "config gone": (run / "config.yaml").unlink,
        "config binary": lambda: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
        "nothing": lambda: None,
    }
    damages[how]()


def cases():
    """Return every case of every table."""
    for table in sorted(HERE.glob("*.yaml")):
        for number, row in enumerate(yaml.safe_load(table.read_text())):
            for value in map(_shown, row.get("each", [""])):
                damaged = row["damage"].replace("{}", value) if "damage" in row else None
                text = BASES[row["base"]] + " " + row["args"] if "base" in row else row["command"]
                words = shlex.split(f"{text} {row.get('more', '')}")
                args = [
                    word if "damage" in row else word.replace("{}", value) if word.count("{}") == 1 else word
                    for word in words
                ]
                yield pytest.param(
                    args, row["words"], damaged, row.get("seconds", 30), id=f"{table.stem}-{number}-{value}"[:60]
                )


def _shown(value):
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    broken_files(inputs)
    return inputs


@pytest.fixture(scope="session")
def finished(tiny, inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    main([word.format(damaged=run, inputs=inputs, tiny=tiny) for word in shlex.split(BASES["fit again"])])
    return run


def content(*folders):
    """Return the content of all files."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("args", "words", "damaged", "seconds"), list(cases()))
def test_wrong_input_ends_in_one_sentence_and_changes_nothing(
    args, words, damaged, seconds, tiny, inputs, finished, tmp_path, capsys, monkeypatch
):
    names = {
        "tiny": str(tiny),
        "inputs": str(inputs),
        "run": str(finished),
        "new": str(tmp_path / "new"),
        "damaged": str(tmp_path / "damaged"),
    }
    if damaged:
        shutil.copytree(finished, tmp_path / "damaged")
        damage(tmp_path / "damaged", damaged)
    for name, value in names.items():
        args = [arg.replace(f"{{{name}}}", value) for arg in args]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = content(tmp_path, inputs, finished)
    capsys.readouterr()
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert time.perf_counter() - start < seconds
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert content(tmp_path, inputs, finished) == before
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "here").iterdir())
