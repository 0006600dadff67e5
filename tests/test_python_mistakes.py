"""Wrong inputs of the Python calls are refused in one sentence, before a model is loaded."""

import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prompts import dpo_diff, human_feedback, invert, load_backbone, metric_guidance, seed_invariance
from lightning_prompts.callbacks import Scores
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.human_feedback import Scripted
from lightning_prompts.objectives import Sharpness
from lightning_prompts.python_search import search

ARRAY = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
IMAGE = Image.fromarray(ARRAY)

IMAGES = {  # the value of `images`, and the message
    "none": (None, "images cannot be None; give a PIL image, a NumPy array"),
    "number": (3, "images cannot be 3"),
    "bytes": (b"x", "images cannot be of type bytes"),
    "dictionary": ({"a": 1}, "images cannot be of type dict"),
    "set": ({"a.png"}, "images cannot be of type set"),
    "open file": (io.BytesIO(b"x"), "images cannot be of type BytesIO"),
    "class": (Image.Image, "images cannot be the class Image"),
    "empty list": ([], "No images were given"),
    "none in a list": ([IMAGE, None], "images[1] cannot be None"),
    "nested list": ([[IMAGE]], "images[0] cannot be a list with items of type Image"),
    "empty text": ("", "images cannot be ''"),
    "missing": ("none.png", "There is no file or folder 'none.png'"),
    "missing in a list": ([IMAGE, "none.png"], "There is no file or folder 'none.png'"),
    "not in a path": ("a\0b", "There is no file or folder 'a\\x00b'"),
    "address": ("https://example.org/a.png", "There is no file or folder"),
    "folder": (Path("."), "give the images in it as a list"),
    "pattern": ("*.png", "give the images in it as a list"),
    "list of images": ("list.csv", "give the images in it as a list"),
    "text file": ("text.txt", "'text.txt' is not an image"),
    "unreadable": ("bad.png", "'bad.png' is not an image"),
    "small image": (Image.new("RGB", (4, 16)), "images has 4 x 16 pixels; give an image of at least 8"),
    "empty image": (Image.new("RGB", (0, 16)), "images has 0 x 16 pixels"),
    "image of floats": (Image.new("F", (16, 16)), "images has pixels of mode F"),
    "not a number": (np.full((16, 16, 3), math.nan), "images has values that are infinite or not a number"),
    "infinite": (torch.full((3, 16, 16), math.inf), "images has values that are infinite or not a number"),
    "floats to 255": (ARRAY.astype(float), "floats from 0 to 255; give floats from 0 to 1, such as values / 255"),
    "floats from -1": (ARRAY / 127.5 - 1, "floats from -1 to 1; give floats from 0 to 1, such as (values + 1) / 2"),
    "negative": (ARRAY.astype(int) - 300, "integers from -300 to -45; give integers from 0 to 255"),
    "16 bits": (ARRAY.astype(np.uint16) * 257, "integers from 0 to 65535; give integers from 0 to 255"),
    "five channels": (np.zeros((16, 16, 5)), "has the shape (16, 16, 5); give (H, W), (H, W, C) or (C, H, W)"),
    "one dimension": (np.zeros(16), "has the shape (16,)"),
    "no dimension": (torch.zeros(()), "has the shape ()"),
    "batch": (torch.zeros(2, 3, 16, 16), "has the shape (2, 3, 16, 16), which is a batch; give list(batch)"),
    "no pixels": (np.zeros((16, 0, 3)), "has the shape (16, 0, 3); give an image of at least 8 pixels"),
    "few pixels": (np.zeros((3, 7, 16)), "has the shape (3, 7, 16); give an image of at least 8 pixels"),
    "no image in a list": ([ARRAY, np.zeros((4, 4))], "images[1] has the shape (4, 4)"),
    "objects": (np.array([[None] * 9] * 9), "images has values of type object"),
    "complex": (np.zeros((16, 16), complex), "images has values of type complex128"),
    "texts": (np.array([["a"] * 9] * 9), "images has values of type <U1"),
    "no values": (torch.zeros(3, 16, 16, device="meta"), "images is a tensor that NumPy cannot read"),
    "sparse": (torch.zeros(16, 16).to_sparse(), "images is a tensor that NumPy cannot read"),
}

SETTINGS = {  # of `invert`, and the message
    "method of another type": ({"method": 3}, "The method cannot be 3; give one of invert"),
    "methods": ({"method": np.array(["pez", "gcg"])}, "The method cannot be of type ndarray"),
    "unknown": ({"step": 3}, "The setting 'step' is unknown; did you mean 'steps'?"),
    "of another call": ({"prompts": "a"}, "The setting 'prompts' is unknown; give one of allow_pickle"),
    "share": ({"steps": 1.5}, "The setting steps cannot be 1.5; it takes a whole number from 1 on."),
    "float": ({"steps": 2.0}, "steps cannot be 2.0"),
    "number as text": ({"steps": "3"}, "steps cannot be '3'"),
    "yes for a number": ({"steps": True}, "steps cannot be True"),
    "none for a number": ({"steps": None}, "steps cannot be None"),
    "0": ({"steps": 0}, "steps cannot be 0; it takes a whole number from 1 on."),
    "too many": ({"steps": 2**31}, "steps cannot be 2147483648; it takes a whole number from 1 to 2147483647."),
    "list for a number": ({"steps": [1]}, "steps cannot be [1]"),
    "NumPy's float": ({"steps": np.float64(2)}, "steps cannot be 2.0"),
    "no step size": ({"method": "pez", "optimizer": {"lr": 0}}, "optimizer.lr must be positive, got 0."),
    "a negative step size": ({"method": "pez", "optimizer": {"lr": -1.0}}, "optimizer.lr must be positive, got -1."),
    "a step size of the wrong type": (
        {"method": "pez", "optimizer": {"lr": "fast"}},
        "optimizer.lr cannot be fast; it takes a number.",
    ),
    "a negative momentum": (
        {"method": "pez", "optimizer": partial(torch.optim.SGD, lr=1.0, momentum=-1.0)},
        "optimizer: Invalid momentum value: -1.0.",
    ),
    "an unknown optimizer": (
        {"method": "pez", "optimizer": "Nope"},
        "The class 'Nope' cannot be optimizer; choose one of ASGD,",
    ),
    "an unknown setting of an optimizer": (
        {"method": "pez", "optimizer": {"class_path": "SGD", "init_args": {"speed": 1.0}}},
        "The setting optimizer.speed is unknown;",
    ),
    "an optimizer of all problems": (
        {"method": "ph2p", "optimizer": "LBFGS"},
        "optimizer LBFGS takes all problems as one; give BatchedLBFGS.",
    ),
    "no optimizer": ({"method": "pez", "optimizer": None}, "optimizer must be an optimizer's name,"),
    "no function of parameters": ({"method": "pez", "optimizer": dict}, "optimizer"),
    "infinite": (
        {"sampler": {"guidance_scale": math.inf}},
        "sampler.guidance_scale cannot be inf; it takes a finite number or None.",
    ),
    "too large": ({"sampler": {"guidance_scale": 10**400}}, "it takes a finite number or None."),
    "text for a number": ({"sampler": {"guidance_scale": "7"}}, "sampler.guidance_scale cannot be '7'"),
    "color": ({"background": "red"}, "cannot be 'red'; it takes a list of 3, each item a whole number from 0 to 255."),
    "two colors": ({"background": [1, 2]}, "background cannot be [1, 2]"),
    "bright": ({"background": (0, 0, 256)}, "background cannot be 256"),
    "share of a color": ({"background": (0, 0.5, 1)}, "background cannot be [0, 0.5, 1]"),
    "text for a range": ({"timestep_range": "0,1000"}, "timestep_range cannot be '0,1000'; it takes a list of 2"),
    "texts in a range": ({"timestep_range": ["0", "1000"]}, "timestep_range cannot be ['0', '1000']"),
    "text for yes": ({"one_subject": "yes"}, "one_subject cannot be 'yes'; it takes True or False."),
    "1 for yes": ({"backbone": {"offline": 1}}, "backbone.offline cannot be 1; it takes True or False."),
    "choice": ({"fit": "stretch"}, "fit cannot be 'stretch'; it takes one of 'crop', 'pad'."),
    "null": ({"backbone": {"dtype": "null"}}, "backbone.dtype cannot be 'null'; it takes one of 'float32', 'bfloat16'"),
    "type for its name": (
        {"backbone": {"dtype": torch.float16}},
        "backbone.dtype cannot be of type dtype; it takes one of 'float32'",
    ),
    "in another group": ({"dtype": "float32"}, "The setting 'dtype' is unknown; did you mean backbone={'dtype': ...}?"),
    "in several groups": (
        {"num_inference_steps": 3},
        "did you mean rerank={'num_inference_steps': ...} or sampler={'num_inference_steps': ...}?",
    ),
    "unknown in a group": (
        {"backbone": {"dtyp": "float32"}},
        "'backbone.dtyp' is unknown; did you mean 'backbone.dtype'?",
    ),
    "list for a group": (
        {"sampler": [3]},
        "sampler cannot be [3]; it takes a dictionary of settings or SamplerSettings.",
    ),
    "text for a group": (
        {"sampler": "3"},
        "sampler cannot be '3'; it takes a dictionary of settings or SamplerSettings.",
    ),
    "text for a list": (
        {"allowed_words": "[cat]"},
        "allowed_words cannot be '[cat]'; it takes a list, each item a text or None.",
    ),
    "number for a text": ({"template": 3}, "template cannot be 3; it takes a text."),
    "none for a text": ({"init": None}, "init cannot be None; it takes a text."),
    "surrogate": ({"template": "{} \ud800"}, "which is not UTF-8"),
    "backbone": (
        {"backbone": torch.nn.Linear(1, 1)},
        "backbone cannot be of type Linear; it takes a dictionary of settings, a model's name, a loaded model or "
        "BackboneSettings.",
    ),
    "no backbone": ({"backbone": None}, "backbone cannot be None"),
    "negative": ({"negative_images": [IMAGE, 3]}, "negative_images[1] cannot be 3; give a PIL image"),
    "nothing to minimize": (
        {"loss_weights": {"denoising": 0, "clip": 0}},
        "set loss_weights.denoising or loss_weights.clip above 0.",
    ),
    "negative weight": (
        {"loss_weights": {"negative": -1}},
        "loss_weights.negative cannot be -1; it takes a finite number from 0 on.",
    ),
    "one seed": ({"image_seeds": 3}, "image_seeds cannot be 3; it takes a list, each item a whole number."),
    "seeds as text": ({"image_seeds": "0,1"}, "image_seeds cannot be '0,1'"),
    "seed as text": ({"image_seeds": ["1"]}, "image_seeds cannot be ['1']"),
    "seeds of floats": ({"image_seeds": np.array([1.5])}, "image_seeds cannot be [1.5]"),
    "seeds without order": ({"image_seeds": {1}}, "image_seeds cannot be of type set"),
    "no seeds": (
        {"image_seeds": []},
        "image_seeds takes whole numbers from 0 to 18446744073709551615, not an empty list.",
    ),
    "negative seed": ({"image_seeds": [0, -1]}, "from 0 to 18446744073709551615, not -1."),
    "large seed": ({"image_seeds": [2**64]}, "from 0 to 18446744073709551615, not 18446744073709551616."),
    "none for seeds": ({"image_seeds": None}, "image_seeds cannot be None"),
    "device": ({"device": "gpu"}, "The device 'gpu' cannot be used"),
    "device's number": ({"device": 0}, "The device cannot be 0; give 'cpu', or 'cuda:0'"),
    "empty device": ({"device": ""}, "The device '' cannot be used"),
    "device without values": (
        {"device": torch.device("meta")},
        "The device 'meta' cannot be used (no search runs there)",
    ),
    "scores": ({"scores": "clip"}, "The setting scores cannot be 'clip'; it takes a Scores or None."),
    "scorer": ({"scores": Scores(scorer=3)}, "The setting scorer cannot be 3; it takes a text or None."),
    "dictionary": ({"scores": Scores(dictionary="none")}, "The dictionary none cannot be read"),
    "folder's number": ({"folder": 3}, "The setting folder cannot be 3; it takes a text or None."),
    "empty folder": ({"folder": " "}, "folder cannot be ' '; give the name of a folder, or None"),
    "not a folder": ({"folder": "a\0b"}, "The setting folder cannot be 'a\\x00b'"),
    "long folder": ({"folder": "a" * 300}, "cannot be used (File name too long); give another folder."),
    "file": ({"folder": "text.txt"}, "The run folder text.txt is a file; give another folder."),
    "in a file": ({"folder": "text.txt/run"}, "The run folder text.txt/run cannot be written"),
    "run": ({"folder": "run"}, "The folder run already holds a run; give another folder."),
}

CALLS = {
    "prompts: none": (lambda: dpo_diff(None), "prompts cannot be None; it takes a text or a list, each item a text."),
    "prompts: number": (lambda: seed_invariance(3), "prompts cannot be 3"),
    "prompts: bytes": (lambda: dpo_diff(b"a"), "prompts cannot be of type bytes"),
    "prompts: empty": (
        lambda: metric_guidance(" ", Sharpness()),
        "A prompt is empty; write what the image should show.",
    ),
    "prompts: one empty": (lambda: dpo_diff(["a", ""]), "A prompt is empty"),
    "prompts: no prompt": (lambda: dpo_diff([]), "No prompts were given; give prompts a text"),
    "prompts: none in a list": (lambda: dpo_diff(["a", None]), "prompts cannot be ['a', None]"),
    "prompts: nested": (lambda: dpo_diff([["a"]]), "prompts cannot be a list with items of type list"),
    "prompts: dictionary": (lambda: dpo_diff({"a": 1}), "prompts cannot be of type dict"),
    "prompts: surrogate": (lambda: dpo_diff("\ud800"), "which is not UTF-8"),
    "prompts: list": (lambda: dpo_diff("prompts.txt"), "give the prompts in it as a list"),
    "task": (lambda: dpo_diff("a", task="worsen"), "task cannot be 'worsen'; it takes one of 'improve', 'attack'."),
    "task: none": (lambda: dpo_diff("a", task=None), "task cannot be None"),
    "sources": (lambda: dpo_diff("a", positive="neighbors"), "positive cannot be 'neighbors'; it takes a list"),
    "source": (lambda: dpo_diff("a", positive=["dictionary"]), "positive cannot be ['dictionary']"),
    "objective: class": (
        lambda: metric_guidance("a", Sharpness),
        "cannot be the class Sharpness; it takes an Objective",
    ),
    "objective: name": (
        lambda: metric_guidance("a", "Sharpness"),
        "objective cannot be 'Sharpness'; it takes an Objective",
    ),
    "objective: none": (lambda: metric_guidance("a", None), "objective cannot be None"),
    "objective: function": (
        lambda: metric_guidance("a", lambda images: images),
        "objective cannot be of type function",
    ),
    "objective: no objective": (lambda: metric_guidance("a", []), "objective must name at least one metric"),
    "objective: number": (lambda: metric_guidance("a", [Sharpness(), 3]), "a list with items of type Sharpness, int"),
    "seed: text": (lambda: seed_invariance("a", seed="3"), "The setting seed cannot be '3'; it takes a whole number."),
    "seed: yes": (lambda: seed_invariance("a", seed=True), "The setting seed cannot be True"),
    "seed: negative": (
        lambda: seed_invariance("a", seed=-1),
        "seed takes whole numbers from 0 to 18446744073709551615, not -1.",
    ),
    "seeds": (lambda: seed_invariance("a", target_seeds=[1, 2]), "takes seed instead of target_seeds"),
    "target seeds": (
        lambda: search("seed_invariance", {"prompts": "a", "target_seeds": [-1]}),
        "target_seeds takes whole",
    ),
    "choose: number": (lambda: human_feedback("a", 3), "choose cannot be 3; it takes a function that returns a Choice"),
    "choose: no": (lambda: human_feedback("a", False), "choose cannot be False"),
    "choose: class": (lambda: human_feedback("a", Scripted), "choose cannot be the class Scripted"),
    "chooser": (
        lambda: human_feedback("a", chooser=Scripted("a.png")),
        "human_feedback takes choose instead of chooser",
    ),
    "set by the method": (
        lambda: human_feedback("a", print, unconditional=True),
        "The setting 'unconditional' is unknown",
    ),
    "config": (lambda: search("../pez", {}), "The config '../pez' is unknown; give one of clip_words, dpo_diff"),
    "config: number": (lambda: search(3, {}), "The config 3 is unknown"),
    "settings": (lambda: search("pez", None), "Settings cannot be None; give a dictionary"),
    "settings: numbers": (lambda: search("pez", {3: 4}), "give a dictionary whose keys are names of settings."),
    "settings: no images": (lambda: search("pez", {}), "images must be given"),
    "settings: images": (lambda: search("pez", {"images": 3}), "images cannot be 3; it takes a text or a list"),
    "load: number": (lambda: load_backbone(3), "The setting name cannot be 3; it takes a text."),
    "load: precision": (
        lambda: load_backbone("emoji", dtype="int8"),
        "dtype cannot be 'int8'; it takes one of 'float32'",
    ),
    "load: size": (
        lambda: load_backbone("emoji", image_size="64"),
        "image_size cannot be '64'; it takes a whole number",
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder with some files, check that nothing else is left in it, and load no model."""
    (tmp_path / "text.txt").write_text("a dog")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "list.csv").write_text("file\na.png\n")
    IMAGE.save(tmp_path / "a.png")
    (tmp_path / "run/problems").mkdir(parents=True)
    (tmp_path / "run/problems/0.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lightning_prompts.backbones.settings.load_backbone", lambda *_: pytest.fail("a model was loaded")
    )
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


def assert_refused(ask, message):
    with pytest.raises(UserError) as mistake:
        ask()
    text = str(mistake.value)
    assert message in text.replace(f"{Path.cwd()}/", "")
    assert "\n" not in text
    assert "--" not in text


@pytest.mark.parametrize(("images", "message"), IMAGES.values(), ids=IMAGES)
def test_unusable_images_are_refused(images, message):
    assert_refused(lambda: invert(images), message)


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_invalid_settings_are_refused(settings, message):
    assert_refused(lambda: invert(IMAGE, **settings), message)


@pytest.mark.parametrize(("ask", "message"), CALLS.values(), ids=CALLS)
def test_invalid_calls_are_refused(ask, message):
    assert_refused(ask, message)


def test_closed_image_is_refused():
    image = Image.open("a.png")
    image.close()
    assert_refused(
        lambda: invert(image), "images is an image that cannot be read (Operation on closed image); open it again."
    )


def test_truncated_image_is_refused():
    image = Image.open(io.BytesIO(Path("a.png").read_bytes()[:300]))
    assert_refused(
        lambda: invert(image), "images is an image that cannot be read (image file is truncated); open it again."
    )
