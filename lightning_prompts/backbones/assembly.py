"""From the components of a model to its backbone, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_prompts.backbones.base import Backbone
from lightning_prompts.backbones.schedulers import check_noise_levels
from lightning_prompts.backbones.text_encoders import TextEncoder, TextEncoderSpec
from lightning_prompts.errors import UserError, shortened


class Components(NamedTuple):
    """The components of a model.

    Attributes:
        text_encoders: The text encoders in the order of the family's specs, without optional ones that are absent.
        denoiser: The denoiser.
        vae: The autoencoder.
        scheduler: The model's own scheduler.
        replacement: The scheduler to sample with; None for the model's own.
    """

    text_encoders: Sequence[TextEncoder]
    denoiser: Any
    vae: Any
    scheduler: Any
    replacement: Any


def assemble(
    family: type[Backbone],
    name: str,
    components: Components,
    config: Mapping[str, Any],
    vocabulary: str | None,
    image_size: int | None,
    clip_skip: int | None,
) -> Backbone:
    """Build the backbone of a model. Its networks are changed in place.

    Args:
        family: The model's family.
        name: The model's name.
        components: Its components.
        config: The config of its pipeline.
        vocabulary: Kind of the text encoders whose tokens are searched; None for the family's default.
        image_size: Height and width of generated images, in pixels; None for the size that the model was trained on.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts; None for all layers.
    """
    import diffusers

    texts, denoiser, vae, own, other = components
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        denoiser.to(memory_format=torch.channels_last)  # convolutions are up to 8% faster, see docs/speed.md
    vae.to(memory_format=torch.channels_last)
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):  # SDXL's overflows in half precision
        vae.float()
    zero_empty = family.zeroes_empty and bool(config.get("force_zeros_for_empty_prompt", True))
    backbone = family(name, texts, denoiser, vae, own, vocabulary, image_size, zero_empty, clip_skip)
    if other is not None:
        backbone.replace_scheduler(other)
    return backbone


def check_clip_skip(family: type[Backbone], pipeline: str, name: str, clip_skip: int | None) -> None:
    """Refuse to skip layers in families whose pipelines cannot."""
    if clip_skip is not None and not family.supports_clip_skip:
        raise UserError(
            f"--model.backbone.clip_skip is not supported by the {pipeline} of the model {name!r}, got {clip_skip}; "
            "leave it out."
        )


def check_vocabulary(family: type[Backbone], name: str, vocabulary: str | None) -> None:
    """Refuse to search a vocabulary that no text encoder of a family has."""
    kinds = dict.fromkeys(spec.kind for spec in family.text_encoder_specs)
    if vocabulary is not None and vocabulary not in kinds:
        raise UserError(
            f"--model.backbone.vocabulary must be {' or '.join(kinds)} for the model {name!r}, got "
            f"{shortened(vocabulary)!r}; change it, or leave it out."
        )


def prepared_scheduler(family: type[Backbone], pipeline: str, scheduler: Any) -> Any:
    """Return a model's scheduler with its config corrected as its pipeline does; refuse unsupported noise levels."""
    check_noise_levels(scheduler)
    family.correct_scheduler(pipeline, scheduler)
    return scheduler


def read_tokenizer(folder: Path, spec: TextEncoderSpec) -> Any:
    """Load a text encoder's tokenizer from a model's folder."""
    import transformers
    from tokenizers import normalizers

    files = {path.name for path in (folder / spec.tokenizer).glob("*")}
    # Without these files, transformers would create an empty tokenizer.
    if "tokenizer.json" not in files and not set(spec.tokenizer_files) <= files:
        raise ValueError(f"it has neither tokenizer.json nor {' with '.join(spec.tokenizer_files)}")
    try:
        tokenizer = getattr(transformers, spec.tokenizer_class).from_pretrained(folder, subfolder=spec.tokenizer)
    except Exception as error:  # for broken files, tokenizers raises a plain Exception
        raise ValueError(str(error)) from error
    if spec.lowercase:
        backend = tokenizer.backend_tokenizer
        before = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *before])
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silence hints, loading bars and lists of unused weights of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
