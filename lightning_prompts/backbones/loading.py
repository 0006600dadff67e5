"""Load models from a folder or the hub, as the family that their model_index.json names."""

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
from lightning_prompts.python_values import check_arguments, plain

log = logging.getLogger(__name__)

__all__ = ["EMOJI", "FAMILIES", "load_backbone", "quiet"]

FAMILIES: dict[str, type[Backbone]] = {
    pipeline: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt)
    for pipeline in family.pipelines
}
"""The family of each diffusers pipeline that is supported."""


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
    """Load a model on the CPU.

    Weights are read from safetensors only, since pickles can run code. The safety checker is not loaded.

    Args:
        name: `emoji` for the embedded model, a folder, a short name such as `sdxl`, a model on the Hugging Face hub as
            `owner/name`, or a safetensors file of Stable Diffusion 1, 2 or XL in their original layout.
        dtype: Precision of the networks, whatever that of the files.
        offline: Use downloaded files only, as the environment variable HF_HUB_OFFLINE=1 does.
        revision: Branch, tag or commit on the hub.
        vocabulary: Search the tokens of the `clip` or of the `t5` text encoders; None for the family's default.
        scheduler: Class name of another diffusers scheduler; None for the model's own.
        image_size: Height and width of drawn images, in pixels; None for the size that the model was trained on.
        config: Model or folder that supplies the configuration and tokenizers of a single file; None for the usual one of its
            family. A prediction type and noise levels that the file states take precedence.
        variant: Weights to read, such as `fp16`, where a component has them; None for weights without a variant or, if there are
            none, the only variant.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts, as in diffusers' pipelines; negative prompts
            use all layers. None for all layers.
    """
    name = plain("name", name)
    check_arguments(load_backbone, locals())
    import diffusers

    checkpoint, variants = None, dict[str, str | None]()
    if file := local_file(name):
        if variant:
            raise UserError(f"The model {name!r} is a file, which has no variants; leave out --model.backbone.variant.")
        checkpoint = read_header(file)
        folder = find_configuration(checkpoint, config, offline, revision)
    elif config:
        raise UserError(
            f"The model {name!r} is not a single file and has its own configuration; leave out --model.backbone.config."
        )
    else:
        folder = find_model(name, offline, revision, variant=variant)
        variants = _variants(name, folder, variant)
    family, index = _check(config or name, folder, None if checkpoint else variants)
    pipeline: str = index["_class_name"]
    if clip_skip is not None and not family.takes_clip_skip:
        raise UserError(
            f"--model.backbone.clip_skip is not supported by the {pipeline} of the model {name!r}, got {clip_skip}; leave it out."
        )
    part, kind = family.denoises
    towers = []
    with quiet():
        if checkpoint:
            with _unreadable(
                name, "networks", "download it again, or give the model that describes it as --model.backbone.config"
            ):
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
        denoiser.to(memory_format=torch.channels_last)  # convolutions are up to 8% faster, see docs/speed.md
    vae.to(memory_format=torch.channels_last)
    if dtype == "float16" and vae.config.get("force_upcast"):  # SDXL's overflows in half precision
        vae.float()
    # Only SDXL's pipeline has this key; it is true if absent.
    zero_empty = pipeline == "StableDiffusionXLPipeline" and bool(index.get("force_zeros_for_empty_prompt", True))
    backbone = family(name, towers, denoiser, vae, own, vocabulary, image_size, zero_empty, clip_skip)
    backbone.offline = offline
    if other is not None:
        backbone.replace_scheduler(other)
    if name == "emoji":
        backbone.default_steps, backbone.default_guidance = 25, 3.0  # docs/emoji.md
    return backbone


@contextmanager
def _unreadable(name: str, part: str, advice: str = "download or save the model again") -> Iterator[None]:
    """Turn the libraries' errors about a broken component into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .:") or type(error).__name__
        raise UserError(f"The {part} of the model {name!r} cannot be read ({reason}); {advice}.") from error


def _variants(name: str, folder: Path, variant: str | None) -> dict[str, str | None]:
    """Choose the weights of each component; log the components that lack the variant."""
    chosen, read = variants_in(name, folder, variant)
    if without := [part for part, own in read.items() if own != chosen]:
        log.info("The model %r has no variant %r of %s; reading weights without one.", name, chosen, ", ".join(without))
    return read


def _check(name: str, folder: Path, weights: Mapping[str, str | None] | None) -> tuple[type[Backbone], dict[str, Any]]:
    """Refuse anything but a supported pipeline in safetensors; return its family and its index.

    Args:
        name: The model, for messages.
        folder: Its folder.
        weights: The variant of each component whose weights were found; None if the folder needs no weights.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"The model {name!r} has no model_index.json; give a folder written by the `save_pretrained` of a diffusers pipeline."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pipeline: str = index["_class_name"]
        family = FAMILIES.get(pipeline)
        parts = components(family) if family else {}
        found = {part: (index.get(part) or (None, None))[1] for part in parts}
        index["scheduler"][1]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The model_index.json of the model {name!r} does not describe a pipeline; download or save the model again."
        ) from error
    if not family:
        raise UserError(
            f"The model {name!r} is a {pipeline}; only {', '.join(FAMILIES)} are supported, so choose another model."
        )
    optional = {reads.part for reads in family.reads if reads.optional}
    for part, (supported, stem) in parts.items():
        if found[part] is None and part in optional:
            continue
        if found[part] is None:
            raise UserError(
                f"The model {name!r} has no {part}, which every {pipeline} needs; download or save the whole model again."
            )
        if found[part] != supported:
            raise UserError(
                f"The {part} of the model {name!r} is a {found[part]}; only {supported} is supported, so choose another model."
            )
        file = folder / part / f"{stem}.safetensors"
        if weights is None or part in weights:
            continue
        if any(other.suffix in (".bin", ".ckpt") for other in file.parent.glob("*")):
            raise UserError(
                f"The model {name!r} has no {part}/{file.name}, and pickle weights (.bin, .ckpt) are refused because they "
                "can run code; convert it with `save_pretrained(folder, safe_serialization=True)`."
            )
        raise UserError(f"The model {name!r} has no {part}/{file.name}; download or save the whole model again.")
    return family, index


def components(family: type[Backbone]) -> dict[str, tuple[str, str]]:
    """Return the networks of a family: for each component, its class and the stem of its files."""
    part, kind = family.denoises
    texts = {reads.part: (reads.network, "model") for reads in family.reads}
    return {**texts, part: (kind, "diffusion_pytorch_model"), "vae": ("AutoencoderKL", "diffusion_pytorch_model")}


def _read(folder: Path, part: str, kind: str, dtype: str, variant: str | None, **changed: Any) -> Any:
    """Load a network, with `changed` values of its config."""
    import diffusers
    import transformers

    ours = {("dtype" if part.startswith("text_encoder") else "torch_dtype"): getattr(torch, dtype)}
    network = getattr(transformers if part.startswith("text_encoder") else diffusers, kind)
    model, info = network.from_pretrained(
        folder, subfolder=part, use_safetensors=True, output_loading_info=True, variant=variant, **ours, **changed
    )
    if missing := sorted(info["missing_keys"]):  # the libraries initialize them at random and only warn
        raise ValueError(f"it lacks weights such as {missing[0]}, {len(missing)} in all")
    return model


def _read_tokenizer(folder: Path, reads: Reads) -> Any:
    from tokenizers import normalizers
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    part = reads.tokenizer
    files = {path.name for path in (folder / part).glob("*")}
    own = {"spiece.model"} if reads.network == "T5EncoderModel" else {"vocab.json", "merges.txt"}
    if "tokenizer.json" not in files and not own <= files:  # transformers would create an empty one
        raise ValueError(f"it has neither tokenizer.json nor {' with '.join(sorted(own, reverse=True))}")
    # Transformers 5 has only fast tokenizers.
    kind = T5TokenizerFast if reads.network == "T5EncoderModel" else CLIPTokenizerFast
    try:
        tokenizer = kind.from_pretrained(folder, subfolder=part)
    except Exception as error:  # for broken files, tokenizers raises a plain Exception
        raise ValueError(str(error)) from error
    if reads.lower:
        backend = tokenizer.backend_tokenizer
        before = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *before])
    return tokenizer


def _read_scheduler(name: str, folder: Path, pipeline: str) -> Any:
    """Load a model's own scheduler and correct its config as the model's pipeline does."""
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
    if pipeline == "StableDiffusionPipeline":  # corrects old files, which would clip latents and start a timestep early
        corrected = {"steps_offset": 1, "clip_sample": False}
        scheduler.register_to_config(**{key: value for key, value in corrected.items() if key in scheduler.config})
    return scheduler


def _replaced(own: Any, name: str, model: str) -> Any:
    """Return another scheduler with the noise levels and the prediction type of a model's own.

    Diffusers' `from_config` makes it from the config of the model's scheduler, with two corrections. First, the values that decide
    the noise levels and the prediction type are kept even if that scheduler has them from its class defaults, which differ between
    classes. Second, `clip_sample` and `thresholding` stay off unless that scheduler has them on, because latents are not confined
    to [-1, 1].

    Args:
        own: The model's scheduler.
        name: Class name of the other scheduler.
        model: The model's name, for messages.

    Raises:
        UserError: The scheduler is unknown, made for other noise levels, or would change them.
    """
    import diffusers

    known, its = exchangeable(own), type(own).__name__
    if name not in known:
        raise UserError(
            f"The scheduler {name!r} does not fit this model, whose own is {its}; use one of {', '.join(known)}."
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
            f"The scheduler {name!r} cannot be created from the {its} of the model {model!r} ({reason}); leave out "
            "--model.backbone.scheduler or choose another."
        ) from error
    levels = [getattr(scheduler, "alphas_cumprod", torch.empty(0)) for scheduler in (own, other)]
    same = all(own.config.get(key) == other.config.get(key) for key in ("prediction_type", "sigma_data"))
    if not same or not torch.allclose(levels[0], levels[1], rtol=0, atol=1e-6):
        raise UserError(
            f"The scheduler {name!r} would change the noise levels or the prediction type of the model {model!r}, whose own "
            f"is {its}; leave out --model.backbone.scheduler or choose another."
        )
    return other


def exchangeable(scheduler: Any) -> tuple[str, ...]:
    """Return the diffusers classes that can replace a scheduler, including its own."""
    own = type(scheduler).__name__
    names = EXCHANGEABLE[_sort(own)]
    if scheduler.config.get("use_dynamic_shifting"):  # by image size, which Heun's scheduler does not support
        names = tuple(name for name in names if name != "FlowMatchHeunDiscreteScheduler")
    return tuple(dict.fromkeys((own, *names)))


def _sort(name: str) -> str:
    """Return the kind of a scheduler class, within which schedulers can replace each other: FlowMatch, EDM or "" for the rest."""
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
"""Config keys that decide a scheduler's noise levels and what the denoiser predicts."""

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
"""Diffusers schedulers that can replace each other, by the kind of their noise levels."""


def _size_of_positions(part: Path, name: str) -> dict[str, int]:
    """Return a transformer's `sample_size` as a number if its config has a list, for which diffusers builds no positions."""
    size = json.loads((part / "config.json").read_text(encoding="utf-8")).get("sample_size")
    if part.name != "transformer" or not isinstance(size, list):
        return {}
    if len(set(size)) > 1:
        raise UserError(
            f"The model {name!r} was trained on {' x '.join(map(str, size))} latents, and only square pictures are drawn; "
            "choose another model."
        )
    return {"sample_size": int(size[0])}


def _correct_sample_size(denoiser: Any, pipeline: str) -> None:
    """Set 64 latents per side for UNets of old files that state fewer, as StableDiffusionPipeline does."""
    from packaging import version

    written = denoiser.config.get("_diffusers_version")
    old = written is not None and version.parse(version.parse(written).base_version) < version.parse("0.9.0.dev0")
    size = denoiser.config.get("sample_size")
    if pipeline == "StableDiffusionPipeline" and old and isinstance(size, int) and size < 64:
        denoiser.register_to_config(sample_size=64)


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
