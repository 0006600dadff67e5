"""What lies between two prompts: pictures of the encoded prompts on the way from one to the other (arXiv 2308.12059)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones.prompt_embeds_files import read_prompt_embeds
from lightning_prompts.callbacks.results import file_name, noise_of
from lightning_prompts.embeddings import slerp
from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.sampling.figures import sheet, to_image, to_png
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

MILLISECONDS = 150  # of a frame


class Between(pl.Callback):
    """Writes a grid, a seed a row, and an animation there and back when `predict` ends.

    Args:
        folder: Where.
        first: A text, or a safetensors file with one encoded prompt.
        last: The same.
        seeds: Seeds of the pictures.
        frames: Pictures of a seed, both ends included.
    """

    def __init__(self, folder: RunFolder, first: str, last: str, seeds: Sequence[int] = (0,), frames: int = 12) -> None:
        if frames < 2:
            raise UserError("A path has two ends at least; give --frames 2 or more.")
        self.folder, self.ends, self.seeds, self.frames = folder, (first, last), tuple(seeds), frames

    def on_predict_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Draws and writes."""
        if not trainer.is_global_zero:
            return
        one, other = (encoded(end, pl_module) for end in self.ends)
        if len(one) != len(other):  # only one of them says what to lead away from
            empty = pl_module.encode([""], negative=True).to(one)
            one, other = (x if len(x) == 2 else torch.cat([x, empty]) for x in (one, other))
        values = torch.linspace(0, 1, self.frames, device=one.device)
        embeds = torch.stack([slerp(one, other, float(value)) for value in values])
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        drawn = pl_module.sampler.draw_embeds(embeds, noise.expand(self.frames, *noise.shape))  # (F, N, 3, H, W)
        texts = [f"{float(value):.2f}" for value in values]
        texts[0], texts[-1] = (Path(end).name if _is_file(end) else end for end in self.ends)
        name = "-to-".join(file_name(Path(end).stem if _is_file(end) else end) for end in self.ends)
        for suffix, content in (
            ("png", to_png(sheet(list(drawn), texts, self.frames))),
            ("gif", _gif([to_image(torch.cat(list(frame), dim=2)) for frame in drawn])),
        ):
            path = self.folder.path / "pictures" / f"{name}.{suffix}"
            atomic_write(path, content)
            say(str(path))


def encoded(end: str, module: PromptMethod) -> Tensor:
    """An encoded prompt (S, R, D): of a text, or the one in a file."""
    told: Tensor = module.encode(["" if _is_file(end) else end]).float()
    if not _is_file(end):
        return told
    found = read_prompt_embeds(Path(end), module.backbone, told.shape[1:])
    if len(found) != 1:
        raise UserError(
            f"The file {end} has {len(found)} embeddings and a path has one at each end; give a file of the run's folder problems/."
        )
    return next(iter(found.values())).to(told)


def _is_file(end: str) -> bool:
    return end.endswith(".safetensors")


def _gif(frames: list[Image.Image]) -> bytes:
    """There and back, for ever."""
    buffer = io.BytesIO()
    there, back = frames, frames[-2:0:-1]
    there[0].save(buffer, "GIF", save_all=True, append_images=[*there[1:], *back], duration=MILLISECONDS, loop=0)
    return buffer.getvalue()
