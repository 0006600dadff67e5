"""Compute LPIPS (arXiv 1801.03924) if the weights of its trunk are on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.errors import UserError
from lightning_prompts.typed_module import TypedModule

Trunk = Literal["alex", "vgg"]

TRUNKS: dict[Trunk, tuple[str, str]] = {
    "alex": ("AlexNet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("VGG16", "vgg16-397923af.pth"),
}
"""The name of each trunk, and the file of its weights as published by torchvision."""


class LpipsDistance(TypedModule):
    """LPIPS of images and their references, 0 or more, 0 for equal ones; lower is better.

    The released network of the package `lpips`, version 0.1. Images with a side below 64 are enlarged to 64 x 64.
    Nothing is downloaded; see `missing_lpips_weights`.

    Args:
        trunk: The network whose features are compared.
        weights: File of the trunk's weights as published by torchvision; None for the one in torch's hub cache.

    Raises:
        UserError: The file is missing or does not hold the trunk's weights.
    """

    def __init__(self, trunk: Trunk = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        if reason := missing_lpips_weights(trunk, weights):
            raise UserError(reason)
        self.network = _network(trunk, _file(trunk, weights))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Compute the distances (B,) of images (B, 3, H, W) from references of the same shape, both in [-1, 1]."""
        self.network.eval()  # a parent module's train() turns its dropout on
        one, other = (F.interpolate(x, size=64) if min(x.shape[-2:]) < 64 else x for x in (images, references))
        distances: Tensor = self.network(one, other)
        return distances.flatten()


def missing_lpips_weights(trunk: Trunk = "alex", weights: str | Path | None = None) -> str | None:
    """Return an error message if LPIPS lacks the weights of its trunk, else None."""
    (name, published), file = TRUNKS[trunk], _file(trunk, weights)
    if file.is_file():
        return None
    url = f"https://download.pytorch.org/models/{published}"
    advice = f"save {url} there, or give its path as --lpips_weights"
    return f"LPIPS lacks the weights of its {name}: there is no file {file}; {advice}."


def _file(trunk: Trunk, weights: str | Path | None) -> Path:
    """Return the file of a trunk's weights."""
    return Path(weights).expanduser() if weights else Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[trunk][1]


def _network(trunk: Trunk, file: Path) -> Any:
    """Load LPIPS with the trunk's weights from a file."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns about deprecated arguments that lpips gives
        network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)  # pnet_rand, since it would download the trunk
    try:
        published = torch.load(file, map_location="cpu", weights_only=True)
        # lpips splits `features` into slices and keeps the indices of layers: slice2.3.weight is features.3.weight.
        state = {name: published[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(state)
    except Exception as error:  # the type depends on the kind of file
        name, original = TRUNKS[trunk]
        raise UserError(
            f"The file {file} does not hold the weights of torchvision's {name}; download {original} again, or give "
            "another file as --lpips_weights."
        ) from error
    return network.requires_grad_(False)
