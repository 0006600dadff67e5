"""Choices move an encoded prompt, can be undone, and are never lost."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from lightning_prompts.commands.main import main
from lightning_prompts.embeddings import slerp
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, HumanFeedback
from lightning_prompts.methods.steering.human_feedback import Choice, Chooser, Page, Scripted
from lightning_prompts.sampling import SamplerSettings

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a small cat on a blue background"
SMALL = {"sampler": SamplerSettings(2), "seeds": 1, "texts": 8, "candidates": 3, "log_images_every_n_steps": 0}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Answers(Chooser):
    """Give predetermined answers, and record the questions."""

    def __init__(self, *answers):
        self.answers, self.questions, self.messages = list(answers), [], []

    def open(self, backbone, offline):
        """Do nothing, since there is nothing to prepare."""

    def choose(self, question):
        self.questions.append((question, torch.stack([question.generate(i, 1.0) for i in range(len(question.texts))])))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self, message):
        self.messages.append(message)


def search(tiny, folder, *answers, prompts=PROMPT, **settings):
    chooser = Answers(*answers)
    module = HumanFeedback(backbone=tiny, chooser=chooser, **SMALL | settings)
    data = Prompts(prompts)
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(folder)})
    trainer.fit(module, datamodule=data)
    return module, chooser, list(data.folder.load().values())


MOVE, FINISH = Choice("move", 1, 0.5), Choice("finish")


def test_move_goes_along_the_slerp_to_the_candidate(tiny, tmp_path):
    module, chooser, (problem,) = search(tiny, tmp_path, MOVE, FINISH)
    (first, images), (second, _) = chooser.questions
    assert first.prompt == PROMPT
    assert images.shape == (3, 3, 16, 16)
    start, end = (module.encode([text]) for text in (PROMPT, first.texts[1]))
    expected = slerp(start, end, 0.5)
    torch.testing.assert_close(module.best_embeds_of([problem])[0], expected)
    noise = module.noise[:, :1]
    torch.testing.assert_close(second.images[-1], module.sampler.generate_from_embeds(expected[None], noise)[0, 0])
    torch.testing.assert_close(images[1], module.sampler.generate_from_embeds(end[None], noise)[0, 0])
    (move,) = problem.result.moves
    assert move == {"text": first.texts[1], "candidate": 1, "strength": 0.5, "others": 0}
    assert problem.status == "done"
    assert chooser.messages == [f"Finished. The results are in {tmp_path}. You can close this page."]


def test_next_candidates_add_a_word_to_the_chosen_text(tiny, tmp_path):
    module, chooser, _ = search(tiny, tmp_path, MOVE, FINISH)
    (first, _), (second, _) = chooser.questions
    for question, text in ((first, PROMPT), (second, first.texts[1])):
        assert len(set(question.texts)) == 3
        for longer in question.texts:
            words = longer.split()
            left_out = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)) if words[i] in module.words]
            assert text in left_out


def test_undo_restores_the_candidates_and_others_replaces_them(tiny, tmp_path):
    module, chooser, (problem,) = search(
        tiny, tmp_path, Choice("others"), MOVE, Choice("undo"), Choice("undo"), Choice("others"), FINISH
    )
    texts = [question.texts for question, _ in chooser.questions]
    assert texts[1] == texts[3] == texts[4] != texts[0]  # with no move left, an undo changes nothing
    assert texts[5] not in texts[:5]
    assert [len(question.images) for question, _ in chooser.questions] == [1, 1, 2, 1, 1, 1]
    assert problem.result.moves == []
    assert (problem.status, problem.reason) == ("not improved", "Nothing was chosen.")
    torch.testing.assert_close(module.batch[0].best, module.prompt.initial[0])


def test_others_are_closer_until_the_distance_is_reset(tiny, tmp_path):
    others = [Choice("others")] * 4
    module, chooser, (problem,) = search(tiny, tmp_path, *others[:2], Choice("move", 0, 0.5), *others, FINISH)
    start = module.encode([PROMPT])[0]
    for (question, images), reach in zip(chooser.questions[:3], (1, 0.5, 0.25), strict=True):
        end = slerp(start, module.encode([question.texts[0]])[0], reach)
        torch.testing.assert_close(
            images[0], module.sampler.generate_from_embeds(end[None, None], module.noise[:, :1])[0, 0]
        )
    assert problem.result.moves[0]["strength"] == 0.125
    assert module.base_text(problem, 1) == PROMPT  # it is still the closest text
    here, reaches = module.path[-1][0], (1, 0.5, 0.25, 0.125, 1)
    for (question, images), reach in zip(chooser.questions[3:], reaches, strict=True):
        change = module.encode([question.texts[0]])[0] - start
        end = slerp(here, here + change, reach)
        torch.testing.assert_close(
            images[0], module.sampler.generate_from_embeds(end[None, None], module.noise[:, :1])[0, 0]
        )


def test_candidates_have_distant_directions(tiny, tmp_path):
    """The closest two candidates are at least as far apart as those of most random choices."""
    module, chooser, (problem,) = search(tiny, tmp_path, FINISH, texts=30)
    ((question, _),) = chooser.questions
    start = module.encode([PROMPT])[:, -1]

    def nearest(texts):
        units = torch.nn.functional.normalize(module.encode(texts)[:, -1] - start, dim=-1)
        return float((1 - units @ units.T + 9 * torch.eye(len(units))).min())

    every, rng = module.variations(problem, 0, 0), random.Random(0)
    others = [nearest(rng.sample(every, 3)) for _ in range(100)]
    assert sum(nearest(question.texts) >= other for other in others) > 75  # the greedy choice is not the best of all


def test_prompt_without_space_for_more_words_is_refused(tiny, tmp_path):
    _, chooser, _ = search(tiny, tmp_path / "space", FINISH, prompts=" ".join(["cat"] * 29))
    assert {len(text.split()) for text in chooser.questions[0][0].texts} == {30}
    with pytest.raises(UserError, match=r"too long to add words.* takes 32 tokens .* lower --model.added"):
        search(tiny, tmp_path / "none", FINISH, prompts=" ".join(["cat"] * 29), added=2)


def test_words_are_added_to_an_earlier_text_if_the_last_is_full(tiny, tmp_path):
    prompt = " ".join(["cat"] * 29)
    _, chooser, _ = search(tiny, tmp_path, Choice("move"), FINISH, prompts=prompt)
    assert {len(text.split()) for text in chooser.questions[1][0].texts} == {30}


def test_prompts_are_searched_one_after_the_other(tiny, tmp_path):
    module, chooser, problems = search(tiny, tmp_path, MOVE, FINISH, MOVE, MOVE, FINISH, prompts=[PROMPT, "two dogs"])
    assert [question.prompt for question, _ in chooser.questions] == [PROMPT] * 2 + ["two dogs"] * 3
    assert [len(problem.result.moves) for problem in problems] == [1, 2]
    assert len(module.best_embeds_of(problems)) == 2


@pytest.mark.exact
def test_killed_run_resumes_at_the_same_question(tiny, tmp_path, rounding):
    """The record holds the moves, so no checkpoint is needed."""
    whole, _, (expected,) = search(tiny, tmp_path / "whole", MOVE, Choice("others"), Choice("move", 2, 1.0), FINISH)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        search(tiny, tmp_path / "broken", MOVE, Choice("others"), KeyboardInterrupt())
    signal.signal(signal.SIGINT, before)
    module, chooser, (resumed,) = search(tiny, tmp_path / "broken", Choice("move", 2, 1.0), FINISH)
    assert resumed.result.moves == expected.result.moves
    assert [len(question.images) for question, _ in chooser.questions] == [2, 3]
    assert torch.equal(module.batch[0].best, whole.batch[0].best)


def test_chooser_is_closed_when_the_run_is_stopped(tiny, tmp_path):
    chooser = Answers(MOVE, KeyboardInterrupt())
    module = HumanFeedback(backbone=tiny, chooser=chooser, **SMALL)
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        trainer.fit(module, datamodule=Prompts(PROMPT))
    signal.signal(signal.SIGINT, before)
    assert chooser.messages == ["The search was stopped. Your choices are saved; resume with --ckpt_path last."]


@pytest.mark.parametrize("name", ["choose", "variations", "apply_choice"])
def test_chooser_is_closed_when_the_search_fails(tiny, tmp_path, monkeypatch, name):
    chooser = Answers(ValueError("choose") if name == "choose" else MOVE)
    module = HumanFeedback(backbone=tiny, chooser=chooser, **SMALL)

    def fail(*_):
        raise ValueError(name)

    if name != "choose":
        monkeypatch.setattr(module, name, fail)
    trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)})
    with pytest.raises(ValueError, match=name):
        trainer.fit(module, datamodule=Prompts(PROMPT))
    assert chooser.messages == ["The search was stopped. Your choices are saved; resume with --ckpt_path last."]


def test_steps_limit_the_search(tiny, tmp_path):
    _, chooser, (problem,) = search(tiny, tmp_path, MOVE, MOVE, MOVE, steps=2)
    assert len(chooser.questions) == len(problem.result.moves) == 2
    assert problem.status == "done"


def test_results_have_moves_and_no_metric(tiny, tmp_path, clip_file):
    run = tmp_path / "run"
    command = (
        f"fit --run {run} --trainer.accelerator cpu --model HumanFeedback --model.backbone {tiny} "
        "--model.sampler.num_inference_steps 2 --model.seeds 1 --model.steps 6 --model.texts 8 "
        f"--model.chooser Scripted --model.chooser.wants {clip_file} --model.chooser.strengths [0.5,1.0] "
        "--data Prompts --data.prompts"
    )
    main([*command.split(), PROMPT])
    (problem,) = json.loads((run / "result.json").read_text())["problems"]
    assert "metric_before" not in problem
    (record,) = (json.loads(file.read_text()) for file in (run / "problems").glob("*.json"))
    assert record["result"].keys() == {"moves", "others", "heldout_before", "heldout_after"}
    assert 0 < len(problem["moves"]) <= 6
    assert (run / "grid.png").exists()
    assert (run / "prompt_embeds.safetensors").exists()
    with pytest.raises(SystemExit) as stop:
        main(["validate", "--run", str(run), "--trainer.accelerator", "cpu"])
    assert stop.value.code == 2
    main(["test", "--run", str(run), "--trainer.accelerator", "cpu"])
    main(["predict", "--run", str(run), "--seeds", "1", "--trainer.accelerator", "cpu"])


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """Save the image that a scripted chooser prefers."""
    file = tmp_path_factory.mktemp("wants") / "wanted.png"
    Image.new("RGB", (16, 16), "red").save(file)
    return file


def test_scripted_chooser_prefers_its_image(tiny, clip_file):
    backbone = HumanFeedback(backbone=tiny, chooser=Answers(), **SMALL).backbone
    chooser = Scripted(str(clip_file))
    chooser.open(backbone, offline=True)
    near, far = chooser.wanted * 0.9, -chooser.wanted
    similarities = chooser.similarities([chooser.wanted, near, far])
    assert float(similarities[0]) == pytest.approx(1)
    assert similarities[0] > similarities[1] > similarities[2]
    features = chooser.clip.features(torch.stack([chooser.wanted, far]))
    expected = features[0] @ features[1] - 0.5 * (far - chooser.wanted).square().mean()
    torch.testing.assert_close(similarities[2], expected)


def test_scripted_chooser_selects_the_most_similar_candidate(tiny, clip_file, monkeypatch):
    backbone = HumanFeedback(backbone=tiny, chooser=Answers(), **SMALL).backbone
    chooser = Scripted(str(clip_file), strengths=[0.5, 1.0])
    chooser.open(backbone, offline=True)
    image = torch.zeros(3, 16, 16)
    similarities = {(0, 1.0): 0.2, (1, 1.0): 0.4, (2, 1.0): 0.3, (1, 0.5): 0.5}
    now = 0.1

    class Question:
        images, texts = [image], ["a", "b", "c"]

        @staticmethod
        def generate(candidate, strength):
            return image + similarities[candidate, strength]

    monkeypatch.setattr(
        chooser, "similarities", lambda images: torch.stack([x.mean() + now * (x.mean() == 0) for x in images])
    )
    assert chooser.choose(Question) == Choice("move", 1, 0.5)
    now = 0.6
    assert chooser.choose(Question) == Choice("others")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tiny, file: HumanFeedback(backbone=tiny, texts=3),
            "--model.texts must be at least --model.candidates, got 3 and 5",
        ),
        (lambda tiny, file: HumanFeedback(backbone=tiny, words=[]), "--model.words has no words"),
        (lambda tiny, file: Page(port=70000), "--model.chooser.port must be at most 65535, got 70000"),
        (lambda tiny, file: Scripted(file, strengths=[]), "must be above 0 and at most 1, got \\[\\]"),
        (lambda tiny, file: Scripted(file, strengths=[1.5]), "must be above 0 and at most 1, got"),
    ],
)
def test_invalid_settings_are_refused(make, message, tiny, clip_file):
    with pytest.raises(UserError, match=message):
        make(tiny, str(clip_file))


def test_port_in_use_is_refused_before_the_search(tiny):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=rf"Port {taken.getsockname()[1]} is in use; give --model.chooser.port"):
            Page(port=taken.getsockname()[1]).open(None, offline=True)


def test_page_without_gradio_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-prompts\[page\]'"):
        Page().open(None, offline=True)


# --- the page, in a browser


@pytest.fixture
def browser():
    """Start a headless Chromium."""
    api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Run:
    """Run a search with a page in another process."""

    def __init__(self, tiny, folder, *more):
        command = (
            f"fit --run {folder} --trainer.accelerator cpu --model HumanFeedback --model.backbone {tiny} "
            "--model.sampler.num_inference_steps 2 --model.seeds 1 --model.texts 20 --model.chooser Page "
            "--model.chooser.show false --data Prompts --data.prompts"
        )
        arguments = [*command.split(), PROMPT, *more]
        self.temporary = folder.parent / "temporary"
        self.temporary.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_prompts", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        messages = []
        for line in self.process.stdout:
            messages.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
                self.address = match[0]
                return
        raise AssertionError("".join(messages))

    def end(self, stop=None):
        """Wait for the end of the run; return the exit code and the output."""
        if stop:
            self.process.send_signal(stop)
        messages, _ = self.process.communicate(timeout=60)
        remaining = [file for name in ("lightning-prompts-*", "gradio*") for file in self.temporary.glob(name)]
        assert remaining == []
        return self.process.returncode, messages


def wait_for_question(page, move):
    """Wait until there are five candidates to choose from."""
    page.wait_for_function(
        """move => document.querySelector('#status')?.innerText.includes(`Moves so far: ${move}. Select`)
        && document.querySelectorAll('#candidates img').length == 5
        && document.querySelectorAll('#candidate input').length == 5
        && !document.querySelector('#move').disabled""",
        arg=move,
        timeout=30_000,
    )


@pytest.mark.timeout(180)
def test_user_chooses_in_a_browser(tiny, tmp_path, browser):
    run = Run(tiny, tmp_path / "run")
    page, elsewhere = browser.new_page(viewport={"width": 1300, "height": 1100}), []
    page.on(
        "request",
        lambda request: (
            elsewhere.append(request.url) if "//" in request.url and not request.url.startswith(run.address) else None
        ),
    )
    page.goto(run.address)
    wait_for_question(page, 0)
    assert page.locator("#undo").is_disabled()
    page.locator("#candidates button").nth(2).click()  # by mouse
    page.wait_for_function("document.querySelectorAll('#candidate input')[2].checked")
    page.wait_for_selector("#preview img")
    slider = page.locator("#strength input[type=range]")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    page.locator("#move").click()
    wait_for_question(page, 1)

    page.reload()  # loses nothing
    wait_for_question(page, 1)
    assert page.locator("#trail img").count() == 2
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("4")  # by keyboard
    page.wait_for_function("document.querySelectorAll('#candidate input')[3].checked")
    page.keyboard.press("m")
    wait_for_question(page, 2)
    page.keyboard.press("u")
    wait_for_question(page, 1)
    before = page.locator("#candidates").inner_text()
    page.keyboard.press("o")
    page.wait_for_function("before => document.querySelector('#candidates').innerText != before", arg=before)
    wait_for_question(page, 1)
    # A key that is pressed before the new question arrives answers the old one, which is ignored.
    finished = "document.querySelector('#status').innerText.startsWith('Finished. The results are in')"
    while not page.evaluate(finished):
        page.keyboard.press("f")
        with suppress(pytest.importorskip("playwright.sync_api").TimeoutError):
            page.wait_for_function(finished, timeout=5000)
    code, messages = run.end()
    assert code == 0, messages
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []
    (problem,) = json.loads((tmp_path / "run" / "result.json").read_text())["problems"]
    (move,) = problem["moves"]
    assert (move["candidate"], move["strength"]) == (2, 0.5)
    for name in ("grid.png", "prompt_embeds.safetensors", f"problems/{problem['key']}.safetensors"):
        assert (tmp_path / "run" / name).exists()


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_closed_page_loses_nothing(tiny, tmp_path, browser):
    folder = tmp_path / "run"
    run = Run(tiny, folder)
    page = browser.new_page()
    page.goto(run.address)
    wait_for_question(page, 0)
    page.keyboard.press("1")
    page.wait_for_function("document.querySelectorAll('#candidate input')[0].checked")
    page.keyboard.press("m")
    wait_for_question(page, 1)
    page.close()
    time.sleep(1)
    assert run.process.poll() is None  # it waits for the page to be opened again
    code, messages = run.end(signal.SIGINT)
    assert code == 130, messages
    (record,) = (json.loads(file.read_text()) for file in (folder / "problems").glob("*.json"))
    assert len(record["result"]["moves"]) == 1
    again = Run(tiny, folder, "--ckpt_path", "last")
    page = browser.new_page()
    page.goto(again.address)
    wait_for_question(page, 1)
    page.keyboard.press("f")
    assert again.end()[0] == 0
    assert len(json.loads((folder / "result.json").read_text())["problems"][0]["moves"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("stop", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_that_waits_for_the_user_stops_on_a_signal(tiny, tmp_path, stop, expected):
    pytest.importorskip("gradio")
    run, records = Run(tiny, tmp_path / "run"), tmp_path / "run" / "problems"
    until = time.monotonic() + 60
    while not any(records.glob("*.safetensors")) and time.monotonic() < until:
        time.sleep(0.2)
    code, messages = run.end(stop)
    assert code == expected, messages
