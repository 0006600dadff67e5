import io
import logging
import re
import sys

import pytest
import pytorch_lightning as pl

from lightning_prompts.callbacks import PromptProgress
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.errors import escaped_markdown
from lightning_prompts.methods import PEZ, TRAINER
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def search(tiny, image_folder, tmp_path):
    """Run a search of four steps and return its problems."""

    def run(logger=False, raises=None, **settings):
        class Broken(PEZ):
            def step(self, batch, rows):
                if batch.steps[0] == raises:
                    raise RuntimeError("broken")
                super().step(batch, rows)

        module = Broken(backbone=tiny, num_tokens=3, steps=4, sampler=SamplerSettings(2), **settings)
        data = ImagesToPrompts(str(image_folder), num_noise_samples=1, num_validation_samples=2)
        trainer = pl.Trainer(**TRAINER, accelerator="cpu", logger=logger, default_root_dir=tmp_path / "run")
        trainer.fit(module, datamodule=data)
        return list(data.folder.load().values())

    return run


def test_terminal_shows_step_and_newest_prompt(search, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    problems = search()
    output = terminal.getvalue()
    assert "12/12" in output  # three images, four steps each
    assert any(f"{problem.validation_loss:.5f} {problem.prompt}" in output for problem in problems)


def test_every_improvement_logs_a_line(search, caplog):
    caplog.set_level(logging.INFO, "lightning_prompts")
    problems = search()
    assert len(problems) == 3
    for problem in problems:
        lines = re.findall(rf"step (\d)  {problem.target}  ([\d.]+)  (.*)", caplog.text)
        assert lines[0][0] == "0"
        assert lines[-1][1:] == (f"{problem.validation_loss:.5f}", problem.prompt)
        assert [float(loss) for _, loss, _ in lines] == sorted((float(loss) for _, loss, _ in lines), reverse=True)


def test_improvements_of_many_prompts_share_a_line(search, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lightning_prompts")
    monkeypatch.setattr(PromptProgress.__init__, "__defaults__", (2,))
    problems = search()
    steps = {entry["unet_samples"] for problem in problems for entry in problem.history}
    mean = sum(problem.validation_loss for problem in problems) / 3
    first, *others = re.findall(r"step (\d)  (.*), mean loss ([\d.]+)", caplog.text)
    assert first[:2] == ("0", "3 prompts")
    assert len(others) == len(steps) - 1
    assert all(re.fullmatch(r"[123] of 3 prompts improved", text) for _, text, _ in others)
    assert [first, *others][-1][2] == f"{mean:.5f}"


def test_logging_handlers_are_restored_after_an_error(search, monkeypatch):
    handlers = list(logging.getLogger().handlers)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(RuntimeError, match="broken"):
        search(raises=2)
    assert logging.getLogger().handlers == handlers


def test_samples_and_prompts_are_logged_during_the_search(search, image_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="broken"):  # so that nothing is written at the end of the run
        search(
            logger=pl.loggers.TensorBoardLogger(tmp_path / "log", name="", version=""),
            raises=3,
            log_images_every_n_steps=1,
        )
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    samples = events.Images("samples")
    assert [event.step for event in samples] == [1, 2, 3]
    assert samples[0].width == 3 * 104
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("prompt/text_summary")]
    assert all(f"{escaped_markdown(path.name)}: " in text for path in image_folder.iterdir() for text in texts)
