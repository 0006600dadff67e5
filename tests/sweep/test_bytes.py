"""A loader reads any bytes in a file, or refuses them in one sentence."""

import csv
import io
import json
import struct
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.embedding_files import read_embedding
from lightning_prompts.data.images import load_image
from lightning_prompts.data.prompts import find_prompts
from lightning_prompts.data.targets import find_targets
from lightning_prompts.engine.checkpoint import is_checkpoint
from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff.word_files import read_word_file
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.record_io import RECORD_VERSION

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

KEY = "0123456789abcdef"
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind)
    return buffer.getvalue()


def archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (
            ("0.png", encoded("PNG")),
            ("0.txt", b"a cat"),
            ("1.json", b'{"caption": "x"}'),
            ("1.png", encoded("PNG")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def table():
    text = io.StringIO()
    csv.writer(text).writerows([["file", "caption", "subject"], ["a.png", "a, cat", "x"], ["b.png", 'a "dog"', "x"]])
    return text.getvalue().encode()


RECORD = json.dumps(
    {
        "version": RECORD_VERSION,
        **asdict(Problem(KEY, "a.png", ["a.png"], prompt="a", token_ids=[1], validation_loss=0.5)),
    }
).encode()
BATCH = {name: [] for name in ("records", "active", "steps", "stale", "halvings", "skipped", "best")} | {
    "parts": 1,
    "microbatch": 1,
}
CHECKPOINT = {
    "batch": BATCH,
    "state_dict": {"p": torch.zeros(0, 1)},
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": pl.__version__,
}
VALID = {
    "a.png": [encoded("PNG")],
    "a.jpg": [encoded("JPEG")],
    "a.webp": [encoded("WEBP")],
    "a.gif": [encoded("GIF")],
    "a.bmp": [encoded("BMP")],
    "a.tif": [encoded("TIFF")],
    "a.csv": [table()],
    "a.jsonl": [b'{"file": "a.png", "caption": "x"}\n{"file": ["b.png", "c.png"], "subject": "y"}\n'],
    "a.tar": [archive()],
    "a.safetensors": [save({"<x>": np.zeros((2, 32), np.float32)}), struct.pack("<Q", 2) + b"{}"],
    "a.pt": [pickled({"string_to_param": {"*": torch.zeros(2, 32)}}), pickled({"<x>": torch.zeros(32)})],
    "a.txt": ["a cat\nein Hündchen\n".encode()],
    "a.json": [b'{"a cat": {"synonym": {"cat": ["kitten"]}, "antonym": {}}}'],
    f"{KEY}.json": [RECORD],
    "a.ckpt": [pickled(CHECKPOINT)],
}


@st.composite
def contents(draw, valid):
    """Return arbitrary bytes, or a valid file that is truncated, changed or extended."""
    whole = draw(st.sampled_from(valid))
    how = draw(st.sampled_from(["any", "cut", "changed", "longer"]))
    if how == "any":
        return draw(st.binary(max_size=400))
    if how == "cut":
        return whole[: draw(st.integers(0, max(len(whole) - 1, 0)))]
    if how == "longer":
        return whole + draw(st.binary(max_size=50))
    changed = bytearray(whole)
    for place, byte in draw(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=8)
    ):
        changed[place] = byte
    return bytes(changed)


def assert_loads_or_refuses(load):
    """Assert that a loader succeeds or raises a UserError of one line."""
    try:
        load()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert message.endswith(".")


@pytest.fixture(scope="module")
def backbone(sd1):
    return load_backbone(str(sd1))


@pytest.mark.parametrize(
    "name", [name for name in VALID if name.endswith((".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"))]
)
def test_image_files_load_or_are_refused(name, tmp_path):
    @many
    @given(contents(VALID[name]))
    def check(content):
        (tmp_path / name).write_bytes(content)
        assert_loads_or_refuses(lambda: load_image(tmp_path / name, 16))

    check()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tar"])
def test_lists_and_shards_load_or_are_refused(name, tmp_path):
    for other in "abc":
        (tmp_path / f"{other}.png").write_bytes(encoded("PNG"))

    @many
    @given(contents(VALID[name]))
    def check(content):
        (tmp_path / name).write_bytes(content)

        def load():
            for target in find_targets([tmp_path / name]):
                for path in () if target.error else target.paths:
                    assert_loads_or_refuses(lambda path=path: load_image(path, 16))

        assert_loads_or_refuses(load)

    check()


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_prompt_lists_load_or_are_refused(name, tmp_path):
    @many
    @given(contents([content.replace(b"file", b"prompt") for content in VALID[name]]))
    def check(content):
        (tmp_path / name).write_bytes(content)
        assert_loads_or_refuses(lambda: find_prompts([str(tmp_path / name)]))

    check()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_embedding_files_load_or_are_refused(name, allow_pickle, backbone, tmp_path):
    @many
    @given(contents(VALID[name]))
    def check(content):
        (tmp_path / name).write_bytes(content)
        assert_loads_or_refuses(lambda: read_embedding(str(tmp_path / name), backbone, allow_pickle))

    check()


def test_records_load_or_are_refused_unchanged(tmp_path):
    folder = RunFolder(tmp_path)
    folder.problems.mkdir()

    @many
    @given(contents(VALID[f"{KEY}.json"]))
    def check(content):
        (folder.problems / f"{KEY}.json").write_bytes(content)
        assert_loads_or_refuses(folder.check)
        assert (folder.problems / f"{KEY}.json").read_bytes() == content

    check()


def test_checkpoints_are_recognized(tmp_path):
    (valid,) = VALID["a.ckpt"]
    (tmp_path / "a.ckpt").write_bytes(valid)
    assert is_checkpoint(tmp_path / "a.ckpt")

    @many
    @given(contents(VALID["a.ckpt"]))
    def check(content):
        (tmp_path / "a.ckpt").write_bytes(content)
        assert isinstance(is_checkpoint(tmp_path / "a.ckpt"), bool)  # does not raise

    check()


def test_dictionaries_load_or_are_refused(tmp_path):
    @many
    @given(contents(VALID["a.json"]))
    def check(content):
        (tmp_path / "a.json").write_bytes(content)
        assert_loads_or_refuses(lambda: read_word_file(str(tmp_path / "a.json")))

    check()
