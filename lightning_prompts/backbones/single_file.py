"""Load checkpoints in one file, in the layout of the code that the models were trained with."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_prompts.backbones.hub import SHORT_NAMES, configuration_files, find_model
from lightning_prompts.backbones.registry import families, known_embedding_keys
from lightning_prompts.errors import UserError, shortened

log = logging.getLogger(__name__)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OLD_TEXT = "cond_stage_model.transformer."  # not followed by "text_model." in old files

OTHERS = {  # unsupported kinds of files, by patterns of their weights' names
    "a LoRA": r"^lora_|\blora_(up|down|A|B|mid)\b|\.lora[._]|\b(hada|lokr)_w\d",
    "a ControlNet": r"^control_model\.|^controlnet_|^input_hint_block\.",
    "FLUX": r"(^|\.)double_blocks\.0\.",
    "Stable Diffusion 3": r"(^|\.)joint_blocks\.0\.",
    "Playground v2.5, an EDM model": r"^edm_mean$",
    "CosXL, an EDM model": r"^edm_vpred\.sigma_max$",
    "an unCLIP model": r"^noise_augmentor\.|^embedder\.model\.",
}
CHANNELS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
ALONE = {  # single components, in either layout
    "a UNet alone": rf"^{re.escape(UNET)}|^(down_blocks|input_blocks)\.0\.",
    "an autoencoder (VAE) alone": rf"^{re.escape(VAE)}|^decoder\.conv_in\.",
    "a text encoder alone": (
        r"^(text_model|cond_stage_model|conditioner|shared|token_embedding|transformer\.resblocks)\b"
    ),
}
SUPPORTED = "Stable Diffusion 1, 2 or XL with text encoder, UNet and autoencoder in the original layout"

PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
"""Diffusers' names for the values of `modelspec.prediction_type`."""
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
"""Prediction types by the `modelspec.architecture` that implies them."""
SD2_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_SPREAD = 0.09
"""ComfyUI detects v-prediction in Stable Diffusion 2 by a standard deviation of this bias above SD2_SPREAD."""


class Checkpoint(NamedTuple):
    """A checkpoint, described by its header.

    Attributes:
        file: Its path.
        model: Short name of the model that supplies its configuration and tokenizers; None if it is a Stable Diffusion
            2 of unknown prediction type.
        prediction_type: The prediction type that it states, if any.
        zero_snr: Whether it states a terminal signal-to-noise ratio of zero.
        old_text: Whether the weights of its text encoder have the names of old files.
        unet_weights: Number of weight tensors in its UNet.
    """

    file: Path
    model: str | None
    prediction_type: str | None
    zero_snr: bool
    old_text: bool
    unet_weights: int


def read_header(file: Path) -> Checkpoint:
    """Identify a checkpoint without loading its weights.

    The empty tensor `v_pred` states v-prediction and `ztsnr` zero terminal SNR, as in ComfyUI and Forge. Without
    `v_pred`, the metadata `modelspec.prediction_type` or `modelspec.architecture` states the prediction type.

    Raises:
        UserError: The file cannot be read or is not a supported checkpoint; the message says what it is.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise UserError(
            f"The file {str(file)!r} does not end in .safetensors, and pickle weights (.ckpt, .pt, .bin) are refused "
            "because they can run code; convert it to safetensors."
        )
    try:
        with safe_open(file, framework="pt") as weights:
            names, metadata = set(weights.keys()), weights.metadata() or {}
            first = f"{UNET}input_blocks.0.0.weight"
            shape = weights.get_slice(first).get_shape() if first in names else []
            bias = weights.get_tensor(SD2_BIAS).float() if SD2_BIAS in names else torch.zeros(1)
    except (OSError, SafetensorError) as error:
        reason = shortened(str(error).partition("\n")[0], 100)
        raise UserError(f"The file {str(file)!r} cannot be read ({reason}); download it again.") from error
    known = {prefix: model for family in families().values() for prefix, model in family.single_files.items()}
    model = next((model for prefix, model in known.items() if any(name.startswith(prefix) for name in names)), None)
    if kind := _other_kind(names, model, shape):
        raise UserError(f"The file {str(file)!r} is {kind}; give {SUPPORTED}, or a folder in diffusers' layout.")
    stated = PREDICTIONS.get(metadata.get("modelspec.prediction_type", "")) or ARCHITECTURES.get(
        metadata.get("modelspec.architecture", "")
    )
    stated = "v_prediction" if "v_pred" in names else stated
    if model == "sd21":
        spread = float(bias.std(correction=0))
        guess = None if spread == 0 else "v_prediction" if spread > SD2_SPREAD else "epsilon"
        model = {"v_prediction": "sd21", "epsilon": "sd21-base", None: None}[stated or guess]
    old = model == "sd15" and not any(name.startswith(f"{OLD_TEXT}text_model.") for name in names)
    unet_weights = sum(name.startswith(UNET) for name in names)
    return Checkpoint(file, model, stated, "ztsnr" in names, old, unet_weights)


def _other_kind(names: set[str], model: str | None, shape: list[int]) -> str | None:
    """Return what a file is if it is not a complete Stable Diffusion 1, 2 or XL, else None.

    Args:
        names: Names of its tensors.
        model: The model that has its text encoder.
        shape: Shape of the UNet's first convolution in the original layout.
    """
    keys = "|".join(map(re.escape, (*known_embedding_keys(), "emb_params", "string_to_param")))
    for kind, pattern in {**OTHERS, "an embedding, which --model.init takes": rf"^({keys})$"}.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    labels = f"{UNET}label_emb.0.0.weight" in names
    if model is None and labels and any(name.startswith("conditioner.embedders.0.model.") for name in names):
        return "the refiner of SDXL"
    if model == "sd21" and labels:
        return "an unCLIP model"
    if len(shape) == 4 and shape[1] != 4:
        return CHANNELS.get(shape[1], f"a model with {shape[1]} input channels")
    found = [kind for kind, pattern in ALONE.items() if any(re.search(pattern, name) for name in names)]
    if model and any(name.startswith(UNET) for name in names) and any(name.startswith(VAE) for name in names):
        return None
    if len(found) == 1:
        return found[0]
    return " and ".join(kind.removesuffix(" alone") for kind in found) + " alone" if found else "of an unknown kind"


def configuration_of(checkpoint: Checkpoint) -> str:
    """Return the short name of the model that describes a checkpoint; refuse a checkpoint for which it is unknown."""
    if checkpoint.model is None:
        raise UserError(
            f"The file {str(checkpoint.file)!r} is a Stable Diffusion 2 and does not state whether it predicts epsilon "
            "or v; set --model.backbone.config to sd21-base (512 pixels, epsilon), sd21 (768 pixels, v), another model "
            "or a folder."
        )
    return checkpoint.model


def find_configuration(checkpoint: Checkpoint, config: str | None, offline: bool, revision: str | None) -> Path:
    """Return the folder of the configuration and tokenizers that go with a file; download it if necessary."""
    wanted = config or configuration_of(checkpoint)
    try:
        return find_model(wanted, offline, revision, configuration_files())
    except UserError as error:
        raise UserError(
            f"The file {str(checkpoint.file)!r} holds only weights and needs the configuration of "
            f"{config or SHORT_NAMES[wanted]!r}, or of another model or folder given as --model.backbone.config: "
            f"{error}"
        ) from error


def as_stated(scheduler: Any, checkpoint: Checkpoint) -> Any:
    """Override the prediction type and the noise levels of a scheduler with those that a checkpoint states.

    For zero terminal SNR, which needs v-prediction, betas are rescaled and sampling starts at the last timestep. A
    scheduler that does not support this is replaced with DDIM.
    """
    import diffusers

    config, kind = scheduler.config, type(scheduler)
    stated: dict[str, Any] = {"prediction_type": checkpoint.prediction_type or config.get("prediction_type", "epsilon")}
    if checkpoint.zero_snr and stated["prediction_type"] == "v_prediction":
        stated |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
            kind, stated = diffusers.DDIMScheduler, {**stated, "clip_sample": False}
    if differing := [f"{key} {value}" for key, value in stated.items() if config.get(key) != value]:
        log.info(
            "The file %r states %s, which overrides its configuration.", str(checkpoint.file), ", ".join(differing)
        )
    return kind.from_config(config, **stated)


def read_single_file(
    checkpoint: Checkpoint, folder: Path, index: Mapping[str, Any], read: set[str], dtype: str
) -> dict[str, Any]:
    """Load the networks of a file.

    Args:
        checkpoint: The file, described by its header.
        folder: Folder of the configuration and tokenizers.
        index: Content of the folder's model_index.json.
        read: The components to read.
        dtype: Precision of the networks.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    others = [part for part, value in index.items() if isinstance(value, list) and part not in read]
    given = dict.fromkeys(part for part in others if not part.startswith(("scheduler", "tokenizer")))
    try:
        with _complete():
            if checkpoint.old_text:
                given["text_encoder"] = _old_text_encoder(checkpoint.file, folder, dtype)
            pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
                str(checkpoint.file),
                config=str(folder),
                local_files_only=True,
                torch_dtype=getattr(torch, dtype),
                **given,
            )
    except SingleFileComponentError as error:
        raise ValueError(str(error.message).partition("\n")[0].replace(". ", ": ")) from error
    networks = {part: pipeline.components[part] for part in read}
    for network in networks.values():  # if accelerate is installed, diffusers leaves missing weights on the meta device
        if missing := [name for name, weight in network.named_parameters() if weight.is_meta]:
            raise _lacking(network, missing)
    if more := checkpoint.unet_weights - len(networks["unet"].state_dict()):  # such as those of consistency models
        raise ValueError(f"its UNet has weights that its configuration does not describe, {more} in all")
    return networks


def _old_text_encoder(file: Path, folder: Path, dtype: str) -> Any:
    """Load the text encoder of Stable Diffusion 1 from the names of old files, which diffusers does not look for."""
    from safetensors import safe_open
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
    start = "text_model." if hasattr(encoder, "text_model") else ""  # depends on the version of transformers
    with safe_open(file, framework="pt") as weights:
        old = [name for name in weights.keys() if name.startswith(OLD_TEXT)]  # noqa: SIM118
        renamed = {start + name.removeprefix(OLD_TEXT): weights.get_tensor(name) for name in old}
        encoder.load_state_dict(renamed, strict=False)
    return encoder.to(getattr(torch, dtype)).eval()


def _lacking(network: torch.nn.Module, missing: list[str]) -> ValueError:
    return ValueError(f"the {type(network).__name__} lacks weights such as {missing[0]}, {len(missing)} in all")


@contextmanager
def _complete() -> Iterator[None]:
    """Raise an error for missing weights, which diffusers would silently leave at random values."""
    load = torch.nn.Module.load_state_dict

    def load_all(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        loaded = load(module, *args, **kwargs)
        if missing := sorted(loaded.missing_keys):
            raise _lacking(module, missing)
        return loaded

    torch.nn.Module.load_state_dict = load_all  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
