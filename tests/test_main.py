import io
import json
import os
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPConfig, CLIPModel

from lightning_prompts.commands.main import main
from lightning_prompts.methods import PEZ
from lightning_prompts.metrics import Perplexity
from lightning_prompts.metrics.words import all_words
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.figures import to_image, to_png
from lightning_prompts.sampling.seeding import noise_of

# The command line silences warnings of libraries, and pytest restores them.
pytestmark = pytest.mark.filterwarnings("ignore")

RESULT_KEYS = {"schema_version", "method", "backbone", "seed", "settings", "versions", "problems"}
PROBLEM_KEYS = {
    "target",
    "key",
    "status",
    "reason",
    "prompt",
    "token_ids",
    "validation_loss",
    "clip_similarity",
    "heldout_clip_similarity",
    "initial_validation_loss",
    "unet_samples",
    "seconds",
    "history",
    "clip_text_similarity",
    "diversity",
    "special_characters",
}


@pytest.fixture
def fit(tiny, image_folder, tmp_path):
    """Run `fit` on one image for two steps; later arguments take precedence."""

    def run(*more, method="PEZ", images=image_folder / "0.png"):
        command = (
            f"fit --run {tmp_path / 'run'} --trainer.accelerator cpu --model {method} --model.backbone {tiny} "
            f"--model.num_tokens 2 --model.sampler.num_inference_steps 2 --data.images {images} --model.steps 2 "
            "--data.num_noise_samples 1 --data.num_validation_samples 2"
        )
        main([*command.split(), *more])
        return tmp_path / "run"

    return run


def short_fit(backbone, run, tokens, images):
    """Return the command of a search with two steps."""
    args = ["fit", "--run", run, "--trainer.accelerator", "cpu", "--model", "PEZ", "--model.backbone", backbone]
    args += ["--model.num_tokens", tokens, "--model.sampler.num_inference_steps", 2, "--data.images", images]
    args += ["--model.optimizer.lr", 0.01]  # so small that the prompts of two images stay different
    return [
        str(arg)
        for arg in (*args, "--model.steps", 2, "--data.num_noise_samples", 1, "--data.num_validation_samples", 2)
    ]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Return a finished run on two images that no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{i}.png")
    main(short_fit(tiny, folder / "run", 4, json.dumps([f"{folder}/0.png", f"{folder}/1.png"])))
    return folder / "run"


@pytest.fixture
def done(finished, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "done"))


def results(run):
    return json.loads((run / "result.json").read_text())


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_refused(capsys, *args, words):
    """Assert that a command is refused in one sentence that contains these words; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    lines = output.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, output.err
    assert "Traceback" not in output.err + output.out
    for word in [words] if isinstance(words, str) else words:
        assert str(word) in output.err
    return output.err


@pytest.mark.parametrize("method", ["PEZ", "PH2P"])
def test_fit_writes_all_results(fit, capsys, method):
    run = fit(method=method)
    result = results(run)
    assert set(result) == RESULT_KEYS
    assert (result["schema_version"], result["method"], result["seed"]) == (1, method, 0)
    (problem,) = result["problems"]
    assert set(problem) == PROBLEM_KEYS
    assert problem["target"] == "0.png"
    assert problem["status"] in ("done", "not improved")
    assert (run / "prompt.txt").read_text() == problem["prompt"] + "\n"
    assert problem["heldout_clip_similarity"] is None  # there is none for this model
    assert -1 <= problem["clip_similarity"] <= 1
    assert -1 <= problem["clip_text_similarity"] <= 1
    assert 0 < problem["diversity"] <= 2
    assert 0 <= problem["special_characters"] <= 1
    assert problem["unet_samples"] > 0
    assert problem["validation_loss"] <= problem["initial_validation_loss"]
    embeddings = load_file(run / "embedding.safetensors")
    assert {key: tuple(x.shape) for key, x in embeddings.items()} == {problem["key"]: (2, 32)}
    Image.open(run / "grid.png").load()
    assert Image.open(run / "words.png").size == ((1 + 2) * 104, 116)
    assert (run / "config.yaml").exists()
    assert (run / "problems" / f"{problem['key']}.json").exists()
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert list(run.glob("events.*"))
    assert str(problem["prompt"]) in capsys.readouterr().out


def test_learned_embeddings_have_word_maps(fit):
    run = fit("--model.template", "a photo of {}", method="TextualInversion")
    assert results(run)["problems"][0]["token_ids"] is None
    with Image.open(run / "words.png") as words:
        assert words.size == ((1 + 2) * 104, 116)
    (logged,) = EventAccumulator(str(run)).Reload().Images("words")
    assert (logged.width, logged.height) == words.size


def test_fit_takes_a_folder_of_images(fit, image_folder):
    problems = results(fit(images=image_folder))["problems"]
    assert [problem["target"] for problem in problems] == ["0.png", "1.png", "2.png"]
    assert len({problem["key"] for problem in problems}) == 3


def test_one_subject_gives_one_prompt(fit, image_folder):
    (problem,) = results(fit("--data.one_subject", "true", "--data.num_validation_samples", "3", images=image_folder))[
        "problems"
    ]
    assert problem["prompt"]


def test_caption_gives_word_recall(fit, image_folder):
    (image_folder / "list.csv").write_text("file,caption\n0.png,a red square\n")
    (problem,) = results(fit(images=image_folder / "list.csv"))["problems"]
    assert set(problem) == PROBLEM_KEYS | {"word_recall"}
    assert 0 <= problem["word_recall"] <= 1


def test_denoising_weight_of_zero_needs_no_denoiser_gradient(fit):
    (problem,) = results(fit("--model.loss_weights.denoising", "0", "--model.loss_weights.clip", "1"))["problems"]
    assert problem["prompt"]
    assert problem["unet_samples"] == 3 * 2  # samples of scoring only


def test_scorer_gives_heldout_similarity(fit, tiny):
    (problem,) = results(fit("--scorer", f"{tiny}/clip"))["problems"]
    assert problem["heldout_clip_similarity"] == pytest.approx(problem["clip_similarity"])


def test_diversity_uses_the_heldout_scorer(fit, tiny, tmp_path):
    torch.manual_seed(1)
    CLIPModel(CLIPConfig.from_pretrained(f"{tiny}/clip")).save_pretrained(tmp_path / "scorer")
    run = fit("--scorer", str(tmp_path / "scorer"))
    (problem,) = results(run)["problems"]
    assert results(run)["settings"]["scores"]["scorer"] == str(tmp_path / "scorer")
    main(["test", "--run", str(run), "--scorer", "null"])
    (other,) = results(run)["problems"]
    assert other["heldout_clip_similarity"] is None
    assert other["clip_similarity"] == problem["clip_similarity"]
    assert other["diversity"] != pytest.approx(problem["diversity"], rel=1e-3)


def test_dictionary_and_language_model_give_readability_scores(fit, language_model, tmp_path):
    (tmp_path / "words.txt").write_text("no\nsuch\nwords\n")
    given = ["--dictionary", str(tmp_path / "words.txt"), "--language_model", language_model]
    run = fit(*given, "--model.template", "a cat {}")
    (problem,) = results(run)["problems"]
    assert set(problem) == PROBLEM_KEYS | {"dictionary_words", "perplexity"}
    assert problem["dictionary_words"] == 0
    assert problem["perplexity"] == pytest.approx(float(Perplexity(language_model)([problem["prompt"]])), rel=1e-6)
    (tmp_path / "words.txt").write_text("\n".join(all_words(problem["prompt"])).upper())
    main(["test", "--run", str(run), "--language_model", "null"])
    (problem,) = results(run)["problems"]
    assert set(problem) == PROBLEM_KEYS | {"dictionary_words"}
    assert problem["dictionary_words"] == 1


def test_lpips_weights_give_lpips(fit, tmp_path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.alexnet().features.state_dict().items()}
    torch.save({f"features.{name}": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "alex.pth")
    (problem,) = results(fit("--lpips_weights", str(tmp_path / "alex.pth")))["problems"]
    assert set(problem) == PROBLEM_KEYS | {"lpips"}
    assert problem["lpips"] > 0


def test_pseudo_words_have_no_text_scores(fit, image_folder, language_model, tmp_path):
    (tmp_path / "words.txt").write_text("word\n")
    (image_folder / "list.csv").write_text("file,caption\n0.png,a red square\n")
    settings = ["--dictionary", str(tmp_path / "words.txt"), "--language_model", language_model]
    (problem,) = results(fit(*settings, method="TextualInversion", images=image_folder / "list.csv"))["problems"]
    assert set(problem) == PROBLEM_KEYS - {"clip_text_similarity", "special_characters"}


def test_scores_that_cannot_be_computed_are_left_out(fit, tiny, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / "clip" / name).unlink(missing_ok=True)
    (problem,) = results(fit("--model.backbone", str(folder)))["problems"]
    assert set(problem) == PROBLEM_KEYS - {"clip_text_similarity"}
    assert -1 <= problem["clip_similarity"] <= 1
    assert "Some scores are missing: The CLIP" in capsys.readouterr().err


def test_unusable_file_in_a_folder_is_a_failed_record(fit, image_folder):
    (image_folder / "1.png").write_text("no image")
    problems = results(fit(images=image_folder))["problems"]
    assert [problem["status"] == "failed" for problem in problems] == [False, True, False]
    assert "1.png" in problems[1]["reason"]
    assert problems[1]["prompt"] is None
    assert problems[0]["prompt"]
    assert problems[2]["prompt"]


def test_test_command_repeats_figures_and_scores(done):
    before = results(done)
    (done / "result.json").unlink()
    (done / "grid.png").unlink()
    (done / "words.png").unlink()
    main(["test", "--run", str(done)])
    after = results(done)
    assert after["problems"] == before["problems"]
    assert (done / "grid.png").exists()
    assert Image.open(done / "words.png").size == ((1 + 4) * 104, 2 * 116)


def test_validate_scores_the_prompts(done, capsys):
    capsys.readouterr()
    main(["validate", "--run", str(done)])
    out, problems = capsys.readouterr().out, results(done)["problems"]
    assert len(problems) == 2
    for problem in problems:
        assert f"{problem['validation_loss']:.5f}  {problem['target']}  {problem['prompt']}" in out


def test_predict_generates_an_image_per_seed(done):
    before = results(done)
    main(["predict", "--run", str(done), "--seeds", "0,1"])
    images = sorted(path.name for path in (done / "images").iterdir())
    assert images == sorted(f"{p['key']}-seed{seed}.png" for p in before["problems"] for seed in (0, 1))
    first, second = ((done / "images" / name).read_bytes() for name in images[:2])
    assert first != second
    assert results(done) == before
    main(["predict", f"--run={done}", "--seeds", "1"])
    pixels = [np.asarray(Image.open(source), dtype=int) for source in (io.BytesIO(second), done / "images" / images[1])]
    assert abs(pixels[0] - pixels[1]).max() <= 1  # the last digits depend on the batch


def png_header(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "text":
        path.write_text("no image")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif how == "60,000 x 60,000":
        png_header(path, 60_000, 60_000)
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.fixture
def base(tiny, image_folder, tmp_path):
    """Return the arguments of a valid run."""
    return (
        f"fit --run {tmp_path / 'run'} --model PEZ --model.backbone {tiny} --trainer.accelerator cpu "
        f"--model.num_tokens 2 --data.images {image_folder / '0.png'} --model.steps 1"
    ).split()


@pytest.mark.parametrize("how", ["missing", "text", "truncated", "1x1", "60,000 x 60,000", "empty file", "folder"])
def test_unusable_image_is_refused(base, image_folder, capsys, how):
    damage(image_folder / "0.png", how)
    assert_refused(capsys, *base, words="0.png")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--model.num_tokens", "500"], ["500", "takes 32"]),
        (["--model.num_tokens", "0"], "0"),
        (["--model.microbatch", "0"], ["--model.microbatch", "0", "a whole number from 1 on, or null"]),
        (["--model.backbone.image_size", "many"], ["--model.backbone.image_size", "many", "a whole number from 1 on"]),
        (["--model.microbatch", "null"], ["CPU", "--model.microbatch 16"]),
        (["--model.score_every_n_steps", "0"], ["--model.score_every_n_steps", "0"]),
        (["--model.steps", "0"], ["--model.steps", "0"]),
        (["--data.num_noise_samples", "-1"], ["--data.num_noise_samples", "-1"]),
        (["--data.num_validation_samples", "0"], ["--data.num_validation_samples", "0"]),
        (["--model.steps", "9" * 20], ["--model.steps", "9" * 20, "a whole number from 1 to 2147483647"]),
        (["--model.backbone.image_size", "9" * 20], ["--model.backbone.image_size", "from 1 to 2147483647, or null"]),
        (["--model.num_tokens", "2000000000"], ["2000000002", "takes 32"]),
        (["--model.num_tokens", "null"], "--model.num_tokens cannot be null"),
        (["--data.seed", "null"], "--data.seed cannot be null"),
        (["--model.optimizer.lr", "null"], "--model.optimizer.lr cannot be null"),
        (["--model.optimizer.lr", "-1"], "--model.optimizer.lr must be positive, got -1."),
        (["--model.optimizer.lr", "0"], "--model.optimizer.lr must be positive, got 0."),
        (["--model.optimizer.lr", "inf"], "--model.optimizer.lr cannot be inf"),
        (
            ["--model.sampler.guidance_scale", ".nan"],
            "--model.sampler.guidance_scale cannot be nan; it takes a finite number",
        ),
        (["--model.optimizer.lr", "fast"], ["--model.optimizer.lr cannot be fast", "a number"]),
        (["--data.background", "[300, 0, 0]"], ["--data.background cannot be 300", "whole numbers from 0 to 255"]),
        (["--data.background", "[0, -1, 0]"], "--data.background cannot be -1"),
        (["--run", ""], "--run must name a folder"),
        (["--trainer.devices", "two"], ["--trainer.devices cannot be 'two'", "from 1 to 1024, or auto"]),
        (["--trainer.devices", "-5"], "--trainer.devices cannot be '-5'"),
        (["--trainer.devices", "0"], "--trainer.devices cannot be '0'"),
        (["--trainer.devices", "[0, 1]"], "--trainer.devices cannot be [0, 1]; it takes a number of processes here."),
        (["--trainer.num_nodes", "0"], "--trainer.num_nodes cannot be 0"),
        (["--trainer.accelerator", "quantum"], ["--trainer.accelerator cannot be 'quantum'", "auto, cpu"]),
        (["--trainer.max_steps", "0"], ["--trainer.max_steps", "--model.steps"]),
        (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "--model.steps"]),
        (["--trainer.fast_dev_run", "true"], ["--trainer.fast_dev_run", "dry-run"]),
        (["--trainer.limit_train_batches", "3"], ["--trainer.limit_train_batches", "--model.steps"]),
        (["--trainer.overfit_batches", "1"], "--trainer.overfit_batches"),
        (["--trainer.gradient_clip_val", "1"], ["--trainer.gradient_clip_val", "max_step_norm"]),
        (["--trainer.accumulate_grad_batches", "2"], ["--trainer.accumulate_grad_batches", "--model.microbatch"]),
        (["--trainer.val_check_interval", "2"], ["--trainer.val_check_interval", "--model.score_every_n_steps"]),
        (["--trainer.max_time", "soon"], "--trainer.max_time cannot be 'soon'; it takes a duration as days:hours"),
        (["--seed_everything", "3"], ["--seed_everything", "--data.seed"]),
        (["--data.timestep_range", "[500,500]"], ["500", "timestep"]),
        (["--data.timestep_range", "[900,1100]"], ["1100", "1000"]),
        (["--data.timestep_range", "[-1,500]"], "-1"),
        (["--model.template", "a photo"], "a photo"),
        (["--model.template", "a photo of {}x"], "{}x"),
        (["--model.allowed_words", "nosuchwordanywhere"], "words"),
        (["--model.allowed_words", "[red, blue]"], "JSON list"),
        (["--model.backbone.dtype", "float8"], "float8"),
        (["--model.metric", "manhattan"], "manhattan"),
        (["--model.steps", "many"], "many"),
        (["--data.fit", "stretch"], "stretch"),
        (["--data.workerz", "5"], ["data.workerz", "did you mean --data.workers"]),
        (["--model.tokenz", "5"], ["model.tokenz", "did you mean --model.num_tokens"]),
        (["--model.dtype", "bfloat16"], "--model.dtype is unknown; did you mean --model.backbone.dtype?"),
        (
            ["--model.loss_weights.clip", "-1"],
            "--model.loss_weights.clip cannot be -1; it takes a finite number from 0 on.",
        ),
        (["--model.weight=1"], "--model.weight is unknown; did you mean --model.rerank.weight?"),
        (["--model.lr", "1"], "--model.lr is unknown; did you mean --model.optimizer.lr?"),
        (
            ["--model.num_inference_steps", "3"],
            "did you mean --model.rerank.num_inference_steps or --model.sampler.num_inference_steps?",
        ),
        (
            ["--model.backbone.guidance_scale", "3"],
            "--model.backbone.guidance_scale is unknown; did you mean --model.sampler.guidance_scale?",
        ),
        (["--model.gidance_scale", "3"], "did you mean --model.sampler.guidance_scale?"),
        (["--trainer.acelerator", "cpu"], ["trainer.acelerator", "did you mean --trainer.accelerator"]),
        (["--trainer.precision", "bf16-true"], ["bf16-true", "--model.backbone.dtype"]),
        (["--trainer.precision", "16-true"], "16-true"),
        (["--trainer.precision", "16-mixed"], "16-mixed"),
        (["--trainer.precision", "16"], "16"),
        (["--model.sampler.num_inference_steps", "1001"], ["1001 steps", "1000", "give fewer"]),
        (
            ["--model.rerank.weight", "1", "--model.rerank.num_inference_steps", "1001"],
            ["1001 steps", "1000", "give fewer"],
        ),
        (["--seeds", "one"], "one"),
        (["--model", "PEZZ"], "PEZZ"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model.backbone", "nothing-here"], "nothing-here"),
        (["--model.backbone", "nobody/nothing", "--model.backbone.offline", "true"], "nobody/nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_setting_is_refused(base, tmp_path, capsys, settings, words):
    given = [base[0], *settings, *base[3:]] if "--run" in settings else [*base, *settings]
    assert_refused(capsys, *given, words=words)
    assert not (tmp_path / "run").exists()


def test_search_cut_short_by_max_time_is_reported(fit, capsys, caplog):
    """Lightning's Timer counts the time of all runs together."""
    run = fit("--trainer.max_time", "00:00:00:01", "--model.steps", "100000")
    (problem,) = results(run)["problems"]
    assert (problem["status"], problem["reason"]) == (
        "open",
        "The search was cut short; continue it with --ckpt_path last.",
    )
    assert f"The search was cut short; the same command with --run {run} --ckpt_path last" in capsys.readouterr().out
    steps = json.loads(next((run / "problems").glob("*.json")).read_text())["unet_samples"]
    fit("--trainer.max_time", "00:00:00:01", "--model.steps", "100000", "--ckpt_path", "last")
    assert "--trainer.max_time was used up by earlier runs of this search; raise it" in caplog.text
    fit("--trainer.max_time", "00:00:00:03", "--model.steps", "100000", "--ckpt_path", "last")
    assert results(run)["problems"][0]["unet_samples"] > steps
    capsys.readouterr()
    fit("--model.steps", "1", "--ckpt_path", "last")
    assert "cut short" not in capsys.readouterr().out
    (problem,) = results(run)["problems"]
    assert problem["status"] in ("done", "not improved")


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n", "must be a mapping of settings, got a list"),
        (b"hello\n", "must be a mapping of settings, got a str"),
        (b"model:\n  class_path: PEZ\n  init_args:\n", "model.init_args in the config"),
        ("model: {}".encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        (b'model: "caf\xe9"', "is not UTF-8 text; save it as UTF-8"),
        (b"[" * 3000 + b"]" * 3000, "has more than 50 levels"),
        (BOMB.encode(), "or 10 aliases"),
    ],
)
def test_config_without_settings_is_refused(base, tmp_path, capsys, content, reason):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert_refused(capsys, *base, "--config", tmp_path / "mine.yaml", words=["mine.yaml", reason])


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ("dtype: bfloat16", "--model.dtype is unknown; did you mean --model.backbone.dtype?"),
        ("stepz: 3", "--model.stepz is unknown; did you mean --model.steps?"),
        ("backbone: {guidance_scale: 3}", "backbone.guidance_scale is unknown; did you mean --model.sampler.guidance_"),
    ],
)
def test_unknown_setting_of_a_config_is_refused_with_a_hint(base, tmp_path, capsys, settings, hint):
    (tmp_path / "mine.yaml").write_text(f"model: {{class_path: PEZ, init_args: {{{settings}}}}}")
    assert_refused(capsys, *base, "--config", tmp_path / "mine.yaml", words=hint)


def test_setting_before_its_class_is_refused(capsys):
    message = "--model.optimizer.lr stands before the --config or --model that it changes; put these first."
    assert_refused(
        capsys,
        "fit",
        "--model.optimizer.lr",
        "1",
        "--config",
        "configs/pez.yaml",
        "--data.images",
        "a.png",
        words=message,
    )
    assert_refused(capsys, "fit", "--model.optimizer.lr=1", "--model", "PEZ", "--data.images", "a.png", words=message)


@pytest.mark.parametrize("seed", ["-1", str(2**64), "9" * 20])
def test_seeds_out_of_range_are_refused(done, capsys, seed):
    assert_refused(capsys, "predict", "--run", done, f"--seeds={seed}", words=[seed, "from 0 to 18446744073709551615"])


@pytest.mark.parametrize("setting", ["scorer", "dictionary", "language_model", "lpips_weights"])
def test_unusable_scorers_are_refused_before_the_search(base, tmp_path, capsys, setting):
    args = [f"--{setting}", tmp_path / "nowhere", "--model.backbone.offline", "true"]
    assert_refused(capsys, *base, *args, words=["nowhere", "give" if setting == "scorer" else f"--{setting}"])
    assert not (tmp_path / "run").exists()
    assert_refused(capsys, *base, f"--{setting}", tmp_path, "--model.backbone.offline", "true", words=str(tmp_path))


def test_model_without_an_index_is_refused(base, tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    (folder / "model_index.json").unlink()
    assert_refused(capsys, *base, "--model.backbone", folder, words=["damaged", "model_index.json"])


def test_pickled_weights_are_refused(base, tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert_refused(capsys, *base, "--model.backbone", folder, words=["damaged", "pickle"])


def test_empty_folder_is_refused(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, *base, "--data.images", tmp_path / "empty", words="empty")


def test_folder_without_a_readable_image_is_refused(base, image_folder, capsys):
    for path in image_folder.iterdir():
        path.write_text("no image")
    assert_refused(capsys, *base, "--data.images", image_folder, words=["3 images", "0.png"])


def test_finished_run_is_not_overwritten(base, finished, capsys):
    before = content(finished)
    args = [arg if arg != str(base[2]) else str(finished) for arg in base]
    assert_refused(capsys, *args, words=[finished, "--ckpt_path last"])
    assert content(finished) == before


@pytest.mark.parametrize(
    "name", ["os.system", "torch.nn.Linear", "subprocess.Popen", "lightning_prompts.commands.main.main"]
)
@pytest.mark.parametrize("part", ["model", "data", "trainer.callbacks"])
def test_foreign_classes_in_configs_are_refused(base, tmp_path, capsys, monkeypatch, name, part):
    def never(*args, **kwargs):
        raise AssertionError("was called")

    monkeypatch.setattr(os, "system", never)
    path = tmp_path / "config.yaml"
    entry = f"class_path: {name}\n{{}}init_args:\n{{}}  command: echo"
    if part == "trainer.callbacks":
        path.write_text("trainer:\n  callbacks:\n  - " + entry.format("    ", "    ") + "\n")
    else:
        path.write_text(f"{part}:\n  " + entry.format("  ", "  ") + "\n")
    args = [
        *base[: base.index("--model")],
        "--config",
        str(path),
        *(base[base.index("--model") :] if part != "model" else []),
    ]
    assert_refused(capsys, *args, words=name)


def test_arguments_in_the_wrong_order_are_refused(capsys):
    assert_refused(capsys, "--config", "configs/ph2p.yaml", "fit", words=["command comes first", "--config"])


def test_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_prompts.commands.cli", raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 2
    assert "'pytorch_lightning' is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "hint"), [("fitt", "did you mean 'fit'"), ("train", "fit, validate, test, predict")]
)
def test_unknown_command_is_refused(capsys, command, hint):
    assert_refused(capsys, command, words=[command, hint])


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_commands_on_a_run_need_one(tmp_path, capsys, command):
    assert_refused(capsys, command, words=[command, "--run"])
    assert_refused(capsys, command, "--run", words="--run")
    assert_refused(capsys, command, "--run", tmp_path / "nowhere", words=["nowhere", "config.yaml"])


@pytest.mark.parametrize("how", ["cut short", "newer", "missing", "no folder", "file"])
def test_unreadable_record_is_refused_and_nothing_changes(done, finished, tiny, capsys, how):
    """Commands that write results would overwrite them with fewer results."""
    record = next((done / "problems").glob("*.json"))
    if how == "cut short":
        record.write_bytes(record.read_bytes()[:-20])
    elif how == "newer":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"version": 2, "new": 1}))
    elif how == "missing":
        record.unlink()
    else:
        shutil.rmtree(done / "problems")
    if how == "file":
        (done / "problems").touch()
    before, name = content(done), {"file": done / "problems", "no folder": "is missing"}.get(how, record.name)
    for args in (["test", "--run", done], ["validate", "--run", done], ["predict", "--run", done]):
        assert_refused(capsys, *args, words=[name])
    again = short_fit(tiny, done, 4, json.dumps([f"{finished.parent}/0.png", f"{finished.parent}/1.png"]))
    assert_refused(capsys, *again, "--ckpt_path", "last", "--model.steps", 4, words=[name])
    assert content(done) == before


@pytest.fixture
def changeable(tiny, tmp_path):
    """Return a finished run on two images that a test may change, and their folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{i}.png")
    main(short_fit(tiny, tmp_path / "changeable", 4, folder))
    return tmp_path / "changeable", folder


@pytest.mark.parametrize("how", ["changed", "gone", "broken"])
def test_changed_image_is_not_scored(changeable, capsys, caplog, how):
    run, images = changeable
    before, image = results(run)["problems"], images / "0.png"
    if how == "changed":
        Image.new("RGB", (16, 16), "green").save(image)
    elif how == "gone":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:50])
    width = Image.open(run / "grid.png").width
    main(["test", "--run", str(run)])
    log = caplog.text
    assert log.count("0.png is left out, and its scores stay as they are") == 1
    assert ("has changed since the search; restore it" in log) == (how == "changed")
    assert results(run)["problems"] == before
    assert Image.open(run / "grid.png").width == width // 2
    capsys.readouterr()
    main(["validate", "--run", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if re.match(r"\d\.\d+  ", line)] == ["1.png"]
    (images / "1.png").unlink()
    assert_refused(capsys, "validate", "--run", run, words="images are missing or have changed")


def test_copied_image_is_scored(changeable, caplog):
    run, images = changeable
    os.utime(images / "0.png", (1, 1))
    Image.open(images / "1.png").save(images / "1.png", compress_level=0)  # the same pixels in another file
    main(["test", "--run", str(run)])
    assert "left out" not in caplog.text


def test_run_without_prompts_is_refused(done, capsys):
    (done / "result.json").unlink()
    for record in (done / "problems").glob("*.json"):
        record.unlink()
    for command in ("validate", "predict"):
        assert_refused(capsys, command, "--run", done, words=["no prompts yet", "fit"])


def test_name_with_control_characters_is_printed_safely(fit, image_folder, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(image_folder / "2.png", os.path.join(image_folder, name))
    problem = results(fit(images=image_folder))["problems"][2]
    assert problem["target"] == r"caf\udce9.png"
    assert problem["status"] in ("done", "not improved")
    assert r"caf\udce9.png" in capsys.readouterr().out


def test_run_that_is_a_file_is_refused(base, image_folder, capsys):
    args = [str(image_folder / "1.png") if arg == base[2] else arg for arg in base]
    before = content(image_folder)
    assert_refused(capsys, *args, words="1.png")
    assert content(image_folder) == before


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, args):
    main(args)
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict"):
        assert command in out


@pytest.mark.parametrize(
    ("command", "included", "excluded"),
    [("fit", "--ckpt_path", "--seeds"), ("test", "--scorer", "--ckpt_path"), ("predict", "--seeds", "--ckpt_path")],
)
def test_help_lists_the_settings_of_a_command(capsys, command, included, excluded):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert included in out
    assert excluded not in out
    assert "--trainer.devices" in out
    assert "--trainer.max_steps" not in out  # which a search refuses


@pytest.mark.parametrize("joined", [True, False])
def test_config_with_invalid_yaml_is_refused(base, tmp_path, capsys, joined):
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  init_args: [\n")
    given = [f"--config={config}"] if joined else ["--config", str(config)]
    assert_refused(capsys, *base, *given, words=["mine.yaml", "line 3"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit"], ["--data", "--model", "config"]),
        (["fit", "--model", "PEZ", "--data", "ImagesToPrompts"], "--data.images"),
    ],
)
def test_missing_setting_is_refused(capsys, args, words):
    assert_refused(capsys, *args, words=words)


def test_mistake_before_the_search_leaves_no_folder(fit, image_folder, capsys):
    for mistake in (["--data.images", str(image_folder / "none.png")], ["--model.init", "clip_word"]):
        with pytest.raises(SystemExit) as stopped:
            fit(*mistake)
        assert stopped.value.code == 2
    assert not (image_folder.parent / "run").exists()
    assert "--model.init 'clip_word' is unknown; did you mean clip_words?" in capsys.readouterr().err
    assert results(fit())["problems"][0]["prompt"]


def test_mistake_keeps_an_existing_folder(fit, image_folder):
    run = image_folder.parent / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        fit("--data.images", str(image_folder / "none.png"))
    assert (run / "notes.txt").read_text() == "mine"


# --- uses of prompts


@pytest.fixture(scope="module")
def other(finished, tiny):
    """Return a second finished run on one other image."""
    folder = finished.parent
    Image.new("RGB", (16, 16), "green").save(folder / "green.png")
    main(short_fit(tiny, folder / "other", 5, folder / "green.png"))
    return folder / "other"


def mix(folder, *runs, more=()):
    args = ["predict", "--mix", *runs, "--run", folder, "--seeds", "0,1", "--generations", "2", "--population", "3"]
    main([str(arg) for arg in (*args, *more)])
    return json.loads((folder / "generations.json").read_text()), results(folder)


def test_mix_of_two_searches_of_one_image_may_keep_their_prompts(finished, tiny, tmp_path):
    again = tmp_path / "again"
    main([*short_fit(tiny, again, 4, str(finished.parent / "0.png")), "--data.seed", "1"])
    everyone, result = mix(tmp_path / "mix", finished, again)
    assert result["targets"][0]["key"] == result["targets"][1]["key"]
    best = sorted(everyone, key=lambda member: -member["score"])
    assert [entry["score"] for entry in result["prompts"]] == [member["score"] for member in best[:4]]


def test_mix_writes_generations_and_results(finished, other, tmp_path, tiny):
    before = content(finished), content(other)
    everyone, result = mix(tmp_path / "mix", finished, other, more=["--select", "2"])
    assert (content(finished), content(other)) == before
    parents = [results(run)["problems"][0] for run in (finished, other)]
    assert [(member["prompt"], member["token_ids"]) for member in everyone[:2]] == [
        (problem["prompt"], problem["token_ids"]) for problem in parents
    ]
    assert [member["index"] for member in everyone] == list(range(len(everyone)))
    assert [member["generation"] for member in everyone] == [None, None, 0, 0, 0, 1, 1, 1]
    for member in everyone:
        assert -1 <= member["score"] <= min(member["similarities"]) + 1e-6
    for child in everyone[2:]:
        for parent in parents:
            assert set(child["token_ids"]) & set(parent["token_ids"])
    assert len({member["prompt"] for member in everyone}) == len(everyone)
    assert [entry["index"] for entry in result["prompts"]] == [
        member["index"] for member in sorted(everyone[2:], key=lambda member: -member["score"])[:2]
    ]
    assert (tmp_path / "mix" / "prompt.txt").read_text() == "".join(f"{p['prompt']}\n" for p in result["prompts"])
    assert [target["key"] for target in result["targets"]] == [problem["key"] for problem in parents]
    assert (result["method"], result["backbone"], result["schema_version"]) == ("Mix", tiny, 1)
    assert result["prompts"][0]["heldout_score"] is None  # there is no such CLIP for this model
    names = {path.name for path in (tmp_path / "mix").iterdir()}
    assert names == {
        "generations.json",
        "generation-0.png",
        "generation-1.png",
        "prompt.txt",
        "result.json",
        "images",
    }
    assert sorted(path.name for path in (tmp_path / "mix" / "images").iterdir()) == [
        f"{rank}-seed{seed}.png" for rank in (1, 2) for seed in (0, 1)
    ]


def test_mix_is_reproducible_and_depends_on_its_seed(finished, other, tmp_path):
    first, second, third = (
        mix(tmp_path / str(i), finished, other, more=["--data.seed", str(seed)])[0] for i, seed in enumerate((1, 1, 2))
    )
    assert first == second
    assert [member["prompt"] for member in first] != [member["prompt"] for member in third]


def test_mix_of_one_run_uses_its_first_two_prompts(finished, tmp_path):
    everyone, _ = mix(tmp_path / "mix", finished, finished)
    assert [member["prompt"] for member in everyone[:2]] == [p["prompt"] for p in results(finished)["problems"]]


def test_user_selects_members_of_a_mix(finished, other, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("4 2\n"))  # then the user quits
    everyone, result = mix(tmp_path / "mix", finished, other, more=["--choose", "hand", "--negative", "a cat"])
    assert (result["settings"]["choose"], result["settings"]["negative"]) == ("hand", "a cat")
    assert [entry["index"] for entry in result["prompts"]] == [4, 2]
    assert {parent for member in everyone[5:] for parent in member["parents"]} == {2, 4}
    out = capsys.readouterr().out
    assert out.count("Which do you keep") == 2
    assert everyone[7]["prompt"] in out


def test_unsuitable_runs_for_mix_are_refused(finished, other, done, tiny, tmp_path, capsys):
    nowhere, mix = tmp_path / "nowhere", tmp_path / "mix"
    assert_refused(capsys, "predict", "--mix", finished, words=["--mix", "two runs"])
    assert_refused(capsys, "predict", "--mix", finished, "--run", mix, words=["--mix", "two runs"])
    assert_refused(capsys, "predict", f"--mix={finished}", other, words=["--mix", "two runs"])
    assert_refused(capsys, "predict", "--mix", nowhere, other, words=[nowhere, "config.yaml"])
    assert_refused(capsys, "predict", "--mix", finished, nowhere, words=[nowhere, "config.yaml"])
    assert_refused(capsys, "predict", "--mix", other, other, words=[other, "two runs"])
    assert_refused(capsys, "predict", "--mix", finished, other, "--run", done, words=[done, "another --run"])
    assert_refused(capsys, "predict", "--mix", finished, other, "--run", mix, "--scorer", nowhere, words=[nowhere])
    assert not mix.exists()
    assert_refused(
        capsys, "predict", "--mix", finished, other, "--run", mix, "--prompts", "a", words=["--mix", "--prompts"]
    )
    for setting, value in (("generations", "0"), ("population", "-1"), ("select", "some"), ("choose", "dice")):
        assert_refused(
            capsys, "predict", "--mix", finished, other, "--run", mix, f"--{setting}", value, words=[setting, value]
        )
    config = (done / "config.yaml").read_text()
    (done / "config.yaml").write_text(config.replace(tiny, "somebody/else"))
    assert_refused(capsys, "predict", "--mix", finished, done, "--run", mix, words=[tiny, "somebody/else"])
    (done / "config.yaml").write_text("model:\n  init_args: [\n")
    assert_refused(capsys, "predict", "--mix", finished, done, "--run", mix, words=[done / "config.yaml"])
    (done / "config.yaml").write_text(config)
    for path in (done / "problems").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token_ids": None, "embedding": [[0.0] * 32] * 2}))
    assert_refused(capsys, "predict", "--mix", finished, done, "--run", mix, words=[done, "textual inversion"])
    assert_refused(capsys, "predict", "--run", finished, "--negative", done, words=[done, "textual inversion"])
    shutil.rmtree(done / "problems")
    assert_refused(capsys, "predict", "--mix", finished, done, "--run", mix, words=[done, "no prompt"])
    assert not mix.exists()


def test_predict_takes_texts(done):
    main(["predict", "--run", str(done), "--prompts", "a red cat", "--seeds", "0,1"])
    names = sorted(path.name for path in (done / "images").iterdir())
    assert [name[:10] for name in names] == ["a-red-cat-"] * 2
    main(["predict", "--run", str(done), "--prompts", '["a red cat", "two dogs"]'])
    assert len(list((done / "images").iterdir())) == 3


@pytest.mark.parametrize("given", ["run", "text"])
def test_negative_prompt_changes_the_images(done, given):
    joined = ", ".join(problem["prompt"] for problem in results(done)["problems"])
    command = ["predict", "--run", str(done), "--prompts", "a red cat"]
    main(command)
    (plain,) = (done / "images").iterdir()
    main([*command, "--negative", str(done) if given == "run" else joined])
    without = next(path for path in (done / "images").iterdir() if "without" in path.name)
    assert plain.exists()
    assert plain.read_bytes() != without.read_bytes()
    assert without.name.startswith(plain.name.removesuffix("-seed0.png"))
    module = PEZ(
        backbone=json.loads((done / "result.json").read_text())["backbone"], num_tokens=2, sampler=SamplerSettings(2)
    )
    (expected,) = module.generate(["a red cat"], noise_of([0], module.backbone.latent_shape), joined)
    assert without.read_bytes() == to_png(to_image(expected))


def test_texts_are_not_parsed_as_yaml(done):
    for text in ("# a cat", "~", "null"):
        main(["predict", "--run", str(done), "--prompts", text, "--negative", text])
        (path,) = (done / "images").iterdir()
        module = PEZ(
            backbone=json.loads((done / "result.json").read_text())["backbone"],
            num_tokens=2,
            sampler=SamplerSettings(2),
        )
        (expected,) = module.generate([text], noise_of([0], module.backbone.latent_shape), text)
        assert path.read_bytes() == to_png(to_image(expected))
        path.unlink()


def test_unusable_negative_prompt_is_refused(done, capsys):
    command = ["predict", "--run", done, "--negative"]
    assert_refused(capsys, *command, done.parent / "dome", words=["dome", "config.yaml"])
    assert_refused(capsys, *command, "a cat", "--model.sampler.guidance_scale", "1", words=["guidance", "above 1"])
    assert_refused(capsys, *command, "cat " * 40, words=["takes 32", "shorten"])
