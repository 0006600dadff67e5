"""The folder of a run has one owner at a time; locks of dead processes are ignored."""

import errno
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease
from PIL import Image

from lightning_prompts.callbacks import OwnerGuard
from lightning_prompts.commands.main import main
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import PARENT
from lightning_prompts.python_search import search
from lightning_prompts.runs import lock
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SECONDS = 2.0  # lease of these tests
HOLD = """
import os, socket, sys, time
from pathlib import Path
import lightning_prompts.runs.lock as module
module.LEASE, module.HEARTBEAT = {lease}, {heartbeat}
{before}
with module.RunLock(Path({folder!r})) as lock:
    print("holds", flush=True)
    while True:
        lock.check()
        time.sleep(0.05)
"""
OTHER_MACHINE = "socket.gethostname = lambda: 'elsewhere'"
OLD_CLOCK = """
real, beats = os.utime, iter(range(10**6))
os.utime = lambda file, times=None, **more: real(file, ns=(next(beats), next(beats)))  # its clock is at 1970
"""


@pytest.fixture
def short(monkeypatch):
    """Shorten the lease."""
    monkeypatch.setattr(lock, "LEASE", SECONDS)
    monkeypatch.setattr(lock, "HEARTBEAT", SECONDS / 10)


@pytest.fixture
def holder():
    """Start a process that locks a folder, on this machine or on one that it pretends to be."""
    started = []

    def start(folder, before="", lease=lock.LEASE):
        code = HOLD.format(lease=lease, heartbeat=SECONDS / 10, folder=str(folder), before=before)
        process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, text=True, stdout=-1, stderr=-1)
        started.append(process)
        assert process.stdout.readline() == "holds\n", process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def seconds_until_locked(folder):
    """Return the seconds until the folder can be locked."""
    start = time.monotonic()
    with RunLock(folder):
        return time.monotonic() - start


# The last filelock for Python 3.10 checks the lock of another machine by the file's time.
BY_OWN_CLOCK = pytest.mark.skipif(sys.version_info < (3, 11), reason="filelock uses the file's time with Python 3.10")


@pytest.mark.parametrize("before", ["", OTHER_MACHINE, pytest.param(OTHER_MACHINE + OLD_CLOCK, marks=BY_OWN_CLOCK)])
def test_message_names_the_owner(before, holder, tmp_path):
    process = holder(tmp_path, before)
    name = "elsewhere" if before else re.escape(socket.gethostname())
    since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \S+"
    owner = rf"process {process.pid} on {name} since {since}"
    message = rf"{re.escape(str(tmp_path))} is in use by {owner}; wait for it to end, stop"
    for _ in range(3):
        with pytest.raises(UserError, match=message):
            seconds_until_locked(tmp_path)
    assert process.poll() is None


def test_lock_of_a_killed_process_is_ignored(holder, tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists()
    assert seconds_until_locked(tmp_path) < 1
    assert not list(tmp_path.iterdir())


def test_lock_with_a_reused_process_id_is_ignored(holder, tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    remaining = tmp_path / ".lock"
    assert f"pid={process.pid}\n" in remaining.read_text()
    remaining.write_text(
        remaining.read_text().replace(f"pid={process.pid}\n", f"pid={os.getpid()}\n")
    )  # like this process
    assert seconds_until_locked(tmp_path) < 1


@pytest.mark.parametrize("how", ["elsewhere", "by a clock that is behind", "nobody has reaped it", "empty"])
def test_lock_without_heartbeat_expires_after_the_lease(how, short, holder, tmp_path):
    if how == "empty":  # after a power failure
        (tmp_path / ".lock").touch()
    else:
        process = holder(tmp_path, "" if how.startswith("nobody") else OTHER_MACHINE, SECONDS)
        process.kill()
        if how.startswith("nobody"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
    if "clock" in how:
        os.utime(tmp_path / ".lock", (2**32, 2**32))
    assert SECONDS * 0.9 < seconds_until_locked(tmp_path) < SECONDS * 3
    assert not list(tmp_path.iterdir())


def test_suspended_owner_ends_when_another_has_taken_over(short, holder, tmp_path):
    process = holder(tmp_path, lease=SECONDS)
    process.send_signal(signal.SIGSTOP)
    with RunLock(tmp_path):
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=20)
        assert f"was taken over by process {os.getpid()} on " in error
        assert "UserError" in error
        assert process.returncode == 1
    assert not list(tmp_path.iterdir())


def test_end_of_a_child_process_keeps_the_lock(tmp_path):
    """Forked processes, as libraries start them, inherit the lock's cleanup."""
    with RunLock(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=sys.exit)
        child.start()
        child.join()
        assert (tmp_path / ".lock").exists()
        assert (tmp_path / ".lock-holder").exists()


def test_folder_without_files_is_removed(tmp_path):
    with RunLock(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").exists()
    with RunLock(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    (tmp_path / "old").mkdir()
    with RunLock(tmp_path / "old"):
        pass
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["file", "old", "used"]


def test_discarded_run_folder_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.prepare(resume=False)
        folder.config.touch()
        folder.discard()
        assert (folder.path / ".lock").exists()  # until the end
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_refused(tmp_path, monkeypatch):
    def refuse(self, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(SoftFileLease, "acquire", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"), RunFolder(tmp_path).locked():
        pass


def test_leftovers_of_a_takeover_are_deleted(tmp_path):
    remaining = tmp_path / ".lock.break.1.00"
    remaining.touch()
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.prepare(resume=False)
    assert not remaining.exists()


def test_process_whose_parent_is_gone_ends(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    guard = OwnerGuard(None)
    guard.on_train_batch_start(None, None, None, 0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(UserError, match="is gone; repeat the command with --ckpt_path last to resume the run"):
        guard.on_train_batch_start(None, None, None, 0)


# --- commands


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Return the folder of a finished search, and its command."""
    folder = tmp_path_factory.mktemp("locked")
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    args = (
        f"fit --run {folder / 'run'} --trainer.accelerator cpu --model PEZ --model.backbone {tiny} "
        f"--model.num_tokens 2 --model.sampler.num_inference_steps 2 --data.images {folder / 'red.png'} "
        "--model.steps 1 --data.num_validation_samples 1"
    ).split()
    main(args)
    return folder / "run", args


def contents(folder):
    """Return the content of all files but the lock, which changes with each heartbeat."""
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file() and path.name != ".lock"}


def test_commands_refuse_a_folder_that_is_in_use(run, holder, tmp_path, capsys):
    folder, fit = run
    process = holder(folder)
    before = contents(folder)
    message = f"in use by process {process.pid} on "
    mixed = ["predict", "--mix", str(folder), str(folder), "--run", str(tmp_path / "mix")]
    holder(tmp_path / "mix")
    for args in (
        [*fit, "--ckpt_path", "last"],
        fit,
        ["test", "--run", str(folder)],
        ["predict", "--run", str(folder)],
        mixed,
    ):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 2
        assert ("in use by" if args is mixed else message) in capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        search("pez", {"images": fit[fit.index("--data.images") + 1], "backbone": "emoji"}, folder=folder)
    main(["validate", "--run", str(folder)])  # writes nothing
    assert contents(folder) == before


def test_commands_leave_no_lock(run):
    folder, fit = run
    for args in ([*fit, "--ckpt_path", "last"], ["test", "--run", str(folder)], ["predict", "--run", str(folder)]):
        main(args)
        assert not list(folder.glob(".*"))


def test_calls_from_python_lock_their_folder(run, tmp_path, monkeypatch):
    _, fit = run
    locked = []
    monkeypatch.setattr(OwnerGuard, "on_train_batch_start", lambda self, *_: locked.append(self.lock.path.exists()))
    how = {
        "images": fit[fit.index("--data.images") + 1],
        "backbone": fit[fit.index("--model.backbone") + 1],
        "num_tokens": 2,
        "steps": 1,
        "sampler": SamplerSettings(2),
        "num_validation_samples": 1,
    }
    search("pez", how, folder=tmp_path / "kept", device="cpu")
    assert locked
    assert all(locked)
    assert not list((tmp_path / "kept").glob(".*"))


@pytest.mark.slow
def test_second_search_is_refused_until_the_first_is_killed(run, tmp_path):
    folder = tmp_path / "run"
    _, fit = run
    args = [*fit, "--run", str(folder), "--model.steps", "2000"]
    del args[1:3]  # the other --run
    first = subprocess.Popen(
        [sys.executable, "train.py", *args], cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    )
    while not list(folder.glob("checkpoints/*.ckpt")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.1)
    args += ["--ckpt_path", "last"]
    second = subprocess.run(
        [sys.executable, "train.py", *args], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert second.returncode == 2
    assert f"in use by process {first.pid} on " in second.stderr
    first.kill()
    first.communicate()
    args[args.index("2000")] = "5"
    third = subprocess.run(
        [sys.executable, "train.py", *args], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert third.returncode == 0, third.stderr
    assert len((folder / "results.jsonl").read_text().splitlines()) == 1
    assert not list(folder.glob(".*"))
