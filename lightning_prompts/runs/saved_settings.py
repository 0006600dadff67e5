"""The settings of an earlier run, and its paths as seen from the current folder."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml

from lightning_prompts.data.shards import exists
from lightning_prompts.effort import Effort
from lightning_prompts.errors import UserError

PATHS = {  # settings that may name a file or folder
    *("images", "negative_images", "backbone", "config", "clip", "init", "dictionary", "encoder"),
    *("reference", "wants", "lpips_weights", "scorer", "language_model"),
}


class SavedSettings:
    """The `config.yaml` in which `fit` saved the settings of a run.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "config.yaml"

    def check(self) -> None:
        """Refuse a folder in which no run has begun.

        Raises:
            UserError: There are no saved settings.
        """
        if not self.file.exists():
            raise UserError(
                f"There is no run in {self.folder} (it has no config.yaml); give the folder of an earlier fit."
            )

    def load(self) -> dict[str, Any]:
        """Return the settings `model` and `data`, each with its `init_args`.

        Raises:
            UserError: There are no saved settings, or they cannot be read.
        """
        self.check()
        try:
            config = yaml.safe_load(self.file.read_bytes())
            return {part: {**config[part], "init_args": {**config[part]["init_args"]}} for part in ("model", "data")}
        except (yaml.YAMLError, KeyError, TypeError):
            raise UserError(f"{self.file} is not the config of a run; give the folder of an earlier fit.") from None

    @cached_property
    def origin(self) -> Path:
        """The folder in which `fit` ran, where relative paths of the settings and records start."""
        with suppress(OSError, UnicodeDecodeError):
            if start := re.match(r"# relative paths start at: (.+)\n", self.file.read_text(encoding="utf-8")):
                return self.folder / str(json.loads(start[1]))
        return Path()

    @property
    def effort(self) -> Effort:
        """The effort that scaled the length of the search, which the settings hold already."""
        found = re.search(r"(?m)^# effort: (light|heavy)$", self.file.read_text(encoding="utf-8"))
        return cast("Effort", found[1]) if found else "medium"

    def with_header(self, config: str, effort: Effort) -> str:
        """Add the origin and the effort to a config, as comments.

        The origin is the current folder relative to the run's folder, so that both can be moved together. The effort
        is no setting there, since the config has the scaled length.
        """
        start = os.path.relpath(Path.cwd(), self.folder.resolve())
        scaled = "" if effort == "medium" else f"# effort: {effort}\n"
        return f"# relative paths start at: {json.dumps(start)}\n{scaled}{config}"

    def located(self, path: str) -> str:
        """Convert a path of the settings or of a record to one that is relative to the current folder."""
        if os.path.isabs(path) or not self.origin.is_dir() or self.origin.resolve() == Path.cwd():
            return path
        from_here = os.path.relpath(self.origin / path)
        return path if exists(path) and not exists(from_here) else from_here

    def moved(self) -> dict[str, Any]:
        """Return the settings that name files or folders and whose paths differ as seen from the current folder."""
        config = yaml.safe_load(self.file.read_bytes())
        moved = self._changes({name: config[name] for name in PATHS & config.keys()})
        for part in ("model", "data"):
            if changes := self._changes(config[part]["init_args"]):
                moved |= {part: {"init_args": changes}}
        return moved

    def _changes(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {name: moved for name, value in settings.items() if (moved := self._moved(name, value)) != value}

    def _moved(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._moved(name if key == "name" else key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._moved(name, item) for item in value]
        if name not in PATHS or not isinstance(value, str) or value == "emoji":
            return value
        located = self.located(value)
        # A value without a file there may be a model's name or a text.
        return located if located != value and os.path.exists(located.partition("#")[0]) else value
