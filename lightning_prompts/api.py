"""The four questions as Python calls, for those who build them into a tool of their own."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_prompts import methods
from lightning_prompts.backbones import Backbone, BackboneSettings, load_backbone
from lightning_prompts.callbacks import OwnerGuard, Results, Scores
from lightning_prompts.callbacks.results import check_seeds, noise_of
from lightning_prompts.data.arrays import array_to_image
from lightning_prompts.data.images import DAMAGE, MIN_SIDE, find_targets, load_image
from lightning_prompts.data.inversion import ImagesToPrompts
from lightning_prompts.data.prompts import Prompts, find_prompts
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.methods import TRAINER, PromptMethod
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.methods.steering.human_feedback import Choice, Chooser, Page, Round
from lightning_prompts.objectives import Objective
from lightning_prompts.python_settings import checked_settings, in_python
from lightning_prompts.python_values import check_type, plain, shown
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.runs.record import MethodResult, Problem
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.figures import to_image

__all__ = [
    "BackboneSettings",
    "Result",
    "SamplerSettings",
    "guide",
    "hold",
    "invert",
    "load_backbone",
    "prefer",
    "reword",
    "search",
]

Picture: TypeAlias = Image.Image | np.ndarray[Any, Any] | Tensor | str | Path
"""A picture: a PIL image, an array, a tensor, or a file.

Arrays and tensors are of shape (H, W), (H, W, C) or (C, H, W), with whole numbers from 0 to 255 or floats from 0 to 1.
"""

CONFIGS = next(
    folder
    for folder in (
        Path(__file__).parent / "configs",
        Path(__file__).parent.parent / "configs",
    )  # installed, or a checkout
    if folder.is_dir()
)
PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that it holds
TIFF = ("CMYK", "LAB", "I", "F")  # modes that it holds and PNG does not
ALPHA = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # what other modes with alpha become
INVERTERS = (
    "invert",
    "ph2p",
    "ph2p_lbfgs",
    "pez",
    "pez_clip",
    "gcg",
    "textual_inversion",
    "clip_words",
    "random_tokens",
)


@dataclass(frozen=True)
class Result:
    """What was found for a picture or a prompt.

    Attributes:
        prompt: The prompt; of methods that find an embedding, what stands for it, or the prompt that it comes from.
        negative_prompt: What to lead away from, where that was searched.
        embedding: Of the prompt's tokens, (M, D), where tokens or embeddings of them were searched.
        prompt_embeds: The encoded prompt (R, D), where that was moved.
        negative_prompt_embeds: What it is led away from, (R, D), where that was moved.
        pictures: Drawn from what was found, one from each of `draw_seeds`.
        record: The record of the search; see docs/results.md.
    """

    prompt: str
    negative_prompt: str | None
    embedding: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    pictures: list[Image.Image]
    record: Problem

    @property
    def details(self) -> MethodResult:
        """What this method alone records, such as `metric_before` and `metric_after` of `guide`."""
        return MethodResult.of(self.record)


@overload
def invert(images: Picture, *, method: str = ..., **settings: Any) -> Result: ...
@overload
def invert(images: Sequence[Picture], *, method: str = ..., **settings: Any) -> list[Result]: ...
def invert(images: Picture | Sequence[Picture], *, method: str = "invert", **settings: Any) -> Result | list[Result]:
    """Which prompt makes this picture?

    Args:
        images: A picture (a PIL image, an array, a tensor or a file), or a list of them, which are searched together. With
            `one_subject=True` several get one prompt.
        method: `invert`, which is the best that we know, or `ph2p`, `ph2p_lbfgs`, `pez`, `pez_clip`, `gcg`, `textual_inversion`, `clip_words`
            or `random_tokens`.
        **settings: See `search`; settings of the method and of `ImagesToPrompts`.

    Returns:
        A result, or of several pictures a list of them in the same order.

    Raises:
        UserError: A picture or a setting cannot be used, or nothing was found for an only picture.
    """
    if not isinstance(method, str) or method not in INVERTERS:
        raise UserError(
            f"The method {shown(method)} is none that inverts pictures; give one of {', '.join(INVERTERS)}."
        )
    alone = not isinstance(images, list | tuple | Iterator) or hasattr(images, "read")  # a file that is open iterates
    given: list[Any] = [images] if alone else list(images)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        names = ["images"] if alone else [f"images[{i}]" for i in range(len(given))]
        files = [_file(picture, name, Path(scratch)) for picture, name in zip(given, names, strict=True)]
        if alone:
            load_image(files[0], MIN_SIDE)
        if (negative := settings.get("negative_images")) is not None:
            settings["negative_images"] = _negative(negative, Path(scratch))
        once = list(dict.fromkeys(files))
        find_targets(once)  # refused before a model is loaded, as is a lone picture that cannot be read
        found = _searched(method, {"images": once, **settings})
    if alone or settings.get("one_subject"):
        return _only(found)
    return [found[once.index(file)] for file in files]


@overload
def reword(prompts: str, *, task: Literal["improve", "attack"] = ..., **settings: Any) -> Result: ...
@overload
def reword(prompts: Sequence[str], *, task: Literal["improve", "attack"] = ..., **settings: Any) -> list[Result]: ...
def reword(
    prompts: str | Sequence[str], *, task: Literal["improve", "attack"] = "improve", **settings: Any
) -> Result | list[Result]:
    """Which words make this prompt work better, or break it?

    Args:
        prompts: A prompt, or several.
        task: `improve`, by default with a negative prompt, or `attack`.
        **settings: See `search`; settings of `DPODiff`.
    """
    return _of_prompts("dpo_diff", prompts, {"task": task, **settings})


@overload
def guide(prompts: str, objective: Objective | list[Objective], **settings: Any) -> Result: ...
@overload
def guide(prompts: Sequence[str], objective: Objective | list[Objective], **settings: Any) -> list[Result]: ...
def guide(
    prompts: str | Sequence[str], objective: Objective | list[Objective], **settings: Any
) -> Result | list[Result]:
    """Which embedding makes the pictures of this prompt score higher?

    Args:
        prompts: A prompt, or several.
        objective: What judges pictures, such as `lightning_prompts.objectives.Sharpness()`, or a list of these.
        **settings: See `search`; settings of `MetricGuidance`.
    """
    return _of_prompts("metric_guidance", prompts, {"objective": objective, **settings})


@overload
def hold(prompts: str, seed: int = ..., **settings: Any) -> Result: ...
@overload
def hold(prompts: Sequence[str], seed: int = ..., **settings: Any) -> list[Result]: ...
def hold(prompts: str | Sequence[str], seed: int = 0, **settings: Any) -> Result | list[Result]:
    """Which embedding draws the picture of one seed from every seed?

    Args:
        prompts: A prompt, or several.
        seed: The seed whose picture is wanted.
        **settings: See `search`; settings of `SeedInvariance`.
    """
    if "target_seeds" in settings:
        raise UserError(
            "The setting target_seeds is set by seed; give seed=7 instead, and call again for another seed."
        )
    seed = plain("seed", seed)
    check_type("seed", seed, int)
    check_seeds("seed", [seed])
    return _of_prompts("seed_invariance", prompts, {**settings, "target_seeds": [seed]})


@overload
def prefer(prompts: str, choose: Callable[[Round], Choice] | Chooser | None = ..., **settings: Any) -> Result: ...
@overload
def prefer(
    prompts: Sequence[str], choose: Callable[[Round], Choice] | Chooser | None = ..., **settings: Any
) -> list[Result]: ...
def prefer(
    prompts: str | Sequence[str], choose: Callable[[Round], Choice] | Chooser | None = None, **settings: Any
) -> Result | list[Result]:
    """Which embedding draws what I like better?

    Args:
        prompts: A prompt, or several, one after the other.
        choose: Gives an answer to each round of pictures; None for a page that opens.
        **settings: See `search`; settings of `HumanFeedback`.
    """
    if "chooser" in settings:
        raise UserError("The setting chooser is set by choose; give choose instead.")
    if choose is not None and not isinstance(choose, Chooser) and (isinstance(choose, type) or not callable(choose)):
        raise UserError(
            f"The setting choose cannot be {shown(choose)}; it takes a function that returns a Choice, a Chooser, or None."
        )
    chooser = choose if isinstance(choose, Chooser) else _Function(choose) if choose else Page()
    return _of_prompts("human_feedback", prompts, {**settings, "chooser": chooser})


class _Function(Chooser):
    """A function that chooses."""

    def __init__(self, function: Callable[[Round], Choice]) -> None:
        self.function = function

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Has nothing to prepare."""

    def choose(self, question: Round) -> Choice:
        """Asks it."""
        return self.function(question)

    def close(self, last_words: str) -> None:
        """Has nothing to end."""


def search(
    config: str,
    settings: Mapping[str, Any],
    *,
    draw_seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    scores: Scores | None = None,
) -> list[Result]:
    """Searches as `train.py fit --config configs/NAME.yaml` does, without a command line, a logger or a page.

    It can run inside another Trainer's loop, whose modes, random numbers and process group it leaves alone.

    Args:
        config: The config's name, such as `ph2p`, whose settings are the default.
        settings: Settings of the method and its data by name, such as `backbone`, `tokens` or `steps`; `backbone` may be a name or
            what `load_backbone` has given, which saves loading it again.
        draw_seeds: Seeds that the results' pictures are drawn from.
        folder: Where the files that a run writes are kept, in which there is no run yet; None for none.
        device: Where it computes, such as `cuda:1`; None for a GPU if there is one.
        scores: What scores the results, see `Scores`.

    Returns:
        A result a problem, in the order of the pictures or prompts; where nothing was found its prompt is empty, and its record says
        why.

    Raises:
        UserError: A setting cannot be used.
    """
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if not isinstance(config, str) or config not in names:
        raise UserError(f"The config {shown(config)} is unknown; give one of {', '.join(names)}.")
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"Settings cannot be {shown(settings)}; give a dictionary whose keys are names of settings.")
    if scores is not None and not isinstance(scores, Scores):
        raise UserError(f"The setting scores cannot be {shown(scores)}; it takes a Scores or None.")
    draw_seeds = plain("draw_seeds", draw_seeds)
    check_type("draw_seeds", draw_seeds, list[int])
    check_seeds("draw_seeds", draw_seeds)
    where = _device(device)
    read = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    kind = getattr(methods, read["model"]["class_path"])
    data_kind: Any = {"Prompts": Prompts, "ImagesToPrompts": ImagesToPrompts}[read["data"]["class_path"]]
    defaults = {**read["model"]["init_args"], **read["data"].get("init_args", {})}
    with _in_python(), _apart(where), tempfile.TemporaryDirectory() as scratch, _prepared(folder) as (kept, lock):
        of_method, of_data = checked_settings((kind, data_kind), defaults, settings)
        if scores:
            (texts,) = checked_settings((Scores,), {}, asdict(scores))
            scores = Scores(**texts)
            scores.check(of_method["backbone"].offline)
        if isinstance(of_method["backbone"], BackboneSettings):
            of_method["backbone"] = of_method[
                "backbone"
            ].pinned()  # so that the record names the weights that were read
        method: PromptMethod = kind(**of_method)
        data = data_kind(**of_data)
        trainer = pl.Trainer(
            **TRAINER
            | {
                "devices": [where.index or 0] if where.type != "cpu" else 1,
                "accelerator": where.type,
                "enable_checkpointing": True,
            },
            strategy=SingleDeviceStrategy(where),
            logger=False,
            callbacks=[
                OwnerGuard(lock),
                Results(
                    scores,
                    settings={name: _recorded(value) for name, value in (of_method | of_data).items()},
                    tell=False,
                ),
            ],
            default_root_dir=kept or scratch,
        )
        trainer.fit(method, datamodule=data)
        method.to(where)  # which Lightning has left
        noise = noise_of(draw_seeds, method.backbone.latent_shape).to(where)
        records = data.folder.load()
        return [_result(method, records[key], noise) for key in data.keys]


def _recorded(setting: Any) -> Any:
    """Return a setting as the result's file holds it."""
    if isinstance(setting, BackboneSettings | SamplerSettings):
        return asdict(setting)
    return setting.name if isinstance(setting, Backbone) else str(setting)


@contextmanager
def _in_python() -> Iterator[None]:
    """Name settings as Python arguments in what is said of a mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(in_python(str(error))) from error


@contextmanager
def _prepared(folder: str | Path | None) -> Iterator[tuple[Path | None, RunLock | None]]:
    """Prepare and hold the folder of a run, and delete it again if it is new and the run is refused."""
    if folder is None:
        yield None, None
        return
    path = plain("folder", folder)
    check_type("folder", path, str | None)
    if not path.strip() or "\0" in path:
        raise UserError(f"The setting folder cannot be {path!r}; give the name of a folder, or None to keep no files.")
    run, new = RunFolder(path), not os.path.lexists(path)
    with ExitStack() as held:
        try:
            lock = held.enter_context(run.locked())
            run.prepare(resume=False, search=False)
        except UserError as error:
            raise UserError(str(error).replace("--run", "folder")) from error
        except OSError as error:  # of a name that is too long
            raise UserError(
                f"The folder {shown(path)} cannot be used ({error.strerror}); give another folder."
            ) from error
        try:
            yield run.path, lock
        except UserError:
            if new and not lock.taken:
                run.discard()
            raise


def _result(method: PromptMethod, problem: Problem, noise: Tensor) -> Result:
    method.result_class.of(problem)  # of this class also where nothing was recorded
    problem.reason = problem.reason and in_python(problem.reason)
    if problem.prompt is None or problem.status == "failed":
        return Result("", None, None, None, None, [], problem)
    pictures = [to_image(picture) for picture in method.draw_found(problem, noise)]
    embedding = told = away = None
    if isinstance(method, Steering):
        told, *more = method.best_embeds_of([problem])[0].cpu()
        away = more[0] if more else None
    elif isinstance(method, Inverter):
        embedding = method.embedded(problem).float().cpu()
    return Result(problem.prompt, problem.negative_prompt, embedding, told, away, pictures, problem)


def _of_prompts(config: str, prompts: str | Sequence[str], settings: dict[str, Any]) -> Result | list[Result]:
    given = plain("prompts", prompts)
    check_type("prompts", given, str | list[str])
    several = [" ".join(prompt.split()) for prompt in ([given] if isinstance(given, str) else given)]
    if lists := [prompt for prompt in several if Path(prompt).suffix.lower() in (".txt", ".csv", ".jsonl")]:
        raise UserError(f"A prompt is a text and {lists[0]!r} a list of them; give what it holds.")
    with _in_python():
        find_prompts(several)  # refused before a model is loaded
    found = _searched(config, {"prompts": several, **settings})
    if isinstance(given, str):
        return _only(found)
    by_prompt = {result.record.target: result for result in found}
    return [by_prompt[prompt] for prompt in several]


def _searched(config: str, settings: dict[str, Any]) -> list[Result]:
    """Calls `search` with what is its own taken out of the settings."""
    own = {name: settings.pop(name) for name in ("draw_seeds", "folder", "device", "scores") if name in settings}
    return search(config, settings, **own)


def _only(found: list[Result]) -> Result:
    (result,) = found
    if not result.prompt:
        raise UserError(str(result.record.reason))
    return result


def _file(picture: Any, name: str, scratch: Path) -> str:
    """The file of a picture, which is written if there is none.

    Raises:
        UserError: It is no picture, or another one cannot be found.
    """
    if isinstance(picture, np.ndarray | Tensor):
        picture = array_to_image(picture, name)
    if isinstance(picture, Image.Image):
        return _written(picture, name, scratch)
    if not isinstance(picture, str | Path):
        raise UserError(
            f"{name} cannot be {shown(picture)}; give a PIL image, a NumPy array, a tensor, or the name of a file, or a list of these."
        )
    file: str = plain(name, picture)
    if not file.strip():
        raise UserError(f"{name} cannot be {file!r}; give the name of a file.")
    if file.lower().endswith((".csv", ".jsonl")) or [target.paths for target in find_targets([file])] != [
        (str(Path(file)),)
    ]:
        raise UserError(f"A picture or its file is needed, and {file!r} is none; give the pictures that it holds.")
    return os.path.abspath(file)  # so that a file under two names is searched once


def _written(picture: Image.Image, name: str, scratch: Path) -> str:
    """The file of a picture in memory, lossless and with what belongs to its colors."""
    suffix = "tiff" if picture.mode in TIFF else "png"
    file = scratch / f"{name.replace('[', '-').rstrip(']')}.{suffix}"
    if min(picture.size) < MIN_SIDE:
        width, height = picture.size
        raise UserError(f"{name} has {width} x {height} pixels; give a picture of at least {MIN_SIDE} on each side.")
    try:
        kept = picture if picture.mode in (*PNG, *TIFF) else picture.convert(ALPHA.get(picture.mode, "RGB"))
        kept.save(file, exif=picture.getexif())  # in which the orientation is
        load_image(file, MIN_SIDE)
    except UserError as error:
        raise UserError(str(error).replace(f"'{file}'", name)) from error
    except DAMAGE as error:
        raise UserError(
            f"{name} is a picture that cannot be read ({first_sentence(error).rstrip('.')}); open it again."
        ) from error
    return str(file)


def _negative(pictures: Any, scratch: Path) -> str | list[str]:
    """The files of pictures to lead away from; texts, which may be folders and patterns, are kept."""
    several = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    return [
        str(picture) if isinstance(picture, str | Path) else _file(picture, f"negative_images[{i}]", scratch)
        for i, picture in enumerate(several)
    ]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise UserError(f"The device cannot be {shown(device)}; give 'cpu', or 'cuda:0' if there is a GPU.")
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("no search runs there")
        return torch.device("cpu") if found.type == "cpu" else torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second where torch has no CUDA
        reason = first_sentence(error).rstrip(".")
    raise UserError(f"The device {str(device)!r} cannot be used ({reason}); give 'cpu', or 'cuda:0' if there is a GPU.")


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Has nothing of what the surrounding program has set count meanwhile, and leaves all of it as it was."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    in_main = threading.current_thread() is threading.main_thread()
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False)
        with isolate_rng(), modes[0], modes[1], modes[2], warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|torch|diffusers|transformers")
            yield
    except SystemExit as stop:  # Lightning makes it of Ctrl-C, and switches that off
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if in_main:
            signal.signal(signal.SIGINT, on_ctrl_c)
