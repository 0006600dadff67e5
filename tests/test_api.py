"""The Python calls give the results of the command line and leave the rest of the process as it is."""

import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps

from lightning_prompts import dpo_diff, human_feedback, invert, load_backbone, metric_guidance, seed_invariance
from lightning_prompts.commands.main import main
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import DPODiff
from lightning_prompts.methods.steering.human_feedback import Choice
from lightning_prompts.objectives import Sharpness
from lightning_prompts.python_search import search
from lightning_prompts.python_settings import checked_settings
from lightning_prompts.sampling import SamplerSettings

SHORT_SETTINGS = {"steps": 2, "sampler": SamplerSettings(2)}
SHORT = {**SHORT_SETTINGS, "device": "cpu"}


@pytest.fixture
def first(image_folder):
    return sorted(image_folder.iterdir())[0]


def test_results_equal_those_of_the_command_line(tiny, image_folder, tmp_path, capsys):
    results = invert(sorted(image_folder.iterdir()), method="ph2p", backbone=tiny, image_seeds=(3, 4), **SHORT)
    assert capsys.readouterr() == ("", "")
    run = tmp_path / "run"
    short = "--model.steps 2 --model.sampler.num_inference_steps 2 --trainer.accelerator cpu"
    how = f"--model.backbone {tiny} {short}".split()
    main(["fit", "--config", "configs/ph2p.yaml", "--data.images", str(image_folder), *how, "--run", str(run)])
    problems = json.loads((run / "result.json").read_text())["problems"]
    assert [result.prompt for result in results] == [problem["prompt"] for problem in problems]
    assert [result.record.validation_loss for result in results] == [problem["validation_loss"] for problem in problems]
    assert [result.details.clip_similarity for result in results] == [
        problem["clip_similarity"] for problem in problems
    ]
    main(["predict", "--run", str(run), "--seeds", "3,4", "--trainer.accelerator", "cpu"])
    for result in results:
        assert result.embedding.shape == (8, 32)
        for seed, image in zip((3, 4), result.images, strict=True):
            predicted = Image.open(run / f"images/{result.record.key}-seed{seed}.png")
            assert np.abs(np.asarray(image, int) - np.asarray(predicted, int)).max() <= 1


def test_image_in_memory_equals_its_file(tiny, first, tmp_path):
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.open(first).save(rotated, exif=exif)
    how = {"method": "clip_words", "backbone": tiny, **SHORT, "steps": 1}
    from_file, in_memory = invert(rotated, **how), invert(Image.open(rotated), **how)
    assert in_memory.record.key == from_file.record.key
    assert in_memory.prompt == from_file.prompt
    assert invert(ImageOps.exif_transpose(Image.open(rotated)), **how).record.key == from_file.record.key
    for mode in ("L", "RGBA", "CMYK", "1", "P"):
        assert invert(Image.open(first).convert(mode), **how).prompt


def test_every_input_has_a_result_in_order(tiny, image_folder):
    """Images given twice and files that are not images do not change the order of the others."""
    one, two, three = sorted(image_folder.iterdir())
    two.write_text("no image")
    results = invert([one, two, str(three), one], method="random_tokens", backbone=tiny, **SHORT)
    assert [result.record.target for result in results] == [one.name, two.name, three.name, one.name]
    assert [bool(result.prompt) for result in results] == [True, False, True, True]
    assert results[0] is results[3]
    assert "is not an image" in results[1].record.reason
    assert results[1].images == []


def test_one_subject_gives_one_result(tiny, image_folder):
    result = invert(list(image_folder.iterdir()), method="pez", one_subject=True, backbone=tiny, **SHORT)
    assert len(result.record.paths) == 3


def test_loaded_model_is_used_unchanged(tiny, first):
    backbone = load_backbone(tiny)
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    results = [invert(first, method="gcg", backbone=model, **SHORT) for model in (backbone, backbone, tiny)]
    assert len({result.prompt for result in results}) == 1
    assert len({result.record.validation_loss for result in results}) == 1
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, before[name])


def test_dpo_diff_returns_improved_and_attacked_prompts(tiny):
    how = {"backbone": tiny, "budget": 6, "sampler": SamplerSettings(2), "schedule": "fix-0", "device": "cpu"}
    better = dpo_diff(["a red cat", "two dogs", "a red  cat"], positive=["neighbors"], negative=[], **how)
    assert [result.record.target for result in better] == ["a red cat", "two dogs", "a red cat"]
    assert better[0] is better[2]
    assert better[0].embedding is None
    worse = dpo_diff("a red cat", task="attack", similarity={"threshold": -1}, **how)
    assert sum(worse.details.loss_after) >= sum(worse.details.loss_before)


def test_steering_calls_return_prompt_embeds(tiny, tmp_path):
    how = {"backbone": tiny, **SHORT}
    sharp = metric_guidance(
        "a red cat", Sharpness(), seeds=3, image_seeds=(0, 1), folder=tmp_path / "kept", unconditional=True, **how
    )
    assert sharp.prompt_embeds.shape == sharp.negative_prompt_embeds.shape == (32, 32)
    assert len(sharp.images) == 2
    assert len(sharp.details.metric_after) == 3  # seeds of the search
    with pytest.raises(UserError, match="already holds a run; give another folder"):
        metric_guidance("a red cat", Sharpness(), folder=tmp_path / "kept", **how)
    assert (tmp_path / "kept/prompt_embeds.safetensors").exists()
    invariant = seed_invariance(["a red cat", "two dogs"], seed=7, unconditional=False, **how)
    assert [result.details.target_seed for result in invariant] == [7, 7]
    assert invariant[0].negative_prompt_embeds is None


def test_choices_may_come_from_a_function(tiny):
    questions = []

    def choose(question):
        questions.append(question)
        return Choice("move", 1, 0.5) if len(questions) < 3 else Choice("finish")

    result = human_feedback("a red cat", choose, backbone=tiny, sampler=SamplerSettings(2), texts=6, device="cpu")
    assert [question.prompt for question in questions] == ["a red cat"] * 3
    assert [move["strength"] for move in result.details.moves] == [0.5, 0.5]
    assert result.prompt_embeds.shape == (32, 32)


class Outer(pl.LightningModule):
    """Training of another program, which calls a search in the middle."""

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


def test_call_inside_another_trainer_changes_neither(tiny, first, tmp_path):
    def train(ask):
        pl.seed_everything(1, verbose=False)
        outer = Outer(ask)
        trainer = pl.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accelerator="cpu",
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            enable_model_summary=False,
        )
        trainer.fit(outer, torch.randn(4, 3, 4), torch.randn(1, 3, 4))
        assert trainer.global_step == 4
        return outer, [random.random(), np.random.rand(), torch.rand(()).item()]

    alone = invert(first, method="ph2p", backbone=tiny, **SHORT)
    expected, numbers = train(lambda: None)
    asking, numbers_after = train(lambda: invert(first, method="ph2p", backbone=tiny, **SHORT))
    assert [answer.prompt for answer in asking.answers] == [alone.prompt] * 2
    assert [answer.record.validation_loss for answer in asking.answers] == [alone.record.validation_loss] * 2
    assert torch.equal(asking.layer.weight, expected.layer.weight)
    assert numbers_after == numbers


def test_call_leaves_the_process_unchanged(tiny, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    log = logging.getLogger("pytorch_lightning")
    log.setLevel(logging.INFO)
    plain = invert(first, method="ph2p", backbone=tiny, **SHORT)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        results = invert(first, method="ph2p", backbone=tiny, **SHORT)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert results.record.validation_loss == plain.record.validation_loss
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert log.level == logging.INFO
    assert sorted(tmp_path.rglob("*")) == before


def test_call_in_a_thread_gives_the_same_result(tiny, first):
    results = []
    thread = threading.Thread(target=lambda: results.append(invert(first, method="pez", backbone=tiny, **SHORT)))
    thread.start()
    thread.join()
    assert results[0].prompt == invert(first, method="pez", backbone=tiny, **SHORT).prompt


def test_keyboard_interrupt_is_raised(tiny):
    def interrupted(question):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        human_feedback("a red cat", interrupted, backbone=tiny, sampler=SamplerSettings(2), texts=6, device="cpu")
    assert signal.getsignal(signal.SIGINT) == before


def test_import_loads_only_what_is_needed(tiny, first):
    code = f"""
import sys
import lightning_prompts
assert not {{"torch", "pytorch_lightning"}} & set(sys.modules)
from lightning_prompts import invert
how = {{"backbone": {tiny!r}, "sampler": {{"num_inference_steps": 1}}, "device": "cpu"}}
assert invert({str(first)!r}, method="pez", steps=1, **how).prompt
print(sorted({{"gradio", "tensorboard", "nltk", "diffusers.pipelines.flux"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[]\n", done.stderr


def test_arrays_and_tensors_equal_their_image(tiny, first):
    """An image in any form has the key and the result of its file."""
    image = Image.open(first)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    same = [
        *(
            image,
            array,
            array.astype(np.int64),
            array / 255,
            (array / 255).astype(np.float16),
            array.transpose(2, 0, 1),
        ),
        *(
            tensor,
            tensor.permute(1, 2, 0),
            tensor / 255,
            (tensor / 255).requires_grad_(),
            tensor.long(),
            tensor.double() / 255,
        ),
        *(array[::-1][::-1], tensor.div(255).mul(1 + 1e-6), image.convert("RGBA"), np.asarray(image.convert("RGBA"))),
    ]
    how = {"method": "random_tokens", "backbone": tiny, **SHORT, "steps": 1}
    from_file = invert(first, **how)
    results = invert(iter(same), **how)
    assert len(results) == len(same)
    assert {(result.record.key, result.prompt, result.record.validation_loss) for result in results} == {
        (from_file.record.key, from_file.prompt, from_file.record.validation_loss)
    }
    alone = invert(tensor, **how)
    assert (alone.record.key, alone.prompt) == (from_file.record.key, from_file.prompt)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_arrays_equal_their_image(mode, tiny, first):
    image = Image.open(first).convert(mode)
    array = np.asarray(image)
    with_channel = array if array.ndim == 3 else array[:, :, None]
    shapes = [array, with_channel, np.moveaxis(with_channel, -1, 0), torch.from_numpy(array.copy())]
    results = invert([image, *shapes], method="random_tokens", backbone=tiny, **{**SHORT, "steps": 1})
    assert len({result.record.key for result in results}) == 1
    assert len(results) == 5


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "LAB", "YCbCr", "HSV", "RGBX", "PA", "I"])
def test_image_modes_are_converted_as_in_files(mode, tiny, first):
    """An image in memory has the pixels of Pillow's conversion, or of its file where Pillow loses information."""
    image = Image.open(first).convert(mode)
    if mode == "I":  # 16 bits
        image, expected = image.point(lambda value: value * 257), image.convert("L")
    else:
        expected = image.convert("RGB")
    how = {"method": "random_tokens", "backbone": tiny, **SHORT, "steps": 1}
    assert invert(image, **how).record.key == invert(expected, **how).record.key


def test_file_given_under_several_names_has_one_result(tiny, first, monkeypatch):
    monkeypatch.chdir(first.parent)
    names = [first.name, f"./{first.name}", first]
    results = invert(names, method="random_tokens", backbone=tiny, **SHORT)
    assert [result.record.target for result in results] == [first.name] * 3


def test_negative_images_in_memory_equal_their_files(tiny, image_folder):
    one, two, three = sorted(image_folder.iterdir())
    how = {"method": "pez", "backbone": tiny, **SHORT}
    in_memory = invert(one, negative_images=[np.asarray(Image.open(two)), Image.open(three)], **how)
    from_file = invert(one, negative_images=[two, str(three)], **how)
    assert (in_memory.record.key, in_memory.prompt) == (from_file.record.key, from_file.prompt)
    assert in_memory.record.key != invert(one, **how).record.key


def test_numpy_and_torch_values_are_accepted(tiny, first, tmp_path):
    """Numbers of NumPy and tensors, tuples, ranges and paths are accepted in place of plain values."""
    plain = invert(
        str(first),
        method="pez",
        backbone=tiny,
        optimizer={"lr": 0.5},
        timestep_range=[100, 900],
        image_seeds=[0, 1],
        **SHORT,
    )
    results = invert(
        first,
        method="pez",
        backbone=Path(tiny),
        optimizer={"lr": torch.tensor(0.5)},
        timestep_range=(np.int64(100), 900),
        image_seeds=range(2),
        steps=np.int32(2),
        sampler={"num_inference_steps": torch.tensor(2)},
        device=torch.device("cpu"),
        folder=str(tmp_path / "run"),
    )
    assert (results.prompt, results.record.validation_loss) == (plain.prompt, plain.record.validation_loss)
    assert len(results.images) == 2


@pytest.mark.parametrize("text", ["null", "~", "- a", "style: x", "[a]", "# one", "3", "true"])
def test_texts_are_not_parsed_as_yaml(text, tiny):
    how = {"backbone": tiny, "steps": 1, "sampler": SamplerSettings(1), "device": "cpu"}
    assert seed_invariance([text], towards=text, unconditional=False, **how)[0].record.target == text


def test_settings_and_defaults_are_those_of_the_config(tiny, first, tmp_path):
    """A call uses the settings of the config, which name classes, and every default."""
    (result,) = search("metric_guidance", {"prompts": "a red cat", "backbone": tiny, **SHORT_SETTINGS}, device="cpu")
    assert len(result.details.metric_before) == 4  # seeds of the config
    invert(first, method="pez", backbone=tiny, folder=tmp_path / "run", **SHORT)
    settings = json.loads((tmp_path / "run/result.json").read_text())["settings"]
    assert (settings["score_every_n_steps"], settings["patience"], settings["steps"]) == ("8", "1000", "2")


def test_checking_settings_is_fast():
    start = time.perf_counter()
    checked_settings((DPODiff, Prompts), {"solver": "hybrid"}, {"prompts": ["a cat"], "optimizer": {"lr": 0.1}})
    assert time.perf_counter() - start < 1  # 0.05 seconds alone


def test_failed_call_leaves_no_folder(tiny, first, tmp_path):
    with pytest.raises(UserError, match="has 0 pairs of braces"):
        invert(first, folder=tmp_path / "run", template="no place", backbone=tiny, **SHORT)
    assert not (tmp_path / "run").exists()
    invert(first, folder=tmp_path / "run", backbone=tiny, method="pez", **SHORT)
    before = (tmp_path / "run/result.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run; give another folder"):
        invert(first, folder=tmp_path / "run", backbone=tiny, **SHORT)
    assert (tmp_path / "run/result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (None, "An answer must be a Choice, got None"),
        ("move", "An answer must be a Choice, got 'move'"),
        (Choice, "An answer must be a Choice, got <class"),
        (Choice("stay"), "action must be one of move, others, undo, finish, got 'stay'"),
        (Choice("move", 5), "candidate must be a whole number from 0 to 4, got 5"),
        (Choice("move", -1), "candidate must be a whole number from 0 to 4, got -1"),
        (Choice("move", 1.0), "candidate must be a whole number from 0 to 4, got 1.0"),
        (Choice("move", 0, 2), "strength must be a number from 0 to 1, got 2"),
        (Choice("move", 0, float("nan")), "strength must be a number from 0 to 1, got nan"),
    ],
)
def test_invalid_choices_are_refused(choice, message, tiny):
    with pytest.raises(UserError, match=message):
        human_feedback(
            "a red cat", lambda question: choice, backbone=tiny, sampler=SamplerSettings(1), texts=6, device="cpu"
        )


def test_choices_may_hold_numpy_numbers(tiny):
    answers = iter([Choice("move", np.int64(1), np.float32(0.5)), Choice("finish")])
    result = human_feedback(
        "a red cat", lambda question: next(answers), backbone=tiny, sampler=SamplerSettings(1), texts=6, device="cpu"
    )
    assert [(move["candidate"], move["strength"]) for move in result.details.moves] == [(1, 0.5)]


def test_errors_of_the_users_functions_are_raised_unchanged(tiny):
    mistake = LookupError("no such thing")

    def fails(*_):
        raise mistake

    with pytest.raises(LookupError) as raised:
        human_feedback("a red cat", fails, backbone=tiny, sampler=SamplerSettings(1), texts=6, device="cpu")
    assert raised.value is mistake
    objective = Sharpness()
    objective.forward = fails
    with pytest.raises(LookupError) as raised:
        metric_guidance("a red cat", objective, backbone=tiny, **SHORT)
    assert raised.value is mistake


def test_reasons_do_not_mention_flags(tiny):
    results = human_feedback(
        ["a red cat", "word " * 30],
        lambda question: Choice("finish"),
        backbone=tiny,
        sampler=SamplerSettings(1),
        texts=6,
        device="cpu",
    )
    assert results[1].prompt == ""
    assert "--" not in results[1].record.reason


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "model": (lambda first: invert(first, backbone="no/thing/here"), "is neither 'emoji' nor"),
    }.values(),
)
def test_mistakes_give_one_sentence(call, message, first):
    with pytest.raises(UserError) as mistake:
        call(first)
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)
