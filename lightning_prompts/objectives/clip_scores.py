"""Judgements by a CLIP: how well a picture fits its prompt, which of two texts it is nearer to, how much people prefer it."""

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


class _ByClip(Objective):
    """A judgement by a CLIP, which is loaded when the model that draws is known.

    Args:
        clip: Folder or hub id of a CLIPModel; None for the one that goes with the backbone.
        weight: See `Objective`.
    """

    clip: ClipSimilarity

    def __init__(self, clip: str | None = None, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.name = clip
        self._known: dict[str, Tensor] = {}

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Loads the CLIP."""
        self.clip = ClipSimilarity(self.name or default_clip(backbone), offline)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts, each computed once."""
        for text in dict.fromkeys(texts):
            # Alone: what is asked for together depends on the batch, and on when a search goes on.
            if text not in self._known:
                self._known[text] = self.clip.features_of([text])[0]
        return torch.stack([self._known[text] for text in texts]).to(self.clip.clip.device)

    def forward(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of pictures (B, 3, H, W) in [-1, 1] of prompts."""
        return self.judge(self.clip.features(pictures), prompts)

    @abstractmethod
    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of the unit vectors (B, E) of pictures."""


class ClipText(_ByClip):
    """Cosine of the picture and the person's prompt, in [-1, 1], higher is better.

    Args:
        clip: See `ClipQuality`.
        weight: See `Objective`.
    """

    lowest, highest = -1.0, 1.0

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of the unit vectors (B, E) of pictures."""
        return (features * self.texts(prompts)).sum(1)


class Preference(ClipText):
    """How much people prefer a picture for its prompt: a CLIP's cosine at its own scale, higher is better.

    For checkpoints in the layout of PickScore (arXiv 2305.01569), which are CLIPs trained on people's choices.

    Args:
        clip: Folder or hub id of the checkpoint.
        weight: See `Objective`.
    """

    lowest, highest = -math.inf, math.inf

    def __init__(self, clip: str = "yuvalkirstain/PickScore_v1", weight: float = 1.0) -> None:
        super().__init__(clip, weight)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of the unit vectors (B, E) of pictures."""
        scale: Tensor = self.clip.clip.logit_scale.exp()
        return scale * super().judge(features, prompts)


class ClipQuality(_ByClip):
    """Chance in [0, 1], in the manner of CLIP-IQA (arXiv 2207.12396), that the good text is said of a picture and not the bad one.

    Args:
        good: What a good picture is called.
        bad: What a bad one is called.
        clip: Folder or hub id of a CLIPModel; None for the one that goes with the backbone.
        weight: See `Objective`.
    """

    lowest, highest = 0.0, 1.0

    def __init__(
        self, good: str = "Good photo.", bad: str = "Bad photo.", clip: str | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(clip, weight)
        self.good, self.bad = good, bad

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of the unit vectors (B, E) of pictures."""
        logits = 100 * features @ self.texts([self.good, self.bad]).T
        return logits.softmax(1)[:, 0]


class Aesthetic(_ByClip):
    """The LAION aesthetic predictor V2: people's ratings of pictures, about 1 to 10, higher is better.

    A perceptron over the unit vectors of CLIP ViT-L/14.

    Args:
        weights: The file `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor.
        clip: Folder or hub id of the CLIP that it was trained on.
        weight: See `Objective`; the paper's.
    """

    lowest, highest = -math.inf, math.inf

    def __init__(self, weights: str, clip: str = "openai/clip-vit-large-patch14", weight: float = 50.0) -> None:
        super().__init__(clip, weight)
        widths = (768, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        # The file counts the dropouts, which do nothing here: layers.0, 2, 4, 6 and 7.
        self.layers = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linears, strict=True)))
        self.load_state_dict(_tensors(Path(weights).expanduser(), self.state_dict()))
        self.requires_grad_(False)

    def attach(self, backbone: Backbone, offline: bool) -> None:
        """Loads the CLIP."""
        super().attach(backbone, offline)
        width = self.clip.clip.config.projection_dim
        if width != 768:
            raise UserError(
                f"The CLIP {self.name!r} has features of {width} numbers and the aesthetic predictor takes 768; "
                "name a CLIP ViT-L/14."
            )

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of the unit vectors (B, E) of pictures."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(1)


def _tensors(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file of weights holds, if it is that and no more."""
    if not path.is_file():
        raise UserError(f"There is no file {path} with the weights of the aesthetic predictor; check the path.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's, the zip reader's, or whatever another kind of file leads to
        raise UserError(
            f"The file {path} is refused, as it is not a pickle of tensors alone, and others can run code; fetch "
            "sac+logos+ava1-l14-linearMSE.pth again."
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if not isinstance(found, dict) or {name: tuple(getattr(x, "shape", ())) for name, x in found.items()} != shapes:
        raise UserError(
            f"The file {path} does not hold the five layers of the aesthetic predictor, 768 to 1 wide; "
            "give sac+logos+ava1-l14-linearMSE.pth."
        )
    return found
