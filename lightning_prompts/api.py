"""The four questions as Python calls, for those who build them into a tool of their own."""

from __future__ import annotations

import difflib
import inspect
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_prompts import methods
from lightning_prompts.backbones import Backbone, load_backbone
from lightning_prompts.backbones.hub import pinned
from lightning_prompts.callbacks import OwnerGuard, Results, Scores
from lightning_prompts.callbacks.grid import to_image
from lightning_prompts.callbacks.results import noise_of
from lightning_prompts.data.inversion import ImagesToPrompts
from lightning_prompts.data.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, PromptMethod
from lightning_prompts.methods.human_feedback import Choice, Chooser, Page, Round
from lightning_prompts.methods.inverter import Inverter
from lightning_prompts.methods.steering import Steering
from lightning_prompts.objectives import Objective
from lightning_prompts.problems import Problem
from lightning_prompts.ranges import LEAST, MOST
from lightning_prompts.run_folder import RunFolder

__all__ = ["Result", "guide", "hold", "invert", "load_backbone", "prefer", "reword", "search"]

Picture: TypeAlias = Image.Image | str | Path
"""A picture, or its file."""

CONFIGS = next(
    folder
    for folder in (
        Path(__file__).parent / "configs",
        Path(__file__).parent.parent / "configs",
    )  # installed, or a checkout
    if folder.is_dir()
)
INVERTERS = ("invert", "ph2p", "ph2p_lbfgs", "pez", "gcg", "textual_inversion", "clip_words", "random_tokens")


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
        record: All that was measured.
    """

    prompt: str
    negative_prompt: str | None
    embedding: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    pictures: list[Image.Image]
    record: Problem


@overload
def invert(images: Picture, *, method: str = ..., **settings: Any) -> Result: ...
@overload
def invert(images: Sequence[Picture], *, method: str = ..., **settings: Any) -> list[Result]: ...
def invert(images: Picture | Sequence[Picture], *, method: str = "invert", **settings: Any) -> Result | list[Result]:
    """Which prompt makes this picture?

    Args:
        images: A picture, or several, which are searched together. With `one_subject=True` several get one prompt.
        method: `invert`, which is the best that we know, or `ph2p`, `ph2p_lbfgs`, `pez`, `gcg`, `textual_inversion`, `clip_words`
            or `random_tokens`.
        **settings: See `search`; settings of the method and of `ImagesToPrompts`.

    Returns:
        A result, or of several pictures a list of them in the same order.

    Raises:
        UserError: A picture or a setting cannot be used, or nothing was found for an only picture.
    """
    if method not in INVERTERS:
        raise UserError(f"The method {method!r} is none that inverts pictures; give one of {', '.join(INVERTERS)}.")
    alone = isinstance(images, Image.Image | str | Path)
    several: list[Picture] = [images] if isinstance(images, Image.Image | str | Path) else list(images)
    with tempfile.TemporaryDirectory() as scratch:
        files = [_file(picture, Path(scratch) / f"picture-{i}.png") for i, picture in enumerate(several)]
        once = list(dict.fromkeys(files))
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
    return _of_prompts("seed_invariance", prompts, {"target_seeds": [seed], **settings})


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
    chooser = choose if isinstance(choose, Chooser) else _Function(choose) if choose else Page()
    return _of_prompts("human_feedback", prompts, {"chooser": chooser, **settings})


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
    device: str | None = None,
    scores: Scores | None = None,
) -> list[Result]:
    """Searches as `train.py fit --config configs/NAME.yaml` does, without a command line, a logger or a page.

    It can run inside another Trainer's loop, whose modes, random numbers and process group it leaves alone.

    Args:
        config: The config's name, such as `ph2p`, whose settings are the default.
        settings: Settings of the method and its data by name, such as `backbone`, `tokens` or `steps`; `backbone` may be a name or
            what `load_backbone` has given, which saves loading it again.
        draw_seeds: Seeds that the results' pictures are drawn from.
        folder: Where the files that a run writes are kept; None for none.
        device: Where it computes, such as `cuda:1`; None for a GPU if there is one.
        scores: What scores the results, see `Scores`.

    Returns:
        A result a problem, in the order of the pictures or prompts; where nothing was found its prompt is empty, and its record says
        why.

    Raises:
        UserError: A setting cannot be used.
    """
    read = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    kind = getattr(methods, read["model"]["class_path"])
    data_kind: Any = {"Prompts": Prompts, "ImagesToPrompts": ImagesToPrompts}[read["data"]["class_path"]]
    how: dict[str, Any] = {**read["model"]["init_args"], **read["data"].get("init_args", {}), **settings}
    of_data = _settings_of(data_kind)
    known = of_data | _settings_of(kind)
    for name, value in how.items():
        _check(name, value, known)
    model = how.get("backbone", "emoji")
    if isinstance(model, str):  # what is recorded is the commit of a model from the hub, and the variant that is read
        how["revision"], variant = pinned(model, bool(how.get("offline")), how.get("revision"), how.get("variant"))
        how |= {"variant": variant} if variant else {}
    where = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _apart(where), tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        kept = RunFolder(folder or scratch)
        lock = held.enter_context(kept.locked()) if folder else None
        if any(kept.problems.glob("*.json")):
            raise UserError(f"The folder {str(folder)!r} holds an earlier search; give another.")
        method: PromptMethod = kind(**{name: value for name, value in how.items() if name not in of_data})
        data = data_kind(**{name: value for name, value in how.items() if name in of_data})
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
                Results(scores, settings={name: str(value) for name, value in how.items()}, tell=False),
            ],
            default_root_dir=folder or scratch,
        )
        trainer.fit(method, datamodule=data)
        method.to(where)  # which Lightning has left
        noise = noise_of(draw_seeds, method.backbone.latent_shape).to(where)
        records = data.folder.load()
        return [_result(method, records[key], noise) for key in data.keys]


def _result(method: Any, problem: Problem, noise: Tensor) -> Result:
    if problem.prompt is None or problem.status == "failed":
        return Result("", None, None, None, None, [], problem)
    pictures = [to_image(picture) for picture in method.draw_found(problem, noise)]
    embedding = told = away = None
    if isinstance(method, Steering):
        told, *more = method.found([problem])[0].cpu()
        away = more[0] if more else None
    elif isinstance(method, Inverter):
        embedding = method.embedded(problem).float().cpu()
    return Result(problem.prompt, problem.negative_prompt, embedding, told, away, pictures, problem)


def _of_prompts(config: str, prompts: str | Sequence[str], settings: dict[str, Any]) -> Result | list[Result]:
    several = [" ".join(prompt.split()) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if lists := [prompt for prompt in several if Path(prompt).suffix.lower() in (".txt", ".csv", ".jsonl")]:
        raise UserError(f"A prompt is a text and {lists[0]!r} a list of them; give what it holds.")
    found = _searched(config, {"prompts": several, **settings})
    if isinstance(prompts, str):
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


def _file(picture: Picture, scratch: Path) -> str:
    """The file of a picture, which is written if there is none."""
    if not isinstance(picture, Image.Image):
        if Path(picture).is_dir() or Path(picture).suffix.lower() in (".csv", ".jsonl"):
            raise UserError(
                f"A picture or its file is needed, and {str(picture)!r} is none; give the pictures that it holds."
            )
        return str(picture)
    kept = picture if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else picture.convert("RGB")
    kept.save(scratch, exif=picture.getexif())  # in which the orientation is
    return str(scratch)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch has been built without CUDA
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"The device {name!r} cannot be used ({reason}); give 'cpu', or 'cuda:0' if there is a GPU."
        ) from error


def _settings_of(kind: type) -> dict[str, str]:
    """The settings of a class, with their types as they are written."""
    own = [
        base for base in kind.__mro__ if base.__module__.startswith("lightning_prompts") and "__init__" in vars(base)
    ]
    return {
        name: str(parameter.annotation)
        for base in own
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if name not in ("self", "kwargs")
    }


def _check(name: str, value: Any, known: Mapping[str, str]) -> None:
    """Refuses what the command line would refuse."""
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(sorted(known))}."
        raise UserError(f"The setting {name!r} is unknown; {hint}")
    kind, _, others = known[name].partition(" | ")
    least = LEAST.get(kind)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is None and "None" in others:
        return
    if least is not None and not (whole and least <= value <= MOST):
        raise UserError(f"The setting {name!r} cannot be {value!r}; it takes a whole number from {least} on.")
    if kind == "Rate" and not (isinstance(value, Real) and 0 < float(value) < inf):
        raise UserError(f"The setting {name!r} cannot be {value!r}; it takes a finite number above 0.")


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
