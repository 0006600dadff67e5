import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.commands.main import main
from lightning_prompts.embeddings import slerp
from lightning_prompts.sampling.seeding import noise_of

pytestmark = pytest.mark.filterwarnings("ignore")

ENDS = ["a small cat on a blue background", "two dogs beside a large tree"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("between") / "run"
    command = (
        f"fit --run {folder} --trainer.accelerator cpu --model MetricGuidance --model.backbone {tiny} "
        "--model.objective Sharpness --model.sampler.num_inference_steps 3 --model.seeds 1 --model.steps 2 "
        "--model.optimizer.lr 0.05 --data Prompts --data.prompts"
    )
    main([*command.split(), json.dumps(ENDS)])
    return folder


def predict(run, *args):
    for old in (run / "images").glob("*"):
        old.unlink()
    main(["predict", "--run", str(run), "--trainer.accelerator", "cpu", *args])
    return {path.suffix: path for path in (run / "images").iterdir()}


def pixels(image):
    return torch.tensor(list(image.convert("RGB").getdata())).view(image.height, image.width, 3)


def test_frames_are_samples_along_the_slerp(run, tiny):
    files = predict(run, "--path", *ENDS, "--frames", "4", "--seeds", "3,8")
    backbone = load_backbone(tiny)
    tower, noise = backbone.text_encoders[0], noise_of([3, 8], backbone.latent_shape)
    one, other, empty = (backbone.encode(encode_text(tower.tokenizer, [x], tower.length)) for x in (*ENDS, ""))
    with Image.open(files[".gif"]) as animation:
        assert animation.n_frames == 6  # there and back, the ends once
        assert animation.size == (32, 16)
    with Image.open(files[".png"]) as grid:
        canvas = pixels(grid)
    with torch.no_grad():
        for i in range(4):
            prompt_embeds = slerp(one, other, i / 3).repeat(2, 1, 1)
            images = backbone.decode(backbone.sample(prompt_embeds, empty, noise, 3, 7.5))
            for n, image in enumerate(images):  # the grid shows each pixel as a square of 6 x 6
                top, left = n * 100 + (6 if n else 2), i * 104 + 4
                frame = canvas[top : top + 96, left : left + 96][3::6, 3::6]
                expected = ((image + 1) * 127.5).clamp(0, 255).permute(1, 2, 0)
                assert (frame - expected).abs().max() <= 2


def test_ends_may_be_saved_embeddings(run):
    first, second = sorted((run / "problems").glob("*.safetensors"))
    files = predict(run, "--path", str(first), str(second), "--frames", "3")
    assert first.stem[:8] in files[".png"].name
    predict(run, "--path", ENDS[0], str(second), "--frames", "2")
    assert len(load_file(run / "prompt_embeds.safetensors")) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--path", "a", "absent.safetensors"], "cannot be read as embeddings"),
        (["--path", "a", "{run}/prompt_embeds.safetensors"], "has 2 embeddings"),
        (["--path", "a", "b", "--frames", "1"], "--frames 2 or more"),
        (["--path", "a", "b", "--prompts", "c"], "cannot be combined with --mix, --prompts or --negative"),
        (["--path", "a"], "expected 2 arguments"),
    ],
)
def test_mistakes_give_one_sentence(args, message, run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--run", str(run), "--trainer.accelerator", "cpu", *(x.format(run=run) for x in args)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
