"""Texts reach the search unchanged, however much they look like YAML."""

import json

import pytest
import yaml

from lightning_prompts.commands import cli
from lightning_prompts.commands.main import main
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.methods import PromptMethod
from lightning_prompts.text_settings import Text, keep_texts, text_settings

TEXTS = [
    "style: watercolor, a dog",
    "a: b: c",
    *("null", "~", "true", "1.5", "0x10", "2024-01-01", "-5", "inf"),
    *(
        "- a",
        "[a]",
        "[a, b",
        "{a: b}",
        "{",
        '{"class_path": "x"}',
        '{"data": {"init_args": {"prompts": "x"}}}',
        "(a:1.2), [b]",
    ),
    *("# one", "a # b", "*x", "&x", "!x", "@x", "`x", "%x", "|", "> x", "=x", "a=b", "$HOME", "${x}"),
    *("'a'", '"a"', "it's", 'say "x"', r"a\nb", "a\\", "a\nb", "a\tb", " a ", "ä 🚗 \u2028\x85", "\x07", "x" * 5000),
]
NULLS = ("~", "# one", "&x", "")


class Stopped(Exception):
    """Raised when the settings are parsed, to stop the program."""


@pytest.fixture
def parsed(monkeypatch):
    """Return the settings that a command parses to."""

    def parse(*args):
        def stop(self):
            raise Stopped(self.config[self.config.subcommand])

        monkeypatch.setattr(cli.CLI, "before_instantiate_classes", stop)
        with pytest.raises(Stopped) as stopped:
            main([str(arg) for arg in args])
        return stopped.value.args[0]

    return parse


def texts_of(value):
    return [value] if isinstance(value, str) else value


ONE_BY_ONE = [
    "style: watercolor, a dog",
    "null",
    "- a",
    "[a]",
    "# one",
    "&x",
    r"a\nb",
    "ä 🚗 \u2028\x85",
    "x" * 5000,
    "",
]


def test_lists_of_texts_on_the_command_line_are_kept(parsed, tmp_path):
    args = ["--data.images", *TEXTS, "--data.negative_images", *TEXTS, "--model.steps", "7"]
    settings = parsed("fit", "--config", "configs/pez.yaml", *args)
    data = settings.data.init_args
    assert (data.images, data.negative_images, settings.model.init_args.steps) == (TEXTS, TEXTS, 7)
    assert parsed("fit", "--model", "PEZ", "--data.images", json.dumps(TEXTS)).data.init_args.images == TEXTS
    assert parsed("predict", "--run", finished(tmp_path), "--prompts", *TEXTS, "--seeds", "1").prompts == TEXTS


@pytest.mark.parametrize("text", ONE_BY_ONE, ids=range(len(ONE_BY_ONE)))
def test_text_on_the_command_line_is_kept(text, parsed, tmp_path):
    config = parsed(
        "fit", "--config", "configs/pez.yaml", f"--data.images={text}", "--model.template", text, "--model.clip", "x"
    )
    assert config.data.init_args.images == [text]
    assert (config.model.init_args.template, config.model.init_args.clip) == (text, "x")
    config = parsed("predict", "--run", finished(tmp_path), "--prompts", text, "--negative", text)
    assert (config.prompts, config.negative) == ([text], text)


def finished(folder):
    """Create a folder that looks like a run folder."""
    (folder / "config.yaml").write_text(
        "model: {class_path: PEZ}\ndata: {class_path: ImagesToPrompts, init_args: {images: a.png}}\n"
    )
    return folder


@pytest.mark.parametrize("text", ONE_BY_ONE, ids=range(len(ONE_BY_ONE)))
def test_text_in_a_config_is_kept(text, parsed, tmp_path):
    data = {"class_path": "Prompts", "init_args": {"prompts": text}}
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "DPODiff"}, "data": data}), encoding="utf-8"
    )
    assert parsed("fit", "--config", tmp_path / "mine.yaml").data.init_args.prompts == [text]


def test_later_settings_take_precedence(parsed, tmp_path):
    for name, prompts in (("one", "[a]"), ("other", TEXTS)):
        data = {"class_path": "Prompts", "init_args": {"prompts": prompts}}
        (tmp_path / name).write_text(
            yaml.safe_dump({"model": {"class_path": "DPODiff"}, "data": data}), encoding="utf-8"
        )
    both = ["--config", tmp_path / "one", f"--config={tmp_path}/other"]
    assert parsed("fit", *both).data.init_args.prompts == TEXTS
    assert parsed("fit", *both, "--data.prompts", "x").data.init_args.prompts == ["x"]


@pytest.mark.parametrize("text", [*NULLS, "null", "none"])
def test_only_the_word_null_is_null(text, parsed, capsys):
    args = ["fit", "--model", "DPODiff", "--data.prompts", "x", "--model.schedule", text]
    if text in NULLS:
        with pytest.raises(SystemExit):
            main(args)
        assert f"--model.schedule cannot be {text!r}; it takes a text, or null" in capsys.readouterr().err
    else:
        assert parsed(*args).model.init_args.schedule == (None if text == "null" else text)


def test_text_settings_are_derived_from_types():
    assert text_settings(ProblemData) == {
        "images": Text(several=True, optional=False),
        "negative_images": Text(several=True, optional=True),
        "prompts": Text(several=True, optional=False),
    }
    model = text_settings(PromptMethod)
    assert model["template"] == Text(several=False, optional=False)
    assert model["clip"] == Text(several=False, optional=True)
    assert model["allowed_words"] == Text(several=True, optional=True, listed=True)
    assert model["similarity.encoder"] == Text(several=False, optional=True)
    assert model["banned_words"] == Text(several=True, optional=False, listed=True)
    assert not model.keys() & {"metric", "optimizer", "chooser", "objective", "return"}


@pytest.mark.parametrize("words", [["no"], ["null", "1", "on"], ["red", "[x", "a: b"], ["- a"]])
@pytest.mark.parametrize("setting", ["allowed_words", "banned_words"])
def test_lists_of_words_are_kept(setting, words, parsed):
    base = ["fit", "--config", "configs/pez.yaml", "--data.images", "a.png"]
    assert parsed(*base, f"--model.{setting}", *words).model.init_args[setting] == words
    assert parsed(*base, f"--model.{setting}={json.dumps(words)}").model.init_args[setting] == words


def test_unquoted_yaml_list_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "configs/pez.yaml", "--data.images", "a.png", "--model.allowed_words", "[no, yes]"])
    assert "JSON list" in capsys.readouterr().err


def test_other_arguments_stay_unchanged():
    args = "fit --config x.yaml --data Prompts --data.seed 3 --model.optimizer.lr=1 --data.prompts+ a --run".split()
    settings = {"data": text_settings(ProblemData), "model": text_settings(PromptMethod)}
    assert keep_texts(args, settings) == args
    for missing in (
        ["fit", "--data.prompts"],
        ["fit", "--data.prompts", "--data.seed", "3"],
        ["fit", "--model.clip", "null"],
    ):
        assert keep_texts(missing, settings) == missing


def test_text_that_is_not_utf8_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/pez.yaml", "--data.images", "a.png", "caf\udce9.png"])
    assert stopped.value.code == 2
    assert r"--data.images cannot be 'caf\udce9.png', which is not UTF-8; rename the file" in capsys.readouterr().err


def test_missing_text_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/dpo_diff.yaml", "--data.prompts"])
    assert stopped.value.code == 2
    assert "needs a value" in capsys.readouterr().err
