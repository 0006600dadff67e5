"""Check the settings of a command before any model is loaded, which may take minutes."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from math import isfinite
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import Namespace

from lightning_prompts.backbones.embedding_files import split_name
from lightning_prompts.data.prompts import find_prompts
from lightning_prompts.data.targets import check_sources, find_targets
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.init import looks_like_file
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.text_settings import all_settings, settings_of_group, with_groups

CHANGEABLE = {
    "chooser",
    "images",
    "prompts",
    "steps",
    "patience",
    "batch_size",
    "workers",
    "retry",
    "microbatch",
    "backbone.save_memory",
    "backbone.offline",
    "score_every_n_steps",
    "log_images_every_n_steps",
    "sampler.num_inference_steps",
}
"""Settings that may change when a search resumes."""


def class_of(path: str) -> Any:
    """Return the class that a `class_path` names, which the parser has imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_values(config: Any) -> None:
    """Refuse null where a setting does not take it, and numbers that are not finite: the parser accepts both.

    Args:
        config: All settings of a command.

    Raises:
        UserError: A setting of the method or of its data is null or not finite.
    """
    for part in ("model", "data"):
        hints = dict(with_groups(all_settings(class_of(config[part].class_path))))
        for name, value in vars(config[part].init_args.as_flat()).items():
            setting = name.replace(".init_args.", ".")
            hint = hints.get(setting, Any)
            if value is None and hint is not Any and NoneType not in get_args(hint):
                raise UserError(f"The setting --{part}.{setting} cannot be null; give a value, or leave it out.")
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"The setting --{part}.{setting} cannot be {value}; it takes a finite number.")


def check_inputs(config: Any) -> None:
    """Refuse inputs that do not exist.

    Args:
        config: All settings of a command.

    Raises:
        UserError: There is no such image or prompt, or no file to start from or to take words from.
    """
    data, model = config.data.init_args, config.model.init_args
    if "prompts" in data:
        find_prompts(_as_list(data.prompts))
    else:
        check_sources(_as_list(data.images))
        if data.negative_images:
            check_sources(_as_list(data.negative_images))
    init, dictionary = model.get("init"), model.get("dictionary", "")
    if init and looks_like_file(init) and not os.path.exists(split_name(init)[0]):
        raise UserError(f"--model.init {init!r} is neither a run nor a file of embeddings; check the path.")
    if dictionary.endswith(".json") and not os.path.isfile(dictionary):
        raise UserError(f"There is no file {dictionary!r}; check --model.dictionary.")


def count_problems(data: Namespace) -> int:
    """Return the number of problems that inputs make up, or a lower bound where they are in shards.

    Args:
        data: Class and settings of the data module.
    """
    settings = data.init_args
    if data.class_path.rpartition(".")[2] == Prompts.__name__:
        return len(find_prompts(_as_list(settings.prompts)))
    return len(find_targets(_as_list(settings.images), settings.one_subject))


def check_resumable(folder: RunFolder, config: str) -> None:
    """Refuse to resume a search under settings that would give other results than one search under the same settings.

    Args:
        folder: Folder of the run.
        config: The settings to resume with, as YAML.

    Raises:
        UserError: Settings other than `CHANGEABLE` differ from those that the run started with.
    """
    saved, given = folder.saved.load(), yaml.safe_load(config)
    changeable = CHANGEABLE - class_of(given["model"]["class_path"]).decisive
    differences: list[tuple[str, str, str]] = []
    for part in ("model", "data"):
        hints = all_settings(class_of(given[part]["class_path"]))
        old, new = (
            _flat(run[part]["init_args"], hints) | {"class_path": run[part].get("class_path")} for run in (saved, given)
        )
        for name in sorted(old.keys() & new.keys() - changeable):
            if old[name] != new[name]:
                setting = f"--{part}" if name == "class_path" else f"--{part}.{name}"
                differences.append((setting, json.dumps(old[name]), json.dumps(new[name])))
    if differences:
        started = ", ".join(f"{setting} {old}" for setting, old, _ in differences)
        wanted = ", ".join(new for *_, new in differences)
        raise UserError(
            f"The run in {folder.path} was started with {started} and cannot resume with {wanted}; give the former, or "
            "another --run."
        )


def _flat(settings: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name, those of a group as `backbone.dtype`, given the type hints of all settings."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "optimizer" and value:
            flat |= {name: value["class_path"]} | {
                f"{name}.{inner}": each for inner, each in value["init_args"].items()
            }
            continue
        group = settings_of_group(hints.get(name))
        flat |= {f"{name}.{inner}": value[inner] for inner in value} if group else {name: value}
    return flat


def _as_list(inputs: str | list[str]) -> list[str]:
    return [inputs] if isinstance(inputs, str) else inputs
