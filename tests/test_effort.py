import re

import pytest
import yaml
from PIL import Image
from searches import pez_command

from lightning_prompts import api, invert, load_backbone, methods
from lightning_prompts.commands.main import main
from lightning_prompts.effort import scale_length
from lightning_prompts.errors import UserError
from lightning_prompts.python_search import CONFIGS
from lightning_prompts.python_settings import checked_settings
from lightning_prompts.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")

LIGHT_AND_HEAVY = {  # steps or budget: a third, rounded up, and three times those of the config
    "dpo_diff": (14, 120),
    "gcg": (4, 36),
    "human_feedback": (34, 300),
    "invert": (4, 30),
    "metric_guidance": (7, 60),
    "pez": (50, 450),
    "pez_clip": (50, 450),
    "ph2p": (100, 900),
    "ph2p_lbfgs": (10, 84),
    "random_tokens": (57, 507),
    "seed_invariance": (17, 150),
    "textual_inversion": (100, 900),
}


@pytest.fixture(scope="module")
def emoji():
    """Return the embedded model."""
    return load_backbone("emoji")


@pytest.fixture
def photo(tmp_path):
    """Return the file of an image."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def command(tmp_path, tiny, photo):
    """Return a function that runs a search of 4 steps, as its config says, and returns the folder of the run."""
    config = tmp_path / "short.yaml"

    def run(*settings, top="", **own):
        config.write_text(f"{top}\nmodel: {{class_path: PEZ, init_args: { ({'num_tokens': 2, 'steps': 4} | own) }}}\n")
        args = pez_command(tmp_path / "run", tiny, photo)
        model, steps = args.index("--model"), args.index("--model.steps")
        main([*args[:model], "--config", str(config), *args[model + 2 : steps], *args[steps + 2 :], *settings])
        return tmp_path / "run"

    return run


def test_all_configs_are_listed():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*LIGHT_AND_HEAVY, "clip_words"}


@pytest.mark.parametrize("config", LIGHT_AND_HEAVY)
def test_every_config_takes_every_effort(config, emoji):
    """The settings that depend on the length, such as DPODiff's population, suit a light search too."""
    read = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]
    kind = getattr(methods, read["class_path"])
    (settings,) = checked_settings((kind,), read["init_args"], {"backbone": emoji})
    lengths = [scale_length(effort, kind, settings, ()) for effort in ("light", "heavy")]
    assert [{*length.values()} for length in lengths] == [{length} for length in LIGHT_AND_HEAVY[config]]
    method = kind(**settings | lengths[0])
    if config == "ph2p":
        assert method.restart_every < method.steps  # even a light search restarts


@pytest.mark.parametrize(("settings", "steps"), [({}, 20), ({"embedding": "arc"}, 34), ({"steps": 4}, 2)])
def test_default_length_may_depend_on_other_settings(settings, steps):
    given = {"embedding": "rows", "steps": None} | settings
    assert scale_length("light", methods.SeedInvariance, given, ()) == {"steps": steps}


@pytest.mark.parametrize(
    ("settings", "top", "steps"),
    [
        ([], "", 4),
        (["--effort", "medium"], "", 4),
        (["--effort", "light"], "", 2),
        (["--effort=heavy"], "", 12),
        ([], "effort: heavy", 12),
        (["--effort", "light"], "effort: heavy", 2),
        (["--effort", "medium", "--model.steps", "3"], "effort: heavy", 3),
    ],
)
def test_effort_scales_the_steps_of_the_config(command, settings, top, steps):
    run = command(*settings, top=top)
    assert RunFolder(run).saved.load()["model"]["init_args"]["steps"] == steps
    (problem,) = RunFolder(run).load().values()
    assert problem.unet_samples == 2 * steps + 2 * (steps + 1)  # a backward pass, and scoring on two samples


def test_defaults_of_the_class_are_scaled(tiny, photo, tmp_path, capsys):
    args = pez_command(tmp_path / "run", tiny, photo)
    steps = args.index("--model.steps")
    main(["dry-run", *args[3:steps], *args[steps + 2 :], "--effort", "light"])
    assert "A search of 7 steps" in capsys.readouterr().out  # of 20


def refusal(capsys, call):
    """Return the sentence with which the command line refuses a call."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("settings", "top", "words"),
    [
        (["--effort", "huge"], "", "--effort cannot be 'huge'; it takes one of 'light', 'medium', 'heavy'"),
        ([], "effort: 3", "--effort cannot be '3'; it takes one of 'light', 'medium', 'heavy'"),
        (["--effort", "light", "--model.steps", "3"], "", "--effort light and --model.steps 3 both set the length"),
        (["--effort", "light", "--model.init_args.steps=3"], "", "--effort light and --model.steps 3 both set"),
        (["--model.steps", "3"], "effort: heavy", "--effort heavy and --model.steps 3 both set the length"),
    ],
)
def test_invalid_efforts_are_refused(command, capsys, settings, top, words):
    assert words in refusal(capsys, lambda: command(*settings, top=top))


def test_method_without_a_length_refuses_effort(tiny, photo, tmp_path, capsys):
    args = ["dry-run", "--config", "configs/clip_words.yaml", "--model.backbone", tiny, "--data.images", str(photo)]
    message = refusal(capsys, lambda: main([*args, "--effort", "light"]))
    assert "--effort light has no effect on ClipWords" in message


def test_later_commands_refuse_effort(command, capsys):
    run = command("--effort", "light")
    main(["validate", "--run", str(run)])
    message = refusal(capsys, lambda: main(["test", "--run", str(run), "--effort", "light"]))
    assert "--effort is unknown" in message


def test_resumed_run_keeps_its_length(command, capsys):
    """A run keeps its length without --effort, and takes another one only as --model.steps."""
    run = command("--effort", "heavy")
    for settings in ([], ["--effort", "heavy"], ["--config", str(run / "config.yaml")]):
        assert RunFolder(command(*settings, "--ckpt_path", "last")).saved.load()["model"]["init_args"]["steps"] == 12
    for effort, steps in (("light", 2), ("medium", 4)):
        message = refusal(capsys, lambda effort=effort: command("--ckpt_path", "last", "--effort", effort))
        assert (
            f"started with --model.steps 12 and cannot resume with --effort {effort}, which gives {steps};" in message
        )
    command("--ckpt_path", "last", "--model.steps", "13")
    assert RunFolder(run).saved.load()["model"]["init_args"]["steps"] == 13
    assert RunFolder(run).saved.effort == "medium"


def test_run_of_medium_effort_resumes_with_the_steps_of_the_config(command):
    command()
    assert RunFolder(command("--ckpt_path", "last", steps=5)).saved.load()["model"]["init_args"]["steps"] == 5


def test_calls_pass_effort_to_the_search(emoji, photo, monkeypatch):
    monkeypatch.setattr(api, "search", lambda config, settings, **own: [(config, settings, own)])
    monkeypatch.setattr(api, "_only", lambda results: results)
    ((_, settings, own),) = invert(photo, effort="light", backbone=emoji)
    assert own == {"effort": "light"}
    assert "effort" not in settings


def test_call_with_effort_scales_its_steps(emoji, photo):
    settings = {"num_tokens": 2, "num_noise_samples": 1, "num_validation_samples": 1, "backbone": emoji}
    light = invert(photo, method="ph2p_lbfgs", effort="light", max_iter=1, image_seeds=[0], **settings)
    assert light.record.unet_samples == 10 * 2 + 11  # 10 of 28 steps; scorings include the initial prompt


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"effort": "huge"}, "The setting effort cannot be 'huge'; it takes one of 'light', 'medium', 'heavy'"),
        ({"effort": None}, "The setting effort cannot be None"),
        ({"effort": "heavy", "steps": 3}, "effort='heavy' and steps=3 both set the length of the search"),
        ({"effort": "light", "method": "clip_words"}, "effort='light' has no effect on ClipWords"),
    ],
)
def test_calls_with_invalid_effort_are_refused(settings, words, photo):
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        invert(photo, backbone="emoji", **settings)
