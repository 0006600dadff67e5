"""Prompts and images reach every logger that takes them, and no other."""

import csv
import html
import re

import markdown
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prompts.callbacks import SampleGrid
from lightning_prompts.commands.main import main
from lightning_prompts.errors import escaped_markdown, printable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def search(tiny, image_folder, tmp_path):
    def run(*args):
        command = (
            f"fit --run {tmp_path / 'run'} --model PEZ --model.backbone {tiny} --model.sampler.num_inference_steps 2 "
            "--model.num_tokens 2 --model.log_images_every_n_steps 2 --data ImagesToPrompts "
            f"--data.images {image_folder / '0.png'} --model.steps 3 --data.num_noise_samples 2"
        )
        main([*command.split(), *args])
        return tmp_path / "run"

    return run


def logged_tags(folder):
    """Return the tags of a folder's TensorBoard events."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        "images": set(events.Tags()["images"]),
        "text": set(events.Tags()["tensors"]),
        "scalars": set(events.Tags()["scalars"]),
    }


def test_tensorboard_logs_images_prompts_and_losses_by_default(search):
    tags = logged_tags(search())
    assert {re.sub("/.*", "", tag) for tag in tags["images"]} == {"samples", "regenerations", "words"}
    assert tags["text"] == {"prompt/text_summary"}
    assert {"train/loss", "validation/loss"} <= tags["scalars"]


def test_csv_logger_gets_the_metrics_and_no_images_are_generated(search, tmp_path, monkeypatch):
    monkeypatch.setattr(SampleGrid, "__init__", lambda self, every: setattr(self, "every", 1))  # would lack `most`
    run = search("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'csv'}")
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert {"train/loss", "validation/loss"} <= rows[0].keys()
    assert len([row for row in rows if row["train/loss"]]) == 3
    assert not list(run.rglob("events.out.*"))


def test_later_commands_do_not_write_to_the_logger_of_the_search(search, tmp_path):
    run = search("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'csv'}")
    before = {path: path.read_bytes() for path in (tmp_path / "csv").rglob("*") if path.is_file()}
    for command in ("validate", "test"):
        main([command, "--run", str(run)])
    assert {path: path.read_bytes() for path in (tmp_path / "csv").rglob("*") if path.is_file()} == before


def test_logger_can_be_turned_off(search):
    assert not list(search("--trainer.logger=false").rglob("events.out.*"))


def test_several_loggers_get_everything_they_support(search, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    loggers = [
        ("CSVLogger", f"save_dir={tmp_path / 'csv'}"),
        ("TensorBoardLogger", f"save_dir={tmp_path / 'board'}"),
        ("MLFlowLogger", f"tracking_uri=file:{tmp_path / 'mlflow'}"),
        ("WandbLogger", f"save_dir={tmp_path / 'wandb'}"),
    ]
    args = [f"--trainer.logger{given}" for name, setting in loggers for given in (f"+={name}", f".{setting}")]
    run = search(*args, "--trainer.logger.offline=true")
    assert not list(run.glob("events.out.*"))
    assert len(list((tmp_path / "csv").rglob("metrics.csv"))) == 1
    tags = logged_tags(next((tmp_path / "board").rglob("events.out.*")))
    assert {re.sub("/.*", "", tag) for tag in tags["images"]} == {"samples", "regenerations", "words"}
    (artifacts,) = (tmp_path / "mlflow").rglob("artifacts")
    assert [path.name for path in sorted((artifacts / "samples").iterdir())] == ["00000002-0.png"]
    assert Image.open(artifacts / "samples" / "00000002-0.png").mode == "RGB"
    assert len(list((artifacts / "regenerations").iterdir())) == 4
    assert "0.png: " in (artifacts / "prompt" / "00000001.txt").read_text()
    media = {path.name.split("_")[0] for path in (tmp_path / "wandb").rglob("media/*/*")}
    assert media == {"samples", "regenerations", "words", "prompt"}


@pytest.mark.parametrize("command", ["test", "validate", "predict", "dry-run"])
def test_commands_without_logging_refuse_a_logger(command, search, capsys):
    run = search()
    with pytest.raises(SystemExit, match="2"):
        main([command, "--run", str(run), "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "here"])
    assert "--trainer.logger has no effect" in capsys.readouterr().err


def test_message_names_the_logger_whose_package_is_missing(search, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        search("--trainer.logger=CometLogger")
    assert "CometLogger" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a *red* _fox_ **on** `white`",
        "<img src=x onerror=alert(1)> <b>bold</b> &amp; &#x27;",
        "# not a title",
        "a | b\n--- | ---\n1 | 2",
        "~~~ \ncode\n~~~",
        "[text](http://example.com) ![image](x.png)",
        "1. one\n2. two",
        "> quoted - + - \\ \\* \x1b[31mred\x07",
        "    indented",
        'a quote\'s "marks"',
    ],
)
def test_markdown_in_texts_is_escaped(text):
    """Render with the package and the extensions that TensorBoard uses for Markdown."""
    rendered = markdown.markdown(
        f"0.png: {escaped_markdown(text)}", extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"]
    )
    assert re.findall(r"</?(\w+)", rendered) == ["p", "p"]
    assert html.unescape(re.sub("<[^>]*>", "", rendered)).split() == f"0.png: {printable(text)}".split()
