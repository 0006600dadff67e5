import errno
import json
import math
import multiprocessing
import os
import re
import resource
import time
from dataclasses import asdict, replace
from datetime import datetime

import pytest

from lightning_prompts.errors import UserError
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import DPODiffResult, InversionResult, Problem
from lightning_prompts.runs.result_files import write_results

# Child processes that only write files; forked, so that tests do not wait for imports.
fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FULL = Problem(
    key="0123456789abcdef",
    target="photo.png",
    paths=["images/photo.png"],
    caption="a red car",
    index=3,
    status="failed",
    reason="The image is empty.",
    prompt="red car 🚗",
    token_ids=[5, 7],
    validation_loss=0.1 + 0.2,
    initial_validation_loss=0.5,
    unet_samples=640,
    seconds=1.5,
    result=InversionResult(
        clip_similarity=0.25,
        heldout_clip_similarity=0.2,
        clip_text_similarity=0.3,
        diversity=0.1,
        lpips=0.6,
        word_recall=1.0,
        dictionary_words=0.5,
        special_characters=0.05,
        perplexity=60.0,
    ),
)


def key(number):
    return f"{number:016x}"


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a run", result_class=InversionResult)
    folder.prepare(resume=False)
    return folder


def write_result(folder, **settings):
    write_results(folder, "PH2P", "emoji", 7, settings, {"torch": "2.6"})
    return json.loads(folder.result.read_bytes())


# Records


def test_record_round_trips(folder):
    folder.save(FULL)
    assert folder.load() == {FULL.key: FULL}
    folder.save(Problem(key(1), "b.png"))
    assert folder.load()[key(1)] == Problem(key(1), "b.png")


def test_records_are_sorted_by_index(folder):
    for index, number in enumerate((9, 3, 12, 1)):
        folder.save(Problem(key(number), "x", index=index))
    assert list(folder.load()) == [key(9), key(3), key(12), key(1)]


def test_records_of_equal_index_are_sorted_by_key(folder):
    for number in (9, 3, 12, 1):
        folder.save(Problem(key(number), "x"))
    assert list(folder.load()) == [key(1), key(3), key(9), key(12)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_written_as_null(folder, value):
    folder.save(Problem(key(1), "x", validation_loss=value, result=InversionResult(lpips=value, clip_similarity=0.5)))
    record = json.loads((folder.problems / f"{key(1)}.json").read_bytes())
    assert (record["validation_loss"], record["result"]["lpips"], record["result"]["clip_similarity"]) == (
        None,
        None,
        0.5,
    )


def test_unserializable_value_is_refused_and_the_record_stays(folder):
    folder.save(FULL)
    with pytest.raises(TypeError):
        folder.save(Problem(FULL.key, "x", validation_loss=object()))
    assert folder.load() == {FULL.key: FULL}


def test_file_names_that_are_not_utf8_round_trip(folder):
    name = os.fsdecode(b"caf\xe9.png")
    folder.save(Problem(key(1), name, paths=[name], prompt=name))
    assert folder.load()[key(1)].paths == [name]
    assert write_result(folder)["problems"][0]["target"] == name
    for file in (folder.problems / f"{key(1)}.json", folder.result, folder.prompt):
        assert r"caf\udce9.png" in file.read_text("utf-8")


def test_non_ascii_text_is_written_unescaped(folder):
    folder.save(FULL)
    assert "red car 🚗" in (folder.problems / f"{FULL.key}.json").read_text("utf-8")


BROKEN = {
    b"": "is not valid JSON, as if cut short",
    b'{"key": "00000000': "is not valid JSON, as if cut short",
    b"\xff\xfe\x00": "is not valid JSON, as if cut short",
    b"[" * 100_000: "cannot be read",
    b"[]": "cannot be read",
    b"null": "cannot be read",
    b'{"key": "0000000000000001", "target": "x"}': "it lacks 'version'",
    b'{"version": 3, "key": "0000000000000001", "target": "x"}': (
        "version '3', and this program reads version 2; use the newer program"
    ),
    b'{"version": "2", "key": "0000000000000001", "target": "x"}': "has the version '2'",
    b'{"version": 2, "key": "0000000000000001"}': "target",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "unknown": 1}': "the field 'unknown' is unknown",
    b'{"version": 2, "key": "0000000000000002", "target": "x"}': "its key is '0000000000000002'",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "status": "opne"}': "status",
    b'{"version": 2, "key": "0000000000000001", "target": null}': "target",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "token_ids": [[5]]}': r"token_ids\.0",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "history": [{"prompt": 5}]}': r"history\.0",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "paths": "x"}': "paths",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "result": {"lpips": "far"}}': "lpips",
    b'{"version": 2, "key": "0000000000000001", "target": "x", "result": {"budget": 1}}': (
        "the field 'budget' is unknown"
    ),
    b'{"version": 2, "key": "0000000000000001", "target": "x", "result": [1]}': "cannot be read",
}


@pytest.mark.parametrize(("content", "reason"), list(BROKEN.items()), ids=range(len(BROKEN)))
def test_broken_record_is_refused_and_nothing_is_written(folder, content, reason):
    folder.save(FULL)
    write_result(folder)
    before, broken = folder.result.read_bytes(), folder.problems / f"{key(1)}.json"
    broken.write_bytes(content)
    for read in (folder.check, folder.load, lambda: folder.read(key(1)), lambda: write_result(folder)):
        with pytest.raises(UserError, match=reason) as refused:
            read()
        assert str(broken) in str(refused.value)
        assert len(str(refused.value)) < 400 + len(str(broken))
    assert folder.result.read_bytes() == before
    assert broken.read_bytes() == content
    assert not list(folder.path.glob(".*"))


def test_null_in_a_list_of_numbers_is_read_as_nan(folder):
    better = {"unet_samples": 1, "validation_loss": math.nan, "prompt": "a"}
    folder.result_class = DPODiffResult
    result = DPODiffResult(fresh_loss_after=[0.5, math.nan])
    folder.save(Problem(key(1), "x", validation_loss=math.nan, history=[better], result=result))
    record = folder.load()[key(1)]
    assert record.validation_loss is None
    assert record.result.fresh_loss_after[0] == 0.5
    assert math.isnan(record.result.fresh_loss_after[1])
    assert math.isnan(record.history[0]["validation_loss"])


@pytest.mark.parametrize("gone", ["record", "records", "folder", "file"])
def test_result_without_its_record_is_not_overwritten(folder, gone):
    folder.save(FULL)
    folder.save(replace(FULL, key=key(1), status="done"))
    write_result(folder)
    before = folder.result.read_bytes()
    (folder.problems / f"{key(1)}.json").unlink()
    if gone != "record":
        (folder.problems / f"{FULL.key}.json").unlink()
    if gone in ("folder", "file"):
        folder.problems.rmdir()
    if gone == "file":
        folder.problems.touch()
    message = (
        "must be a folder of records"
        if gone == "file"
        else f"has the result of {key(1)}, but .*{key(1)}.json( and 1 more records?)? is missing"
    )
    with pytest.raises(UserError, match=message):
        folder.check()
    with pytest.raises(UserError, match=r"is missing; restore it, or rename result\.json to continue without it"):
        write_result(folder)
    assert folder.result.read_bytes() == before
    folder.result.rename(folder.path / "old.json")
    if gone == "record":
        folder.check()
        assert [entry["key"] for entry in write_result(folder)["problems"]] == [FULL.key]


# Writing


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_failed_write_keeps_the_old_record_and_nothing_else(folder):
    folder.save(FULL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the kernel limits files to this size
    try:
        with pytest.raises(OSError, match="File too large"):
            folder.save(Problem(FULL.key, "x" * (3 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(folder.problems) == [f"{FULL.key}.json"]
    assert folder.load() == {FULL.key: FULL}


def save_many(path, barrier, numbers):
    barrier.wait()
    for number in numbers:
        RunFolder(path).save(Problem(key(number), "x", index=number, unet_samples=number))


def test_two_processes_write_their_own_records(folder):
    barrier = fork.Barrier(2)
    halves = (range(0, 50, 2), range(1, 50, 2))
    processes = [fork.Process(target=save_many, args=(folder.path, barrier, half)) for half in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [problem.unet_samples for problem in folder.load().values()] == list(range(50))
    assert names(folder.problems) == [f"{key(number)}.json" for number in range(50)]


def save_forever(path):
    while True:
        for length in (1 << 20, 3 << 19):
            RunFolder(path).save(Problem(key(1), "x", prompt="a" * length))


def test_records_are_written_atomically(folder):
    folder.save(Problem(key(1), "x", prompt="start"))
    for _ in range(4):
        process = fork.Process(target=save_forever, args=(folder.path,), daemon=True)
        process.start()
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            assert set(folder.load()) == {key(1)}
        assert process.is_alive()
        process.kill()
        process.join(30)
        assert set(folder.load()) == {key(1)}
    assert folder.load()[key(1)].prompt != "start"


# Results


def test_result_has_exactly_these_keys(folder):
    folder.save(FULL)
    folder.save(Problem(key(1), "b.png", index=4))
    result = write_result(folder, steps=10)
    assert list(result) == ["schema_version", "method", "backbone", "seed", "settings", "versions", "problems"]
    assert result["schema_version"] == 1
    assert (result["method"], result["backbone"], result["seed"]) == ("PH2P", "emoji", 7)
    assert (result["settings"], result["versions"]) == ({"steps": 10}, {"torch": "2.6"})
    always = {
        *("target", "key", "status", "reason", "prompt", "token_ids", "validation_loss", "clip_similarity"),
        *("heldout_clip_similarity", "initial_validation_loss", "unet_samples", "seconds", "history"),
    }
    full, bare = result["problems"]
    assert set(bare) == always
    assert set(full) == always | {
        *("clip_text_similarity", "diversity", "lpips"),
        *("word_recall", "dictionary_words", "special_characters", "perplexity"),
    }
    recorded = {**asdict(FULL), **asdict(FULL.result)}
    assert all(full[name] == recorded[name] for name in full)
    assert (bare["target"], bare["status"], bare["prompt"], bare["unet_samples"]) == ("b.png", "open", None, 0)


def test_records_of_any_method_can_be_read_and_saved(folder):
    folder.save(FULL)
    other = RunFolder(folder.path)  # for users who only need the prompts
    (record,) = other.records()
    assert record.result == asdict(FULL.result)
    other.save(record)
    assert folder.load() == {FULL.key: FULL}
    assert InversionResult.of(record) == FULL.result
    with pytest.raises(TypeError, match="not a DPODiffResult"):
        DPODiffResult.of(record)


def test_results_and_prompts_are_sorted_by_index(folder):
    for index, (number, prompt) in enumerate([(9, "a cat"), (3, None), (12, "two\nlines"), (1, "ein Hündchen 🐶")]):
        folder.save(Problem(key(number), "x", index=index, prompt=prompt))
    result = write_result(folder)
    assert [entry["key"] for entry in result["problems"]] == [key(9), key(3), key(12), key(1)]
    assert folder.prompt.read_bytes().decode() == "a cat\n\ntwo lines\nein Hündchen 🐶\n"


def test_settings_of_any_type_are_written(folder, tmp_path):
    settings = write_result(folder, clip=math.inf, nested={"lr": [0.1, math.nan], "pair": (1, 2)}, path=tmp_path)
    assert settings["settings"] == {
        "clip": None,
        "nested": {"lr": [0.1, None], "pair": [1, 2]},
        "path": str(tmp_path),
    }


# The folder


def test_empty_folder_can_be_prepared_again(folder):
    assert names(folder.path) == ["checkpoints", "problems"]
    assert names(folder.problems) == names(folder.checkpoints) == []
    folder.prepare(resume=False)


def test_folder_with_only_a_config_can_be_prepared_again(folder):
    folder.config.write_text("seed: 1\n")
    folder.prepare(resume=False)
    assert names(folder.path) == ["checkpoints", "config.yaml", "problems"]


@pytest.mark.parametrize("what", ["record", "config"])
def test_run_is_resumed_but_not_overwritten(folder, what):
    if what == "record":
        folder.save(FULL)
    else:  # a file of the user
        folder.config.write_text("seed: 1\n")
        folder.problems.rmdir()
    with pytest.raises(UserError, match="already holds a run; give --ckpt_path last to resume it or another --run"):
        folder.prepare(resume=False)
    folder.prepare(resume=True)
    assert list(folder.load()) == ([FULL.key] if what == "record" else [])


@pytest.mark.parametrize("resume", [True, False])
def test_file_as_run_folder_is_refused(tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; give another --run"):
        RunFolder(tmp_path / "file").prepare(resume)
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\); give another --run"):
        RunFolder(tmp_path / "file" / "run").prepare(resume)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*args):  # not chmod, which has no effect for root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"run cannot be written \(Permission denied\); give another --run"):
        RunFolder(tmp_path / "run").prepare(resume=False)


def test_file_names_of_the_folder(tmp_path):
    folder = RunFolder(str(tmp_path))
    files = [folder.problems, folder.result, folder.prompt, folder.grid, folder.words, folder.embedding, folder.config]
    assert [file.relative_to(tmp_path).as_posix() for file in [*files, folder.checkpoints]] == [
        *(
            "problems",
            "result.json",
            "prompt.txt",
            "grid.png",
            "words.png",
            "embedding.safetensors",
            "config.yaml",
            "checkpoints",
        )
    ]


def test_default_name_has_time_and_method():
    assert RunFolder.name("PH2P", datetime(2026, 11, 20, 14, 3, 22)) == "2026-11-20_14-03-22_ph2p"


@pytest.mark.parametrize("method", ["../a b", "ünï/cödé", "a\nb", "C:\\x;$(y)", "x.Y_z-1"])
def test_default_name_is_a_safe_file_name(method):
    assert re.fullmatch(r"2026-01-02_03-04-05_[A-Za-z0-9._-]+", RunFolder.name(method, datetime(2026, 1, 2, 3, 4, 5)))


def test_mix_of_runs_needs_no_records(tmp_path):
    folder = RunFolder(tmp_path / "mix")
    folder.prepare(resume=False, search=False)
    assert list(folder.path.iterdir()) == []
    folder.generations.write_text("[]")
    for search in (False, True):
        with pytest.raises(UserError, match="mix already holds a run"):
            folder.prepare(resume=False, search=search)


def test_hard_prompts_are_those_of_finished_problems(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"no config\.yaml"):
        folder.hard_prompts()
    folder.config.write_text("model:\n")
    folder.saved.check()
    with pytest.raises(UserError, match="no prompt yet"):
        folder.hard_prompts()
    kept = [Problem(f"{i:016}", f"{i}.png", index=9 - i, prompt=f"word {i}", token_ids=[i]) for i in range(2)]
    others = [
        Problem("a" * 16, "open.png"),
        Problem("b" * 16, "bad.png", status="failed", prompt="word", token_ids=[1]),
    ]
    for problem in (*kept, *others):
        folder.save(problem)
    assert folder.hard_prompts() == kept[::-1]
    folder.save(Problem("c" * 16, "soft.png", prompt="<soft>", embedding=[[0.0]]))
    with pytest.raises(UserError, match="textual inversion"):
        folder.hard_prompts()
