"""The families of models, those of other packages included."""

from __future__ import annotations

from functools import cache

from lightning_prompts.backbones.base import _FAMILIES, Backbone
from lightning_prompts.backbones.flux import Flux
from lightning_prompts.backbones.pixart import PixArt
from lightning_prompts.backbones.sd3 import StableDiffusion3
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_prompts.entry_points import load_entry_points

OWN = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt)
ENTRY_POINTS = "lightning_prompts.families"
"""The entry points by which other packages name their families."""


def families() -> dict[str, type[Backbone]]:
    """Return the family of each supported diffusers pipeline.

    To add a family, define a subclass of `Backbone`. In Python it is supported from then on; a package that names the
    class in its pyproject.toml also adds it to the command line:

    ```toml
    [project.entry-points."lightning_prompts.families"]
    my_family = "my_package.my_module:MyFamily"
    ```
    """
    _import_others()
    own: dict[str, type[Backbone]] = {pipeline: family for family in OWN for pipeline in family.pipelines}
    return own | _FAMILIES


def known_embedding_keys() -> dict[str, str]:
    """Return the embedding keys of the text encoders of all families, by all names that files have for them."""
    specs = [spec for family in families().values() for spec in family.text_encoder_specs]
    return {key: spec.embedding_key for spec in specs for key in (spec.embedding_key, *spec.other_keys)}


@cache
def _import_others() -> None:
    """Import the families of other packages, which registers them."""
    for _ in load_entry_points(ENTRY_POINTS, "family"):
        pass
