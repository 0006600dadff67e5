"""Reads models, from a folder or the hub, as the family that their model_index.json names."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_prompts.backbones.base import Backbone, Reads
from lightning_prompts.backbones.flux import Flux
from lightning_prompts.backbones.hub import EMOJI, find_model, local_file, variants_in
from lightning_prompts.backbones.pixart import PixArt
from lightning_prompts.backbones.sd3 import StableDiffusion3
from lightning_prompts.backbones.single_file import as_stated, find_configuration, read_header, read_single_file
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_prompts.backbones.towers import Kind, TextTower
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["EMOJI", "FAMILIES", "load_backbone", "quiet"]

FAMILIES: dict[str, type[Backbone]] = {
    pipeline: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt)
    for pipeline in family.pipelines
}
"""The family of each of diffusers' pipelines that can be read."""


def load_backbone(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    offline: bool = False,
    revision: str | None = None,
    vocabulary: Kind | None = None,
    scheduler: str | None = None,
    image_size: int | None = None,
    config: str | None = None,
    variant: str | None = None,
    clip_skip: int | None = None,
) -> Backbone:
    """Loads a model, on the CPU.

    Weights are read from safetensors only, since pickles can run code. The safety checker is not loaded.

    Args:
        name: `emoji` for the embedded model, a folder, a short name such as `sdxl`, a model on the Hugging Face hub as
            `owner/name`, or a safetensors file of Stable Diffusion 1, 2 or XL in their original layout.
        dtype: Precision of the networks, whatever the files' is.
        offline: Use downloaded files only, as the environment variable HF_HUB_OFFLINE=1 does.
        revision: Branch, tag or commit on the hub.
        vocabulary: Whose tokens are searched, the `clip` or the `t5` encoders'; None for the family's choice.
        scheduler: Class of another scheduler of diffusers; None for the model's own.
        image_size: Height and width, in pixels, of what is drawn; None for what the model was trained on.
        config: The model or folder whose configuration and tokenizers go with a file; None for the first of its family. What the
            file states of its prediction type and noise levels goes before it.
        variant: Which of a folder's or repository's weights are read, such as `fp16`, by components that have it; None for those
            without a variant or, where there are none, for the only one.
        clip_skip: How many of the CLIP text encoders' last layers are skipped when a prompt is encoded, as in diffusers' pipelines;
            a negative prompt is encoded with all layers. None for all layers.
    """
    import diffusers

    checkpoint, variants = None, dict[str, str | None]()
    if file := local_file(name):
        if variant:
            raise UserError(f"The model {name!r} is a file, which has no variants; leave out --model.variant.")
        checkpoint = read_header(file)
        folder = find_configuration(checkpoint, config, offline, revision)
    elif config:
        raise UserError(f"The model {name!r} has a configuration and is no file; leave out --model.config.")
    else:
        folder = find_model(name, offline, revision, variant=variant)
        variants = _variants(name, folder, variant)
    family, index = _check(config or name, folder, None if checkpoint else variants)
    pipeline: str = index["_class_name"]
    if clip_skip is not None and not family.takes_clip_skip:
        raise UserError(
            f"The {pipeline} of the model {name!r} skips no layers of its text encoders, and --model.clip_skip {clip_skip} was given; "
            "leave it out."
        )
    part, kind = family.denoises
    towers = []
    with quiet():
        if checkpoint:
            with _unreadable(name, "networks", "fetch it again or give a model that describes it as --model.config"):
                networks = read_single_file(checkpoint, folder, index, set(components(family)), dtype)

        def network(part: str, kind: str, **changed: Any) -> Any:
            return networks[part] if checkpoint else _read(folder, part, kind, dtype, variants[part], **changed)

        with _unreadable(name, "scheduler"):
            own = _read_scheduler(index["scheduler"][1], folder, pipeline)
        if checkpoint:
            own = as_stated(own, checkpoint)
        other = _replaced(own, scheduler, name) if scheduler else None
        for reads in family.reads:
            if index.get(reads.part, (None, None))[1]:
                with _unreadable(name, reads.tokenizer):
                    tokenizer = _read_tokenizer(folder, reads)
                with _unreadable(name, reads.part):
                    encoder = network(reads.part, reads.network)
                    towers.append(TextTower(tokenizer, encoder, *reads[2:6]))
        with _unreadable(name, part):
            denoiser = network(part, kind, **_size_of_positions(folder / part, name))
            _correct_sample_size(denoiser, pipeline)
        with _unreadable(name, "vae"):
            vae = network("vae", "AutoencoderKL")
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        denoiser.to(memory_format=torch.channels_last)  # in which convolutions are a tenth to a fifth faster
    vae.to(memory_format=torch.channels_last)
    if dtype == "float16" and vae.config.get("force_upcast"):  # SDXL's leaves the range of half precision
        vae.float()
    # The key is SDXL's alone, and true where it is absent.
    zero_empty = pipeline == "StableDiffusionXLPipeline" and bool(index.get("force_zeros_for_empty_prompt", True))
    backbone = family(name, towers, denoiser, vae, own, vocabulary, image_size, zero_empty, clip_skip)
    if other is not None:
        backbone.replace_scheduler(other)
    if name == "emoji":
        backbone.default_steps, backbone.default_guidance = 25, 3.0  # docs/emoji.md
    return backbone


@contextmanager
def _unreadable(name: str, part: str, advice: str = "fetch or write the model again") -> Iterator[None]:
    """Makes a sentence of what the libraries say of a broken component."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .:") or type(error).__name__
        raise UserError(f"The {part} of the model {name!r} cannot be read ({reason}); {advice}.") from error


def _variants(name: str, folder: Path, variant: str | None) -> dict[str, str | None]:
    """Choose the weights of each component, and say what was not asked for."""
    chosen, read = variants_in(name, folder, variant)
    if without := [part for part, own in read.items() if own != chosen]:
        log.info("Of the model %r, %s has no variant %r and is read without one.", name, ", ".join(without), chosen)
    return read


def _check(name: str, folder: Path, weights: Mapping[str, str | None] | None) -> tuple[type[Backbone], dict[str, Any]]:
    """Refuses what is not a supported pipeline in safetensors; gives its family and its index.

    Args:
        name: The model, for messages.
        folder: Where it is.
        weights: The components of which weights were found, by variant; None if the folder needs none.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"The model {name!r} has no model_index.json; give a folder that a diffusers pipeline's `save_pretrained` wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pipeline: str = index["_class_name"]
        family = FAMILIES.get(pipeline)
        parts = components(family) if family else {}
        found = {part: (index.get(part) or (None, None))[1] for part in parts}
        index["scheduler"][1]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"The model_index.json of the model {name!r} is not a pipeline's; fetch or write it again."
        ) from error
    if not family:
        raise UserError(
            f"The model {name!r} is a {pipeline}, and what can be read is {', '.join(FAMILIES)}; choose another."
        )
    optional = {reads.part for reads in family.reads if reads.optional}
    for part, (supported, stem) in parts.items():
        if found[part] is None and part in optional:
            continue
        if found[part] is None:
            raise UserError(
                f"The model {name!r} has no {part}, which every {pipeline} needs; fetch or write the whole model again."
            )
        if found[part] != supported:
            raise UserError(
                f"The {part} of the model {name!r} is a {found[part]}; only {supported} is supported, choose another."
            )
        file = folder / part / f"{stem}.safetensors"
        if weights is None or part in weights:
            continue
        if any(other.suffix in (".bin", ".ckpt") for other in file.parent.glob("*")):
            raise UserError(
                f"The model {name!r} has no {part}/{file.name}, and pickle weights (.bin, .ckpt) are refused because they "
                "can run code; convert it with `save_pretrained(folder, safe_serialization=True)`."
            )
        raise UserError(f"The model {name!r} has no {part}/{file.name}; fetch or write the whole model again.")
    return family, index


def components(family: type[Backbone]) -> dict[str, tuple[str, str]]:
    """The networks of a family: by component its class and the stem of its files."""
    part, kind = family.denoises
    texts = {reads.part: (reads.network, "model") for reads in family.reads}
    return {**texts, part: (kind, "diffusion_pytorch_model"), "vae": ("AutoencoderKL", "diffusion_pytorch_model")}


def _read(folder: Path, part: str, kind: str, dtype: str, variant: str | None, **changed: Any) -> Any:
    """Read a network, with values of its config changed."""
    import diffusers
    import transformers

    ours = {("dtype" if part.startswith("text_encoder") else "torch_dtype"): getattr(torch, dtype)}
    network = getattr(transformers if part.startswith("text_encoder") else diffusers, kind)
    model, info = network.from_pretrained(
        folder, subfolder=part, use_safetensors=True, output_loading_info=True, variant=variant, **ours, **changed
    )
    if missing := sorted(info["missing_keys"]):  # the libraries fill them at random and only warn
        raise ValueError(f"it lacks {len(missing)} weights such as {missing[0]}")
    return model


def _read_tokenizer(folder: Path, reads: Reads) -> Any:
    from tokenizers import normalizers
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    part = reads.tokenizer
    files = {path.name for path in (folder / part).glob("*")}
    own = {"spiece.model"} if reads.network == "T5EncoderModel" else {"vocab.json", "merges.txt"}
    if "tokenizer.json" not in files and not own <= files:  # transformers would make an empty one
        raise ValueError(f"it has neither tokenizer.json nor {' with '.join(sorted(own, reverse=True))}")
    kind = T5TokenizerFast if reads.network == "T5EncoderModel" else CLIPTokenizerFast  # transformers 5 has no other
    try:
        tokenizer = kind.from_pretrained(folder, subfolder=part)
    except Exception as error:  # what tokenizers raises of broken files has no class of its own
        raise ValueError(str(error)) from error
    if reads.lower:
        backend = tokenizer.backend_tokenizer
        before = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *before])
    return tokenizer


def _read_scheduler(name: str, folder: Path, pipeline: str) -> Any:
    """Read a model's own scheduler and correct its config as the model's pipeline does."""
    import diffusers

    kind = getattr(diffusers, name)
    if not issubclass(kind, diffusers.SchedulerMixin):
        raise TypeError(f"{name} is not a scheduler")
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    if (
        not (_sort(name) or hasattr(scheduler, "alphas_cumprod"))
        or scheduler.config.get("timestep_type") == "continuous"
    ):
        raise TypeError(f"the noise levels of this {name} are not supported")
    if (
        pipeline == "StableDiffusionPipeline"
    ):  # alone corrects old files, which would clip latents and begin a timestep early
        corrected = {"steps_offset": 1, "clip_sample": False}
        scheduler.register_to_config(**{key: value for key, value in corrected.items() if key in scheduler.config})
    return scheduler


def _replaced(own: Any, name: str, model: str) -> Any:
    """Return another scheduler with the noise levels and the prediction type of a model's own.

    Its config is what diffusers' `from_config` makes of the own one's, with two corrections. What decides the noise levels and the
    prediction type is the own one's also where that has it from the defaults of its class, which differ between classes. And
    `clip_sample` and `thresholding` are off unless they are on in the own one, as latents are not confined to [-1, 1].

    Args:
        own: The model's scheduler.
        name: Class of the other one.
        model: The model's name, for messages.

    Raises:
        UserError: There is no such scheduler, it is for other noise levels, or it would change them.
    """
    import diffusers

    known, its = exchangeable(own), type(own).__name__
    if name not in known:
        raise UserError(
            f"The scheduler {name!r} does not fit this model, whose own is {its}; use one of diffusers' such as {', '.join(known)}."
        )
    kind = getattr(diffusers, name)
    try:
        taken = inspect.signature(kind).parameters
        kept = {key: own.config[key] for key in NOISE_LEVELS if key in taken and key in own.config}
        off = {key: bool(own.config.get(key)) for key in ("clip_sample", "thresholding") if key in taken}
        other = kind.from_config(own.config, **kept, **off)
    except (ImportError, NotImplementedError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(" .:")
        raise UserError(
            f"The scheduler {name!r} cannot be set up as the {its} of the model {model!r} ({reason}); leave out --model.scheduler or "
            "choose another."
        ) from error
    levels = [getattr(scheduler, "alphas_cumprod", torch.empty(0)) for scheduler in (own, other)]
    same = all(own.config.get(key) == other.config.get(key) for key in ("prediction_type", "sigma_data"))
    if not same or not torch.allclose(levels[0], levels[1], rtol=0, atol=1e-6):
        raise UserError(
            f"The scheduler {name!r} would change the noise levels or the prediction type of the model {model!r}, whose own is {its}; "
            "leave out --model.scheduler or choose another."
        )
    return other


def exchangeable(scheduler: Any) -> tuple[str, ...]:
    """Return the classes of diffusers that can take a scheduler's place, its own among them."""
    own = type(scheduler).__name__
    return tuple(dict.fromkeys((own, *EXCHANGEABLE[_sort(own)])))


def _sort(name: str) -> str:
    """Return which schedulers can take the place of the one of a class: those of flows, of EDM, or "" for the others."""
    return next((sort for sort in ("FlowMatch", "EDM") if name.startswith(sort)), "")


NOISE_LEVELS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""What of a scheduler's config decides its noise levels and what the denoiser predicts."""

EXCHANGEABLE = {
    "": (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ),
    "EDM": ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
    "FlowMatch": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
}
"""The schedulers of diffusers that can take each other's place, by the sort of their noise levels."""


def _size_of_positions(part: Path, name: str) -> dict[str, int]:
    """Return the number that stands for a transformer's `sample_size` given as a list, of which diffusers makes no positions."""
    size = json.loads((part / "config.json").read_text(encoding="utf-8")).get("sample_size")
    if part.name != "transformer" or not isinstance(size, list):
        return {}
    if len(set(size)) > 1:
        raise UserError(
            f"The model {name!r} was trained on {' x '.join(map(str, size))} latents, and only square pictures are drawn; choose another."
        )
    return {"sample_size": int(size[0])}


def _correct_sample_size(denoiser: Any, pipeline: str) -> None:
    """Take 64 latents a side for UNets of old files that state fewer, as StableDiffusionPipeline does."""
    from packaging import version

    written = denoiser.config.get("_diffusers_version")
    old = written is not None and version.parse(version.parse(written).base_version) < version.parse("0.9.0.dev0")
    size = denoiser.config.get("sample_size")
    if pipeline == "StableDiffusionPipeline" and old and isinstance(size, int) and size < 64:
        denoiser.register_to_config(sample_size=64)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps hints, loading bars and lists of unused weights of both libraries off the screen meanwhile."""
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
