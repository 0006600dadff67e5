"""Write the images of `predict` into the run's folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling.figures import to_image, to_png
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class ImageWriter(BasePredictionWriter):
    """Write each image that `predict` generates to a file of its own, and print its path and prompt."""

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: PromptMethod,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: list[Problem | str],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images (B, S, 3, H, W) of the prompts of a batch."""
        settings, folder = pl_module.data.predict_settings, pl_module.data.folder
        if not folder.writes:
            return
        without = f"-without-{file_name(settings.negative)}" if settings.negative else ""
        for prompt, images in zip(batch, prediction, strict=False):  # no images of a batch with an error
            name, text = (
                (prompt.key, str(prompt.prompt)) if isinstance(prompt, Problem) else (file_name(prompt), prompt)
            )
            for seed, image in zip(settings.seeds, images, strict=True):
                path = folder.path / "images" / f"{name}{without}-seed{seed}.png"
                folder.write(path, to_png(to_image(image)))
                say(f"{path}  {text}")


def file_name(text: str) -> str:
    """Return a file name of at most 45 letters, digits and dashes for a text; different texts have different names."""
    start = re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
