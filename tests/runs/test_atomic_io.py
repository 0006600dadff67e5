import errno
import os

import pytest

from lightning_prompts.runs.atomic_io import atomic_write, atomic_writer


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("replace", OSError(errno.EIO, os.strerror(errno.EIO))),
        ("replace", KeyboardInterrupt()),
    ],
)
def test_interrupted_write_keeps_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    def fail(*args):
        raise error

    file = tmp_path / "file"
    atomic_write(file, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        atomic_write(file, b"new content")
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (error.errno, str(file))
    else:
        assert caught.value is error
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_bytes() == b"old"


def test_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_writer(tmp_path / "file"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")


def test_data_are_synced_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    atomic_write(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace"]


def test_missing_file_after_a_write_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "file", b"content")


def test_truncated_file_after_a_write_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda source, target: target.write_bytes(b"con"))
    with pytest.raises(OSError, match=r"the file has 3 bytes after 7 were written: .*file"):
        atomic_write(tmp_path / "file", b"content")


def test_files_have_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
