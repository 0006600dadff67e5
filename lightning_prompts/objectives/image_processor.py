"""A differentiable image processor of a CLIP."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones.hub import hub_access, is_offline
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

CONFIG = "preprocessor_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's published statistics of pixels in [0, 1]."""

MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Torch's interpolation modes for Pillow's filters."""


class ImageProcessor(NamedTuple):
    """Resize, crop and normalize images in [-1, 1] as transformers' CLIPImageProcessor does with images in 0 to 255.

    Attributes:
        size: Height and width after resizing, or the length of the shorter side; None for no resizing.
        crop: Height and width of the center crop; None for no crop.
        mode: Interpolation mode of the resizing.
        mean: Mean by channel, for values in [-1, 1].
        std: Standard deviation by channel, for values in [-1, 1].
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Read the content of a preprocessor_config.json; missing keys have the defaults of CLIPImageProcessor.

        Raises:
            KeyError, TypeError, ValueError: The content is not that of a CLIP's image processor.
        """
        resample = config.get("resample", 3)
        if resample not in MODES:
            raise ValueError(f"its resample must be {', '.join(f'{key} ({name})' for key, name in MODES.items())}")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        if isinstance(size, Mapping):
            size = size["shortest_edge"] if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
        if isinstance(crop, Mapping):
            crop = (int(crop["height"]), int(crop["width"]))
        factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        normalizes = config.get("do_normalize", True)
        mean = [float(x) for x in config.get("image_mean", MEAN)] if normalizes else [0.0] * 3
        std = [float(x) for x in config.get("image_std", STD)] if normalizes else [1.0] * 3
        if len(mean) != 3 or len(std) != 3 or not min(*std, factor) > 0:
            raise ValueError(
                "its image_mean and image_std must be three numbers each, and image_std and rescale_factor above 0"
            )
        half = 127.5 * factor  # half of the range of pixels after rescaling
        side = crop if isinstance(crop, tuple) else (int(crop), int(crop))
        return cls(
            size=(size if isinstance(size, tuple) else int(size)) if config.get("do_resize", True) else None,
            crop=side if config.get("do_center_crop", True) else None,
            mode=MODES[resample],
            mean=tuple(x / half - 1 for x in mean),
            std=tuple(x / half for x in std),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pixel values (B, 3, h, w) of images (B, 3, H, W) in [-1, 1]."""
        height, width = images.shape[-2:]
        size = self.size
        if isinstance(size, int):
            short = min(height, width)
            size = (size * height // short, size * width // short)
        if size and size != (height, width):
            antialias = self.mode in ("bilinear", "bicubic")
            images = F.interpolate(images, size=size, mode=self.mode, antialias=antialias).clamp(-1, 1)
        if self.crop:
            top, left = ((a - b) // 2 for a, b in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., max(top, 0) :, max(left, 0) :][..., : self.crop[0], : self.crop[1]]
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def load_image_processor(name: str, image_size: int, offline: bool = False) -> ImageProcessor:
    """Load the image processor of a CLIP from its folder or the hub.

    A CLIP without one gets the statistics of the published CLIP and bicubic resizing to its image size, and a log line
    says so.

    Args:
        name: Folder or hub id of the CLIP.
        image_size: Height and width, in pixels, that its vision encoder takes.
        offline: Do not connect to the hub.

    Raises:
        UserError: Its file is invalid or not that of a CLIP.
    """
    try:
        config = _read(name, "processor_config.json", offline).get("image_processor") or _read(name, CONFIG, offline)
        if not config:
            log.info(
                "The CLIP %r has no %s; using the mean and standard deviation of the published CLIP.", name, CONFIG
            )
        return ImageProcessor.from_config(config or {"size": image_size, "crop_size": image_size})
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, LookupError) else re.split(r"\n|\. ", str(error))[0]
        raise UserError(
            f"The image processor of the CLIP {name!r} cannot be used ({reason}); correct its {CONFIG}."
        ) from error


def _read(name: str, file: str, offline: bool) -> dict[str, Any]:
    """Return the content of a JSON file in a folder or on the hub, {} if there is no such file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(name) / file
    if not Path(name).is_dir():
        # The CLIP itself is in the cache already, and waiting for an unreachable hub takes many seconds.
        cached = try_to_load_from_cache(name, file)
        if cached is not None and not isinstance(cached, str):  # the hub has no such file
            return {}
        try:
            with hub_access(offline):
                path = Path(cached or hf_hub_download(name, file, local_files_only=offline or is_offline()))
        except EntryNotFoundError:  # also if it is not in the cache and the hub is unreachable
            return {}
    elif not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
