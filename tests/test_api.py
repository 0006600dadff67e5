"""The Python calls: the same results as the command line's, and nothing else of the process is touched."""

import json
import logging
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps

from lightning_prompts import guide, hold, invert, load_backbone, prefer, reword
from lightning_prompts.errors import UserError
from lightning_prompts.main import main
from lightning_prompts.methods.human_feedback import Choice
from lightning_prompts.objectives import Sharpness

SHORT = {"steps": 2, "sampling_steps": 2, "device": "cpu"}


@pytest.fixture
def first(pictures):
    return sorted(pictures.iterdir())[0]


def test_finds_what_the_command_line_finds(tiny, pictures, tmp_path, capsys):
    found = invert(sorted(pictures.iterdir()), method="ph2p", backbone=tiny, draw_seeds=(3, 4), **SHORT)
    assert capsys.readouterr() == ("", "")
    run = tmp_path / "run"
    how = ["--model.backbone", tiny, "--data.steps", "2", "--model.sampling_steps", "2", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", "configs/ph2p.yaml", "--data.images", str(pictures), *how, "--run", str(run)])
    problems = json.loads((run / "result.json").read_text())["problems"]
    assert [result.prompt for result in found] == [problem["prompt"] for problem in problems]
    assert [result.record.validation_loss for result in found] == [problem["validation_loss"] for problem in problems]
    assert [result.record.clip_similarity for result in found] == [problem["clip_similarity"] for problem in problems]
    main(["predict", "--run", str(run), "--seeds", "3,4", "--trainer.accelerator", "cpu"])
    for result in found:
        assert result.embedding.shape == (8, 32)
        for seed, picture in zip((3, 4), result.pictures, strict=True):
            drawn = Image.open(run / f"pictures/{result.record.key}-seed{seed}.png")
            assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).max() <= 1


def test_a_picture_in_memory_is_as_good_as_its_file(tiny, first, tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.open(first).save(turned, exif=exif)
    how = {"method": "clip_words", "backbone": tiny, **SHORT, "steps": 1}
    by_file, in_memory = invert(turned, **how), invert(Image.open(turned), **how)
    assert in_memory.record.key == by_file.record.key
    assert in_memory.prompt == by_file.prompt
    assert invert(ImageOps.exif_transpose(Image.open(turned)), **how).record.key == by_file.record.key
    for mode in ("L", "RGBA", "CMYK", "1", "P"):
        assert invert(Image.open(first).convert(mode), **how).prompt


def test_every_input_has_its_result(tiny, pictures):
    """Pictures given twice and files that are none keep the others in their places."""
    one, two, three = sorted(pictures.iterdir())
    two.write_text("no picture")
    found = invert([one, two, str(three), one], method="random_tokens", backbone=tiny, **SHORT)
    assert [result.record.target for result in found] == [one.name, two.name, three.name, one.name]
    assert [bool(result.prompt) for result in found] == [True, False, True, True]
    assert found[0] is found[3]
    assert "is no picture" in found[1].record.reason
    assert found[1].pictures == []


def test_one_prompt_for_a_subject(tiny, pictures):
    result = invert(list(pictures.iterdir()), method="pez", one_subject=True, backbone=tiny, **SHORT)
    assert len(result.record.paths) == 3


def test_a_loaded_model_is_used_as_it_is(tiny, first):
    backbone = load_backbone(tiny)
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    found = [invert(first, method="gcg", backbone=model, **SHORT) for model in (backbone, backbone, tiny)]
    assert len({result.prompt for result in found}) == 1
    assert len({result.record.validation_loss for result in found}) == 1
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, before[name])


def test_words_for_a_prompt(tiny):
    how = {"backbone": tiny, "budget": 6, "sampling_steps": 2, "schedule": "fix-0", "device": "cpu"}
    better = reword(["a red cat", "two dogs", "a red  cat"], positive=["neighbours"], negative=[], **how)
    assert [result.record.target for result in better] == ["a red cat", "two dogs", "a red cat"]
    assert better[0] is better[2]
    assert better[0].embedding is None
    worse = reword("a red cat", task="attack", threshold=-1, **how)
    assert sum(worse.record.loss_after) >= sum(worse.record.loss_before)


def test_embeddings_of_a_prompt(tiny, tmp_path):
    how = {"backbone": tiny, **SHORT}
    sharp = guide(
        "a red cat", Sharpness(), seeds=3, draw_seeds=(0, 1), folder=tmp_path / "kept", unconditional=True, **how
    )
    assert sharp.prompt_embeds.shape == sharp.negative_prompt_embeds.shape == (32, 32)
    assert len(sharp.pictures) == 2
    assert len(sharp.record.metric_after) == 3  # seeds that it was searched on
    with pytest.raises(UserError, match="holds an earlier search; give another"):
        guide("a red cat", Sharpness(), folder=tmp_path / "kept", **how)
    assert (tmp_path / "kept/prompt_embeds.safetensors").exists()
    held = hold(["a red cat", "two dogs"], seed=7, unconditional=False, **how)
    assert [result.record.target_seed for result in held] == [7, 7]
    assert held[0].negative_prompt_embeds is None


def test_a_function_chooses(tiny):
    asked = []

    def choose(question):
        asked.append(question)
        return Choice("go", 1, 0.5) if len(asked) < 3 else Choice("finish")

    result = prefer("a red cat", choose, backbone=tiny, sampling_steps=2, texts=6, device="cpu")
    assert [question.prompt for question in asked] == ["a red cat"] * 3
    assert [move["strength"] for move in result.record.moves] == [0.5, 0.5]
    assert result.prompt_embeds.shape == (32, 32)


class Outer(pl.LightningModule):
    """Another program's training, which may ask in the middle of it."""

    def __init__(self, ask):
        super().__init__()
        self.layer, self.ask, self.answers = torch.nn.Linear(4, 1), ask, []

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.answers.append(self.ask())
        return (self.layer(batch + torch.randn_like(batch))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.answers.append(self.ask())  # under inference mode
        self.log("loss", self.layer(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_inside_another_trainer(tiny, first, tmp_path):
    def trained(ask):
        pl.seed_everything(1, verbose=False)
        outer = Outer(ask)
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", num_sanity_val_steps=0,
            default_root_dir=tmp_path, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(outer, torch.randn(4, 3, 4), torch.randn(1, 3, 4))
        assert trainer.global_step == 4
        return outer, [random.random(), np.random.rand(), torch.rand(()).item()]

    alone = invert(first, method="ph2p", backbone=tiny, **SHORT)
    expected, numbers = trained(lambda: None)
    asking, numbers_then = trained(lambda: invert(first, method="ph2p", backbone=tiny, **SHORT))
    assert [answer.prompt for answer in asking.answers] == [alone.prompt] * 2
    assert [answer.record.validation_loss for answer in asking.answers] == [alone.record.validation_loss] * 2
    assert torch.equal(asking.layer.weight, expected.layer.weight)
    assert numbers_then == numbers


def test_leaves_the_process_as_it_was(tiny, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    log = logging.getLogger("pytorch_lightning")
    log.setLevel(logging.INFO)
    plain = invert(first, method="ph2p", backbone=tiny, **SHORT)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = invert(first, method="ph2p", backbone=tiny, **SHORT)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert found.record.validation_loss == plain.record.validation_loss
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert log.level == logging.INFO
    assert sorted(tmp_path.rglob("*")) == before


def test_in_a_thread(tiny, first):
    found = []
    thread = threading.Thread(target=lambda: found.append(invert(first, method="pez", backbone=tiny, **SHORT)))
    thread.start()
    thread.join()
    assert found[0].prompt == invert(first, method="pez", backbone=tiny, **SHORT).prompt


def test_ctrl_c_is_ctrl_c(tiny):
    def interrupted(question):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        prefer("a red cat", interrupted, backbone=tiny, sampling_steps=2, texts=6, device="cpu")
    assert signal.getsignal(signal.SIGINT) == before


def test_what_is_not_asked_for_is_not_imported(tiny, first):
    code = f"""
import sys
import lightning_prompts
assert not {{"torch", "pytorch_lightning"}} & set(sys.modules)
from lightning_prompts import invert
assert invert({str(first)!r}, method="pez", backbone={tiny!r}, steps=1, sampling_steps=1, device="cpu").prompt
print(sorted({{"gradio", "tensorboard", "nltk", "diffusers.pipelines.flux"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("ask", "said"),
    {
        "unknown": (lambda first: invert(first, step=3), "The setting 'step' is unknown; did you mean 'steps'"),
        "none": (lambda first: invert(first, tokens=4, steps=0), "cannot be 0; it takes a whole number from 1 on"),
        "method": (lambda first: invert(first, method="dpo_diff"), "give one of invert, ph2p,"),
        "missing": (lambda first: invert("none.png"), "There is no file or folder 'none.png'"),
        "folder": (lambda first: invert(first.parent), "give the pictures that it holds"),
        "list": (lambda first: reword("prompts.txt"), "give what it holds"),
        "nothing": (lambda first: invert([]), "No pictures were given"),
        "no prompt": (lambda first: reword([" "]), "A prompt is empty"),
        "objective": (lambda first: guide("a cat", []), "There is nothing to improve"),
        "device": (lambda first: invert(first, device="gpu"), "The device 'gpu' cannot be used"),
        "model": (lambda first: invert(first, backbone="no/thing/here"), "is neither 'emoji' nor"),
    }.values(),
)
def test_mistakes(ask, said, first):
    with pytest.raises(UserError) as mistake:
        ask(first)
    assert said in str(mistake.value)
    assert "\n" not in str(mistake.value)
