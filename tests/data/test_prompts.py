import json
import re

import pytest

from lightning_prompts.commands.main import main
from lightning_prompts.data.prompts import Line, find_prompts, read_prompts
from lightning_prompts.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_prompts_are_read_from_all_kinds_of_lists(tmp_path):
    text, table, lines = (tmp_path / f"prompts.{kind}" for kind in ("txt", "csv", "jsonl"))
    text.write_bytes("\ufeffa  café\r\n\n a dog \n".encode())
    table.write_text('name,prompt\nx,"a cat, sleeping"\ny,a dog\n')
    lines.write_text('{"prompt": "a fox"}\n\n{"prompt": "a dog", "more": 1}\n')
    result = read_prompts([str(text), "an  owl", str(table), str(lines)])
    assert result == ["a café", "a dog", "an owl", "a cat, sleeping", "a fox"]  # without duplicates, spaces merged


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "Line 2 of"),
        ("a.jsonl", '{"text": "a"}', "no text under 'prompt'"),
        ("a.jsonl", '{"prompt": 3}\n{"prompt": " "}', "Line 1 of .* no text under 'prompt'"),
        ("a.csv", "name\nx\n", "no column 'prompt'"),
        ("a.txt", "\n \n", "No prompts were given"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("missing.txt", None, "check the path"),
        (None, "  ", "A prompt is empty"),
    ],
)
def test_lists_without_prompts_are_refused(name, content, message, tmp_path):
    source = content if name is None else str(tmp_path / name)
    if name and content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_prompts([source])


def test_list_without_a_usable_line_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": 3}\n{"prompt": " "}\n{"prompt": 4}')
    with pytest.raises(UserError, match="Line 1 of"):
        find_prompts(["a dog", str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.txt", b"a dog\n\ncaf\xe9\na cat", 3, "is not UTF-8"),
        ("a.csv", b'prompt\na dog\n"a\na cat\n', 3, "is not valid CSV"),
        ("a.csv", b"prompt\na dog\ncaf\xe9\na cat\n", 3, "is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"prompt"\n{"prompt": "a cat"}', 2, "is not valid JSON"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"text": "x"}\n{"prompt": "a cat"}', 2, "has no text under 'prompt'"),
        ("a.jsonl", b'{"prompt": "a dog"}\n[]\n{"prompt": "a cat"}', 2, "has no text under 'prompt'"),
    ],
)
def test_broken_line_leaves_the_other_prompts(name, content, line, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    first, broken, last = find_prompts([str(path)])
    assert (first, last) == (Line("a dog"), Line("a cat"))
    assert broken.text == f"line {line} of {path}"
    assert broken.error.startswith(f"Line {line} of '{path}' {message}")
    assert find_prompts([str(path), "a cat", str(path)]) == [first, broken, last]
    with pytest.raises(UserError, match=message):
        read_prompts([str(path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.prompts", ""], "A prompt is empty"),
        (["--data.prompts", "of the", "--model.positive", "[neighbors]", "--model.negative", "[]"], "has no word"),
        (["--data.prompts", "a dog", "--model.positive", "[sinonyms]"], "--model.positive"),
        (
            ["--data.prompts", "a dog", "--model.negative", "[antonyms]", "--model.dictionary", "broken.json"],
            "Line 1 of",
        ),
        (
            ["--data.prompts", "a dog", "--model.negative", "[antonyms]", "--model.dictionary", "other.json"],
            "must have the layout",
        ),
        (
            ["--data.prompts", "a dog", "--model.negative", "[antonyms]", "--model.dictionary", "empty.json"],
            "are empty",
        ),
        (
            ["--data.prompts", "a dog", "--model.negative", "[antonyms]", "--model.dictionary", "lacks.json"],
            "has no entry for",
        ),
        (
            [
                "--data.prompts",
                "a dog",
                "--model.negative",
                "[antonyms]",
                "--model.dictionary",
                "http://127.0.0.1:9/v1#m",
            ],
            "cannot be reached",
        ),
        (
            ["--data.prompts", "a dog", "--model.positive=[neighbors]", "--model.similarity.threshold", "1.5"],
            "--model.similarity.threshold must be between -1 and 1",
        ),
        (
            ["--data.prompts", "a dog", "--model.budget", "3"],
            "--model.budget must be at least --model.population, got 3 and 4",
        ),
        (["--data.prompts", "a dog", "--model.schedule", "fix-99"], "goes beyond the sampler"),
        (["--data.prompts", "missing.txt"], "check the path"),
        (["--data.prompts", "a dog " * 40], "has no word|tokens"),
        ([], "--data"),
    ],
)
def test_mistakes_give_one_sentence(settings, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"a dog": ')
    (tmp_path / "other.json").write_text('["a dog"]')
    (tmp_path / "empty.json").write_text('{"a dog": {"opp": {"dog": []}}}')
    (tmp_path / "lacks.json").write_text('{"a cat": {"opp": {"cat": ["dog"]}}}')
    given = ["--model", "DPODiff", "--model.backbone", tiny, "--model.sampler.num_inference_steps", "30"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--run", "run", "--trainer.accelerator", "cpu", *given, *settings])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_prompt_that_cannot_be_searched_leaves_the_others(tiny, tmp_path):
    given = f"--model DPODiff --model.backbone {tiny} --model.positive [neighbors] --model.negative []".split()
    given += (
        "--model.sampler.num_inference_steps 2 --model.schedule fix-1 --model.budget 2 --model.population 2".split()
    )
    given += ["--data", "Prompts", "--data.prompts", '["of the", "a dog"]', "--trainer.accelerator", "cpu"]
    main(["fit", "--run", str(tmp_path / "run"), *given])
    failed, result = json.loads((tmp_path / "run" / "result.json").read_text())["problems"]
    assert failed["status"] == "failed"
    assert "has no word" in failed["reason"]
    assert result["status"] in ("done", "not improved")
    assert len(result["fresh_loss_after"]) == 10


def test_broken_line_is_a_failed_record_until_it_is_corrected(tiny, tmp_path):
    path, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    args = ["fit", "--run", str(run), "--model", "DPODiff", "--model.backbone", tiny, "--trainer.accelerator", "cpu"]
    args += ["--model.positive", "[neighbors]", "--model.negative", "[]", "--model.sampler.num_inference_steps", "2"]
    args += ["--model.schedule", "fix-1", "--model.budget", "2", "--model.population", "2"]
    args += ["--data", "Prompts", "--data.prompts", str(path)]

    def problems():
        return json.loads((run / "result.json").read_text())["problems"]

    path.write_text('{"prompt": "a dog"}\n{"prompt": 3}\n')
    main(args)
    dog, broken = problems()
    assert (dog["target"], broken["target"]) == ("a dog", f"line 2 of {path}")
    assert (broken["status"], broken["prompt"]) == ("failed", None)
    assert broken["reason"] == f"Line 2 of '{path}' has no text under 'prompt'."
    main([*args, "--ckpt_path", "last"])
    assert [problem["key"] for problem in problems()] == [dog["key"], broken["key"]]
    path.write_text('{"prompt": "a dog"}\n{"prompt": "a cat"}\n')
    main([*args, "--ckpt_path", "last"])
    assert [problem["target"] for problem in problems()] == ["a dog", "a cat"]
    assert "failed" not in [problem["status"] for problem in problems()]
