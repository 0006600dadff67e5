"""Read the defaults that a model's folder states in its metadata.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_prompts.errors import UserError


@dataclass(frozen=True)
class Metadata:
    """Defaults for a model; settings given by the user take precedence.

    Attributes:
        num_inference_steps: Sampling steps; None for the default of the family.
        guidance_scale: Guidance scale; None for the default of the family.
        scorer: Folder or hub id of the CLIP for held-out scores, as `--scorer`.
        dictionary: File of words, as `--dictionary`.
        synonyms: Synonyms of words in captions, which count as the words themselves in `word_recall`.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scorer: str | None = None
    dictionary: str | None = None
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be positive, got {self.num_inference_steps}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {self.guidance_scale}")


def read_metadata(name: str, folder: Path | None) -> Metadata:
    """Read the metadata.json of a model; without this file, and for models that are not a folder, nothing is set.

    Relative paths start at the model's folder. Unknown keys are ignored.

    Args:
        name: The model's name, for messages.
        folder: The model's folder; None for models that are not one.

    Raises:
        UserError: The file cannot be read, or a value has another type or is out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    if folder is None or not (file := folder / "metadata.json").is_file():
        return Metadata()
    try:
        metadata = TypeAdapter(Metadata).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"][:1])
        raise UserError(
            f"The metadata.json of the model {name!r} cannot be used ({where}{first['msg']}); correct or remove it."
        ) from error
    except OSError as error:
        raise UserError(
            f"The metadata.json of the model {name!r} cannot be read ({error.strerror}); make it readable or remove it."
        ) from error
    return replace(metadata, scorer=_path(folder, metadata.scorer), dictionary=_path(folder, metadata.dictionary))


def _path(folder: Path, name: str | None) -> str | None:
    """Return the path of a file or folder named relative to `folder`, and other names such as hub ids unchanged."""
    path = os.path.normpath(folder / name) if name else None
    return path if path and os.path.exists(path) else name
