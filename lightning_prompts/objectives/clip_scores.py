"""Objectives computed with a CLIP: agreement with the prompt, quality, preference and aesthetics."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError
from lightning_prompts.objectives.base import Objective
from lightning_prompts.objectives.clip import ClipSimilarity, default_clip


class _ClipObjective(Objective):
    """An objective computed with a CLIP, which is loaded by `attach`.

    Args:
        clip: Folder or hub id of a CLIPModel; None for the backbone's default.
        weight: See `Objective`.
    """

    clip: ClipSimilarity

    def __init__(self, clip: str | None = None, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.name = clip
        self._features: dict[str, Tensor] = {}

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Load the given CLIP, or else the one that belongs to the backbone."""
        self.clip = ClipSimilarity(self.name or default_clip(backbone), offline)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit features (B, E) of texts, each computed once."""
        for text in dict.fromkeys(texts):
            # One by one, so that rounding does not depend on the batch or on when a search was resumed.
            if text not in self._features:
                self._features[text] = self.clip.features_of([text])[0]
        return torch.stack([self._features[text] for text in texts]).to(self.clip.clip.device)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1] of B prompts."""
        return self.score(self.clip.features(images), prompts)

    @abstractmethod
    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from unit image features (B, E)."""


class ClipText(_ClipObjective):
    """Cosine of the image and the user's prompt, in [-1, 1], higher is better.

    Args:
        clip: See `ClipQuality`.
        weight: See `Objective`.
    """

    lowest, highest = -1.0, 1.0

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from unit image features (B, E)."""
        return (features * self.texts(prompts)).sum(1)


class Preference(ClipText):
    """Human preference for an image given its prompt: the cosine of a CLIP times its logit scale, higher is better.

    For checkpoints in the layout of PickScore (arXiv 2305.01569), which are CLIPs trained on human choices.

    Args:
        clip: Folder or hub id of the checkpoint.
        weight: See `Objective`.
    """

    lowest, highest = -math.inf, math.inf

    def __init__(self, clip: str = "yuvalkirstain/PickScore_v1", weight: float = 1.0) -> None:
        super().__init__(clip, weight)

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from unit image features (B, E)."""
        scale: Tensor = self.clip.clip.logit_scale.exp()
        return scale * super().score(features, prompts)


class ClipQuality(_ClipObjective):
    """Probability in [0, 1] of the good text against the bad one, as in CLIP-IQA (arXiv 2207.12396).

    Args:
        good: Text for good images.
        bad: Text for bad images.
        clip: Folder or hub id of a CLIPModel; None for the backbone's default.
        weight: See `Objective`.
    """

    lowest, highest = 0.0, 1.0

    def __init__(
        self, good: str = "Good photo.", bad: str = "Bad photo.", clip: str | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(clip, weight)
        self.good, self.bad = good, bad

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from unit image features (B, E)."""
        logits = 100 * features @ self.texts([self.good, self.bad]).T
        return logits.softmax(1)[:, 0]


class Aesthetic(_ClipObjective):
    """The LAION aesthetic predictor V2: predicted human ratings, about 1 to 10, higher is better.

    A perceptron on the unit features of CLIP ViT-L/14.

    Args:
        weights: The file `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor.
        clip: Folder or hub id of the CLIP that it was trained on.
        weight: See `Objective`; the default is that of arXiv 2308.12059.
    """

    lowest, highest = -math.inf, math.inf

    def __init__(self, weights: str, clip: str = "openai/clip-vit-large-patch14", weight: float = 50.0) -> None:
        super().__init__(clip, weight)
        widths = (768, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        # The file numbers the dropouts too, which are left out here: layers.0, 2, 4, 6 and 7.
        self.layers = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linears, strict=True)))
        self.load_state_dict(_load_weights(Path(weights).expanduser(), self.state_dict()))
        self.requires_grad_(False)

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Load the CLIP, and refuse one whose features do not fit the aesthetic head."""
        super().attach(backbone, offline)
        width = self.clip.clip.config.projection_dim
        if width != 768:
            raise UserError(
                f"The CLIP {self.name!r} has features of {width} numbers, but the aesthetic predictor takes 768; give "
                "a CLIP ViT-L/14."
            )

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from unit image features (B, E)."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(1)


def _load_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load a file of weights, if its names and shapes are those of `wanted`.

    Raises:
        UserError: The file is missing, holds more than tensors, or has other names or shapes.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path} with the weights of the aesthetic predictor; check the path.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type depends on the kind of file
        raise UserError(
            f"The file {path} is refused, since it holds more than tensors and could run code; download "
            "sac+logos+ava1-l14-linearMSE.pth again."
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if not isinstance(weights, dict) or {name: tuple(getattr(x, "shape", ())) for name, x in weights.items()} != shapes:
        raise UserError(
            f"The file {path} does not hold the five layers of the aesthetic predictor, 768 to 1 wide; "
            "give sac+logos+ava1-l14-linearMSE.pth."
        )
    return weights
