"""LPIPS (arXiv 1801.03924), where its trunk's weights are at hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.errors import UserError
from lightning_prompts.metrics.mean import Mean

Trunk = Literal["alex", "vgg"]

TRUNKS: dict[Trunk, tuple[str, str]] = {
    "alex": ("AlexNet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("VGG16", "vgg16-397923af.pth"),
}
"""Each trunk's name and the file of its weights, as torchvision publishes it."""


class Lpips(Mean):
    """Mean LPIPS between drawn pictures and their targets, 0 or more, 0 for equal ones; lower is better.

    The released network of the package `lpips`, version 0.1, in which pictures with a side below 64 are enlarged to 64 x 64.
    Nothing is downloaded: see `missing_lpips_weights`.

    Args:
        trunk: The network whose features are compared.
        weights: File of the trunk's weights as torchvision publishes it; None for the one in torch's hub cache.
    """

    higher_is_better = False

    def __init__(self, trunk: Trunk = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        if reason := missing_lpips_weights(trunk, weights):
            raise UserError(reason)
        self.network = _network(trunk, _file(trunk, weights))

    @torch.no_grad()
    def update(self, drawn: Tensor, targets: Tensor) -> None:
        """Adds all pairs of pictures (B, 3, H, W) and the targets (I, 3, H, W) they should look like, both in [-1, 1]."""
        self.network.eval()  # a module in training that holds this metric turns the network's dropout on
        drawn, targets = (F.interpolate(x, size=64) if min(x.shape[-2:]) < 64 else x for x in (drawn, targets))
        self.add(torch.cat([self.network(drawn, target.expand_as(drawn)) for target in targets]))


def missing_lpips_weights(trunk: Trunk = "alex", weights: str | Path | None = None) -> str | None:
    """Why there is no LPIPS, in one sentence; None where there is."""
    (name, published), file = TRUNKS[trunk], _file(trunk, weights)
    if file.is_file():
        return None
    url = f"https://download.pytorch.org/models/{published}"
    return f"LPIPS lacks the weights of its {name}: there is no file {file}; put {url} there or name it by --lpips_weights."


def _file(trunk: Trunk, weights: str | Path | None) -> Path:
    return Path(weights).expanduser() if weights else Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[trunk][1]


def _network(trunk: Trunk, file: Path) -> Any:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about the way that lpips calls it
        network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)  # otherwise it would download the trunk
    try:
        published = torch.load(file, map_location="cpu", weights_only=True)
        # lpips cuts torchvision's `features` into slices and keeps the layers' numbers: slice2.3.weight is features.3.weight.
        state = {name: published[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(state)
    except Exception as error:  # each kind of wrong file has its own
        name, original = TRUNKS[trunk]
        raise UserError(
            f"The file {file} does not hold the weights of torchvision's {name}; fetch {original} again or name another "
            "by --lpips_weights."
        ) from error
    return network.requires_grad_(False)
