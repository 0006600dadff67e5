"""Settings of a frozen model, the group `--model.backbone` of the command line and of configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.hub import pinned
from lightning_prompts.backbones.loading import load_backbone
from lightning_prompts.backbones.memory import MemorySaving, save_memory
from lightning_prompts.setting_types import Positive


@dataclass(frozen=True)
class BackboneSettings:
    """Name a frozen model, and say how to load it and how to save memory.

    Args:
        name: `emoji`, a folder, a short name such as `sdxl`, a hub id, or a safetensors file.
        dtype: Precision of the frozen weights.
        offline: Do not connect to the hub.
        revision: Branch, tag or commit on the hub.
        vocabulary: The tokens to search, such as those of the `clip` or the `t5` encoders; None for the default of the
            model's family.
        scheduler: Class name of another diffusers scheduler; None for the model's own.
        image_size: Height and width of generated images, in pixels; None for the model's default.
        config: Model or folder with the configuration and tokenizers for a safetensors file; None for the first of its
            family.
        variant: Weights to read from a folder or repository, such as `fp16`; None for those without a variant or, if
            there are none, for the only one.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts, as in diffusers' pipelines of
            Stable Diffusion 1 to 3 and SDXL; negative prompts use all layers. None for all layers.
        save_memory: Ways to save memory: `gradient_checkpointing` recomputes activations in the backward pass instead
            of keeping them, `cpu_offload` keeps only one of the text encoders, the denoiser and the autoencoder on the
            device at a time, and `vae_tiling` decodes large images in tiles, which changes them a little.
    """

    name: str = "emoji"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    offline: bool = False
    revision: str | None = None
    vocabulary: str | None = None
    scheduler: str | None = None
    image_size: Positive | None = None
    config: str | None = None
    variant: str | None = None
    clip_skip: Positive | None = None
    save_memory: Sequence[MemorySaving] = ()

    def load(self) -> Backbone:
        """Load the model on the CPU.

        Raises:
            UserError: The model cannot be loaded with these settings.
        """
        backbone = load_backbone(
            self.name,
            self.dtype,
            self.offline,
            self.revision,
            self.vocabulary,
            self.scheduler,
            self.image_size and int(self.image_size),
            self.config,
            self.variant,
            self.clip_skip and int(self.clip_skip),
        )
        save_memory(backbone, self.save_memory)
        return backbone

    def pinned(self) -> BackboneSettings:
        """Return the settings with the commit and the variant that are read; download a hub's model if necessary."""
        revision, variant = pinned(self.name, self.offline, self.revision, self.variant)
        return replace(self, revision=revision, variant=variant)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    BackboneLike: TypeAlias = BackboneSettings | Backbone | DiffusionPipeline | str
else:
    BackboneLike = BackboneSettings  # the command line has no loaded models, and offers the settings one by one
