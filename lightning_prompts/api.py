"""The searches as Python calls, to build into other programs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from lightning_prompts.backbones import Backbone
from lightning_prompts.data.images import MIN_SIDE, load_image
from lightning_prompts.data.prompts import find_prompts
from lightning_prompts.data.targets import find_targets
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.human_feedback import Choice, Chooser, Page, Round
from lightning_prompts.objectives import Objective
from lightning_prompts.python_images import ImageInput, image_file, negative_image_files
from lightning_prompts.python_search import Result, python_messages, search
from lightning_prompts.python_values import check_type, plain, shown
from lightning_prompts.sampling.seeding import check_seeds

INVERSION_CONFIGS = (
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


@overload
def invert(images: ImageInput, *, method: str = ..., **settings: Any) -> Result: ...
@overload
def invert(images: Sequence[ImageInput], *, method: str = ..., **settings: Any) -> list[Result]: ...
def invert(
    images: ImageInput | Sequence[ImageInput], *, method: str = "invert", **settings: Any
) -> Result | list[Result]:
    """Search prompts that generate given images.

    Args:
        images: An image (a PIL image, an array, a tensor or a file), or a list of images, which are searched together.
            With `one_subject=True`, all of them get one prompt.
        method: `invert` (recommended), `ph2p`, `ph2p_lbfgs`, `pez`, `pez_clip`, `gcg`, `textual_inversion`,
            `clip_words` or `random_tokens`.
        **settings: Arguments of `search`, and settings of the method and of `ImagesToPrompts`.

    Returns:
        A result, or for a list of images a list of results in the same order.

    Raises:
        UserError: An image or a setting cannot be used, or no prompt was found for a single image.
    """
    if not isinstance(method, str) or method not in INVERSION_CONFIGS:
        raise UserError(f"The method cannot be {shown(method)}; give one of {', '.join(INVERSION_CONFIGS)}.")
    single = not isinstance(images, list | tuple | Iterator) or hasattr(images, "read")  # an open file is an iterator
    given: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        names = ["images"] if single else [f"images[{i}]" for i in range(len(given))]
        files = [image_file(image, name, Path(scratch)) for image, name in zip(given, names, strict=True)]
        if single:
            load_image(files[0], MIN_SIDE)
        if (negative := settings.get("negative_images")) is not None:
            settings["negative_images"] = negative_image_files(negative, Path(scratch))
        unique = list(dict.fromkeys(files))
        find_targets(unique)  # refuse missing images before a model is loaded
        results = _search(method, {"images": unique, **settings})
    if single or settings.get("one_subject"):
        return _only(results)
    return [results[unique.index(file)] for file in files]


@overload
def dpo_diff(prompts: str, *, task: Literal["improve", "attack"] = ..., **settings: Any) -> Result: ...
@overload
def dpo_diff(prompts: Sequence[str], *, task: Literal["improve", "attack"] = ..., **settings: Any) -> list[Result]: ...
def dpo_diff(
    prompts: str | Sequence[str], *, task: Literal["improve", "attack"] = "improve", **settings: Any
) -> Result | list[Result]:
    """Replace words of prompts, to improve or to attack them, by DPODiff.

    Args:
        prompts: A prompt, or a list of prompts.
        task: `improve`, by default with a negative prompt, or `attack`.
        **settings: Arguments of `search`, and settings of `DPODiff` and of `Prompts`.

    Returns:
        A result, or for a list of prompts a list of results in the same order.

    Raises:
        UserError: A prompt or a setting cannot be used, or the search for a single prompt failed.
    """
    return _search_prompts("dpo_diff", prompts, {"task": task, **settings})


@overload
def metric_guidance(prompts: str, objective: Objective | list[Objective], **settings: Any) -> Result: ...
@overload
def metric_guidance(
    prompts: Sequence[str], objective: Objective | list[Objective], **settings: Any
) -> list[Result]: ...
def metric_guidance(
    prompts: str | Sequence[str], objective: Objective | list[Objective], **settings: Any
) -> Result | list[Result]:
    """Optimize encoded prompts, so that their images score higher on a metric.

    Args:
        prompts: A prompt, or a list of prompts.
        objective: The metric, such as `lightning_prompts.objectives.Sharpness()`, or a list of metrics.
        **settings: Arguments of `search`, and settings of `MetricGuidance` and of `Prompts`.

    Returns:
        A result, or for a list of prompts a list of results in the same order.

    Raises:
        UserError: A prompt or a setting cannot be used, or the search for a single prompt failed.
    """
    return _search_prompts("metric_guidance", prompts, {"objective": objective, **settings})


@overload
def seed_invariance(prompts: str, seed: int = ..., **settings: Any) -> Result: ...
@overload
def seed_invariance(prompts: Sequence[str], seed: int = ..., **settings: Any) -> list[Result]: ...
def seed_invariance(prompts: str | Sequence[str], seed: int = 0, **settings: Any) -> Result | list[Result]:
    """Optimize encoded prompts, so that every seed generates the image of one seed.

    Args:
        prompts: A prompt, or a list of prompts.
        seed: The seed of the image to reproduce.
        **settings: Arguments of `search`, and settings of `SeedInvariance` and of `Prompts`.

    Returns:
        A result, or for a list of prompts a list of results in the same order.

    Raises:
        UserError: A prompt or a setting cannot be used, or the search for a single prompt failed.
    """
    if "target_seeds" in settings:
        raise UserError(
            "seed_invariance takes seed instead of target_seeds; give such as seed=7, and call again for another seed."
        )
    seed = plain("seed", seed)
    check_type("seed", seed, int)
    check_seeds("seed", [seed])
    return _search_prompts("seed_invariance", prompts, {**settings, "target_seeds": [seed]})


@overload
def human_feedback(
    prompts: str, choose: Callable[[Round], Choice] | Chooser | None = ..., **settings: Any
) -> Result: ...
@overload
def human_feedback(
    prompts: Sequence[str], choose: Callable[[Round], Choice] | Chooser | None = ..., **settings: Any
) -> list[Result]: ...
def human_feedback(
    prompts: str | Sequence[str], choose: Callable[[Round], Choice] | Chooser | None = None, **settings: Any
) -> Result | list[Result]:
    """Optimize encoded prompts by a user's choices among images.

    Args:
        prompts: A prompt, or a list of prompts, which are searched one after the other.
        choose: Function that returns the choice of each round of images; None to open a web page.
        **settings: Arguments of `search`, and settings of `HumanFeedback` and of `Prompts`.

    Returns:
        A result, or for a list of prompts a list of results in the same order.

    Raises:
        UserError: A prompt or a setting cannot be used, or the search for a single prompt failed.
    """
    if "chooser" in settings:
        raise UserError("human_feedback takes choose instead of chooser; give the Chooser as choose.")
    if choose is not None and not isinstance(choose, Chooser) and (isinstance(choose, type) or not callable(choose)):
        raise UserError(
            f"The setting choose cannot be {shown(choose)}; it takes a function that returns a Choice, a Chooser, or "
            "None."
        )
    chooser = choose if isinstance(choose, Chooser) else _FunctionChooser(choose) if choose else Page()
    return _search_prompts("human_feedback", prompts, {**settings, "chooser": chooser})


class _FunctionChooser(Chooser):
    """A chooser that calls a function."""

    def __init__(self, function: Callable[[Round], Choice]) -> None:
        self.function = function

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Do nothing: a function needs no preparation."""

    def choose(self, question: Round) -> Choice:
        """Return the function's choice."""
        return self.function(question)

    def close(self, message: str) -> None:
        """Do nothing: there is nothing to close."""


def _search_prompts(config: str, prompts: str | Sequence[str], settings: dict[str, Any]) -> Result | list[Result]:
    """Search for a prompt or several; equal prompts share a result."""
    given = plain("prompts", prompts)
    check_type("prompts", given, str | list[str])
    texts = [" ".join(prompt.split()) for prompt in ([given] if isinstance(given, str) else given)]
    if files := [text for text in texts if Path(text).suffix.lower() in (".txt", ".csv", ".jsonl")]:
        raise UserError(f"A prompt must be a text, got the file {files[0]!r}; give the prompts in it as a list.")
    with python_messages():
        find_prompts(texts)  # refuse empty prompts before a model is loaded
    results = _search(config, {"prompts": texts, **settings})
    if isinstance(given, str):
        return _only(results)
    by_prompt = {result.record.target: result for result in results}
    return [by_prompt[text] for text in texts]


def _search(config: str, settings: dict[str, Any]) -> list[Result]:
    """Call `search` with its own arguments taken out of the settings."""
    names = ("image_seeds", "folder", "device", "scores", "effort")
    own = {name: settings.pop(name) for name in names if name in settings}
    return search(config, settings, **own)


def _only(results: list[Result]) -> Result:
    """Return the only result.

    Raises:
        UserError: It has no prompt.
    """
    (result,) = results
    if not result.prompt:
        raise UserError(str(result.record.reason))
    return result
