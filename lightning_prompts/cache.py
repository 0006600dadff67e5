"""Cache tensors that are costly and equal in all runs, in safetensors files named by a hash of their inputs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_prompts.runs.atomic_io import atomic_write

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the cache folder: LIGHTNING_PROMPTS_CACHE or else `lightning_prompts` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("LIGHTNING_PROMPTS_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_prompts"


def cached(what: str, depends_on: Mapping[str, str], compute: Callable[[], Tensor]) -> Tensor:
    """Return a tensor from the cache, or compute and cache it.

    A damaged or wrong file is computed again. A cache that cannot be written is not an error.

    Args:
        what: Kind of tensor, for the file's name.
        depends_on: Everything that its values depend on, by name.
        compute: Function that computes it.

    Returns:
        The tensor, on the CPU if it was cached.
    """
    description = json.dumps({"what": what, **depends_on}, sort_keys=True)
    name = hashlib.blake2b(description.encode(), digest_size=16).hexdigest()
    path = cache_folder() / f"{what}-{name}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("description") == description:
                tensor: Tensor = file.get_tensor(what)
                if tensor.isfinite().all():
                    return tensor
    except (OSError, SafetensorError):
        pass
    tensor = compute()
    content = save({what: tensor.detach().cpu().contiguous()}, {"format": "pt", "description": description})
    try:
        atomic_write(path, content)
    except OSError as error:
        log.info(
            "The cache %s cannot be written to (%s); the next run will compute these tensors again.",
            path.parent,
            error.strerror or error,
        )
    return tensor


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Return a hash of the names, dtypes, shapes and values of a module's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
