"""Search from Python, as the command line does, and return the results in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from lightning_prompts import methods
from lightning_prompts.backbones import Backbone, BackboneSettings
from lightning_prompts.callbacks import Results, Scores
from lightning_prompts.effort import Effort, scale_length
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.isolation import isolated
from lightning_prompts.methods import PromptMethod
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.steering.base import Steering
from lightning_prompts.optimizers import check_optimizer, describe_optimizer
from lightning_prompts.python_settings import checked_settings, in_python
from lightning_prompts.python_values import check_type, plain, shown
from lightning_prompts.runner import TRAINER_DEFAULTS, build_trainer, held_folder, run_callbacks
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.runs.record import MethodResult, Problem
from lightning_prompts.sampling.figures import to_image
from lightning_prompts.sampling.seeding import check_seeds, noise_of
from lightning_prompts.text_settings import all_settings, settings_of_group

_PACKAGE = Path(__file__).parent
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
"""Folder of the configs: in an installed package, or in a checkout."""


@dataclass(frozen=True)
class Result:
    """The result for an image or a prompt.

    Attributes:
        prompt: The prompt; for methods that optimize embeddings, the placeholder of the embedding or the user's prompt.
        negative_prompt: The negative prompt, if the method searches one.
        embedding: Embeddings of the prompt's tokens, (M, D), if the method searches tokens or their embeddings.
        prompt_embeds: The encoded prompt (R, D), if the method optimizes it.
        negative_prompt_embeds: The encoded negative prompt (R, D), if the method optimizes it.
        images: Images generated from the result, one per seed of `image_seeds`.
        record: The record of the search; see docs/results.md.
    """

    prompt: str
    negative_prompt: str | None
    embedding: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    images: list[Image.Image]
    record: Problem

    @property
    def details(self) -> MethodResult:
        """Return the fields that only this method records, such as `metric_after` of `metric_guidance`."""
        return MethodResult.of(self.record)


def search(
    config: str,
    settings: Mapping[str, Any],
    *,
    image_seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    scores: Scores | None = None,
    effort: Effort = "medium",
) -> list[Result]:
    """Search as `train.py fit --config configs/NAME.yaml` does, without command line, logger or output.

    A call may be made inside the loop of another Trainer, whose modes, random state and process group stay as they are.

    Args:
        config: Name of the config whose settings are the defaults, such as `ph2p`.
        settings: Settings of the method and its data by name, such as `backbone`, `num_tokens` or `steps`. `backbone`
            is a name, a dictionary or `BackboneSettings` to load a model, a diffusers pipeline, which stays unchanged,
            or the result of `load_backbone`, which several calls can share. `sampler` is a dictionary or
            `SamplerSettings`.
        image_seeds: Seeds of the results' images.
        folder: Folder to keep the files of the run in, which must not hold a run; None to keep none.
        device: Device of the search, such as `cuda:1`; None for a GPU if there is one.
        scores: The scores of the results, see `Scores`.
        effort: Length of the search: a third of that of the settings (`light`), or three times as much (`heavy`).

    Returns:
        A result per problem, in the order of the images or prompts. Without success its prompt is empty, and its record
        has the reason.

    Raises:
        UserError: A setting cannot be used.
    """
    image_seeds = plain("image_seeds", image_seeds)
    _check_arguments(config, settings, image_seeds, scores, effort)
    where = _device(device)
    read = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    kind = getattr(methods, read["model"]["class_path"])
    data_kind: Any = {"Prompts": Prompts, "ImagesToPrompts": ImagesToPrompts}[read["data"]["class_path"]]
    defaults = {**read["model"]["init_args"], **read["data"].get("init_args", {})}
    with (
        python_messages(),
        isolated(where),
        tempfile.TemporaryDirectory() as scratch,
        _prepared(folder) as (kept, lock),
    ):
        of_method, of_data = checked_settings((kind, data_kind), defaults, settings)
        of_method |= scale_length(effort, kind, of_method, settings)
        if scores:
            (texts,) = checked_settings((Scores,), {}, asdict(scores))
            scores = Scores(**texts)
            scores.check(of_method["backbone"].offline)
        if isinstance(of_method["backbone"], BackboneSettings):
            of_method["backbone"] = of_method["backbone"].pinned()  # so that the record names the weights that are read
        method: PromptMethod = kind(**of_method)
        data = data_kind(**of_data)
        hints = all_settings(kind) | all_settings(data_kind)
        recorded = {name: _recorded(name, value, hints[name]) for name, value in (of_method | of_data).items()}
        trainer = _trainer(where, kept or scratch, lock, Results(scores, settings=recorded, report=False))
        trainer.fit(method, datamodule=data)
        method.to(where)  # Lightning has moved it to the CPU
        noise = noise_of(image_seeds, method.backbone.latent_shape).to(where)
        records = data.folder.load()
        return [_result(method, records[key], noise) for key in data.keys]


def _recorded(name: str, setting: Any, hint: Any) -> Any:
    """Return a setting with a type hint as it is written to the results' file."""
    if name == "optimizer" and setting:
        return describe_optimizer(check_optimizer(setting, closure=True))
    if settings_of_group(hint) and isinstance(setting, hint):
        return asdict(setting)
    return setting.name if isinstance(setting, Backbone) else str(setting)


def _check_arguments(config: Any, settings: Any, image_seeds: Any, scores: Any, effort: Any) -> None:
    """Refuse arguments of `search` that are of another type or unknown."""
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if not isinstance(config, str) or config not in names:
        raise UserError(f"The config {shown(config)} is unknown; give one of {', '.join(names)}.")
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"Settings cannot be {shown(settings)}; give a dictionary whose keys are names of settings.")
    if scores is not None and not isinstance(scores, Scores):
        raise UserError(f"The setting scores cannot be {shown(scores)}; it takes a Scores or None.")
    check_type("effort", effort, Effort)
    check_type("image_seeds", image_seeds, list[int])
    check_seeds("image_seeds", image_seeds)


def _trainer(device: torch.device, folder: str | Path, lock: RunLock | None, results: Results) -> pl.Trainer:
    """Build a Trainer on one device, whatever a launcher of the surrounding program says."""
    settings = TRAINER_DEFAULTS | {
        "accelerator": device.type,
        "devices": [device.index or 0] if device.type != "cpu" else 1,
        "strategy": SingleDeviceStrategy(device),
        "logger": False,
        "default_root_dir": folder,
    }
    return build_trainer(settings, run_callbacks(lock, results))


@contextmanager
def python_messages() -> Iterator[None]:
    """Name settings as Python arguments in error messages."""
    try:
        yield
    except UserError as error:
        raise UserError(in_python(str(error))) from error


@contextmanager
def _prepared(folder: str | Path | None) -> Iterator[tuple[Path | None, RunLock | None]]:
    """Hold and prepare the folder of a run; see `held_folder` for one that is new."""
    if folder is None:
        yield None, None
        return
    path = plain("folder", folder)
    check_type("folder", path, str | None)
    if not path.strip() or "\0" in path:
        raise UserError(f"The setting folder cannot be {path!r}; give the name of a folder, or None to keep no files.")
    run = RunFolder(path)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(held_folder(run))
            run.prepare(resume=False, search=False)
        except UserError as error:
            raise UserError(str(error).replace("--run", "folder")) from error
        except OSError as error:  # such as of a name that is too long
            raise UserError(
                f"The folder {shown(path)} cannot be used ({error.strerror}); give another folder."
            ) from error
        yield run.path, lock


def _result(method: PromptMethod, problem: Problem, noise: Tensor) -> Result:
    """Return the result of a problem, with images generated from noise (N, C, h, w)."""
    method.result_class.of(problem)  # so that `details` have the class of the method even without any record of it
    problem.reason = problem.reason and in_python(problem.reason)
    if problem.prompt is None or problem.status == "failed":
        return Result("", None, None, None, None, [], problem)
    images = [to_image(image) for image in method.generate_best(problem, noise)]
    embedding = prompt_embeds = negative_prompt_embeds = None
    if isinstance(method, Steering):
        prompt_embeds, *negative = method.best_embeds_of([problem])[0].cpu()
        negative_prompt_embeds = negative[0] if negative else None
    elif isinstance(method, Inverter):
        embedding = method.embeddings_of(problem).float().cpu()
    return Result(
        problem.prompt, problem.negative_prompt, embedding, prompt_embeds, negative_prompt_embeds, images, problem
    )


def _device(device: str | torch.device | None) -> torch.device:
    """Return a device that exists, with its index.

    Raises:
        UserError: It does not exist, or no search runs there.
    """
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
