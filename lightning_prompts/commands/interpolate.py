"""Interpolate between two prompts: generate images from encoded prompts on the arc between them (arXiv 2308.12059)."""

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
from lightning_prompts.callbacks.image_writer import file_name
from lightning_prompts.embeddings import slerp
from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.sampling.figures import sheet, to_image, to_png
from lightning_prompts.sampling.seeding import noise_of
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

FRAME_MILLISECONDS = 150


class Interpolate(pl.Callback):
    """Write a grid with a row per seed, and an animation there and back, when `predict` ends.

    Args:
        folder: Folder of the run, whose `images/` gets the files.
        first: A prompt, or a safetensors file with one encoded prompt.
        last: The same for the other end.
        seeds: Seeds of the images.
        frames: Images per seed, the two ends included.

    Raises:
        UserError: There are fewer than two frames.
    """

    def __init__(self, folder: RunFolder, first: str, last: str, seeds: Sequence[int] = (0,), frames: int = 12) -> None:
        if frames < 2:
            raise UserError(
                f"--frames must be at least 2 for the two ends of --path, got {frames}; give --frames 2 or more."
            )
        self.folder, self.ends, self.seeds, self.frames = folder, (first, last), tuple(seeds), frames

    def on_predict_end(self, trainer: pl.Trainer, pl_module: PromptMethod) -> None:
        """Generate the images and write the files."""
        if not trainer.is_global_zero:
            return
        first, last = (encode_end(end, pl_module) for end in self.ends)
        if len(first) != len(last):  # only one of them has negative embeddings
            empty = pl_module.encode([""], negative=True).to(first)
            first, last = (embeds if len(embeds) == 2 else torch.cat([embeds, empty]) for embeds in (first, last))
        weights = torch.linspace(0, 1, self.frames, device=first.device)
        embeds = torch.stack([slerp(first, last, float(weight)) for weight in weights])
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        images = pl_module.sampler.generate_from_embeds(
            embeds, noise.expand(self.frames, *noise.shape)
        )  # (F, N, 3, H, W)
        texts = [f"{float(weight):.2f}" for weight in weights]
        texts[0], texts[-1] = (Path(end).name if _is_file(end) else end for end in self.ends)
        name = "-to-".join(file_name(Path(end).stem if _is_file(end) else end) for end in self.ends)
        for suffix, content in (
            ("png", to_png(sheet(list(images), texts, self.frames))),
            ("gif", _to_gif([to_image(torch.cat(list(frame), dim=2)) for frame in images])),
        ):
            path = self.folder.path / "images" / f"{name}.{suffix}"
            atomic_write(path, content)
            say(str(path))


def encode_end(end: str, module: PromptMethod) -> Tensor:
    """Encode a prompt, or read an encoded one from a file.

    Returns:
        (S, R, D) float32: positive embeddings and, for S = 2, negative ones.

    Raises:
        UserError: The file cannot be read or has more than one encoded prompt.
    """
    prompt_embeds: Tensor = module.encode(["" if _is_file(end) else end]).float()
    if not _is_file(end):
        return prompt_embeds
    saved = read_prompt_embeds(Path(end), module.backbone, prompt_embeds.shape[1:])
    if len(saved) != 1:
        raise UserError(
            f"The file {end} has {len(saved)} embeddings, but each end of --path needs exactly one; give a file in the "
            "problems/ of a run."
        )
    return next(iter(saved.values())).to(prompt_embeds)


def _is_file(end: str) -> bool:
    return end.endswith(".safetensors")


def _to_gif(frames: list[Image.Image]) -> bytes:
    """Encode an animation that plays forward and backward forever."""
    buffer = io.BytesIO()
    backward = frames[-2:0:-1]
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=[*frames[1:], *backward], duration=FRAME_MILLISECONDS, loop=0
    )
    return buffer.getvalue()
