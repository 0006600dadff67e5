"""Measure how far images are from those of diffusers' pipelines: `python benchmarks/pipelines.py`.

Generates images with this package and with diffusers' own pipeline of each model, from the same latents and prompts,
for all combinations of scheduler, guidance and prompt length, and prints the largest absolute difference of a pixel in
[0, 1] for each model. All models have random weights: those of `tests/families.py` and, if the folder `shared` is next
to the checkout, reduced models with published configurations and tokenizers. Combinations that diffusers' pipeline
refuses are left out.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import tables
import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone, load_backbone
from lightning_prompts.backbones.sampling_loop import generators_of
from lightning_prompts.backbones.schedulers import exchangeable
from lightning_prompts.backbones.vocabulary import token_lists

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
FIGURES = Path(__file__).parent / "figures" / "pipelines.csv"
STEPS, GUIDANCE, LENGTHS = 4, (1.0, 5.0), ("short", "long")
SHORT = ["a red square", "two dogs and a Cat"]
WORDS = "a photo of a small cat in the top left corner beside a large tree on a blue background".split()


def prompts_of(backbone: Backbone, length: str) -> list[str]:
    """Return two prompts, short ones or ones that nearly fill the searched text encoders."""
    if length == "short":
        return SHORT
    tokenizer, most = backbone.vocabulary.tokenizer, backbone.vocabulary.length
    found = []
    for start in (0, 5):
        texts = [" ".join((WORDS * most)[start:end]) for end in range(start + 1, start + most)]
        lengths = [len(ids) for ids in token_lists(tokenizer, texts, add_special_tokens=True)]
        found.append(texts[bisect_right(lengths, most) - 1])
    return found


@torch.no_grad()
def ours(backbone: Backbone, texts: Sequence[str], noise: Tensor, guidance: float) -> Tensor:
    """Draw images (B, 3, H, W) in [0, 1] with this package."""
    prompt, negative = backbone.encode_text(texts), backbone.encode_text([""], negative=True)
    return backbone.decode(backbone.sample(prompt, negative, noise, STEPS, guidance)) / 2 + 0.5


def theirs(pipeline: Any, texts: Sequence[str], noise: Tensor, guidance: float, size: int) -> Tensor:
    """Draw images (B, 3, H, W) in [0, 1] with diffusers' pipeline."""
    how: dict[str, Any] = {"height": size, "width": size, "guidance_scale": guidance, "num_inference_steps": STEPS}
    if isinstance(pipeline, diffusers.FluxPipeline):
        noise = pipeline._pack_latents(noise, *noise.shape[:2], *noise.shape[2:])
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        how |= {"use_resolution_binning": False, "clean_caption": False}
    # The latents seed the noise that samplers add at each step.
    images: Tensor = pipeline(
        list(texts), latents=noise, generator=generators_of(noise), output_type="pt", **how
    ).images
    return images


def compare(
    name: str, folder: Path, size: int, schedulers: Sequence[str] | None = None, guidance: Sequence[float] = GUIDANCE
) -> list[dict[str, Any]]:
    """Compare a model's images for all combinations.

    Args:
        name: Name of the model.
        folder: Folder of the model.
        size: Height and width of the images, in pixels.
        schedulers: Scheduler classes; None for all that the model supports.
        guidance: Guidance scales.

    Returns:
        One row per combination, with the largest absolute difference of a pixel and, for scale, the one between the
        images of two prompts.
    """
    index = json.loads((folder / "model_index.json").read_text())
    unused = dict.fromkeys({"safety_checker", "feature_extractor"} & set(index))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **unused)
    pipeline.set_progress_bar_config(disable=True)
    own, rows, between = pipeline.scheduler, [], 0.0
    for scheduler in schedulers or exchangeable(own):
        other = scheduler != type(own).__name__
        backbone = load_backbone(str(folder), scheduler=scheduler if other else None, image_size=size)
        pipeline.scheduler = own
        if other:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config, **unclipped(own, scheduler))
        noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        for scale, length in itertools.product(guidance, LENGTHS):
            texts = prompts_of(backbone, length)
            try:
                expected = theirs(pipeline, texts, noise, scale, size)
            except (TypeError, ValueError):  # the pipeline does not support this scheduler
                continue
            found = ours(backbone, texts, noise, scale)
            between = between or float((ours(backbone, texts[::-1], noise, scale) - found).abs().max())
            difference = float((found - expected).abs().max())
            rows.append({
                "model": name, "scheduler": scheduler, "guidance": scale, "prompt": length, "difference": difference,
                "between_prompts": between,
            })  # fmt: skip
    return rows


def unclipped(own: Any, scheduler: str) -> dict[str, bool]:
    """Return the values that keep a class from clipping latents by default."""
    taken = getattr(diffusers, scheduler)._get_init_keys(getattr(diffusers, scheduler))
    return {key: bool(own.config.get(key)) for key in ("clip_sample", "thresholding") if key in taken}


def models() -> dict[str, tuple[Callable[[Path], Path], int]]:
    """Return, for each model, a function that writes it into a folder, and its image size in pixels."""
    sys.path[:0] = [str(ROOT / "tests"), str(SHARED / "tools")]
    families = importlib.import_module("families")
    found: dict[str, tuple[Callable[[Path], Path], int]] = {
        f"{name}, small": (partial(families.save, name), 16) for name in families.BUILD
    }
    if SHARED.is_dir():
        published = importlib.import_module("published")
        found |= {
            f"{name}, published": (partial(published.build, name, clip=False), 128) for name in published.NAMES
        }  # at 64 pixels the UNets' innermost norms have two numbers per group, whose signs a rounding error can flip
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per model."""
    lines = ["| model | schedulers | cells | between two prompts | from diffusers, at most |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == model]
        schedulers = {row["scheduler"] for row in some}
        worst = max(*(row["difference"] for row in some), 1e-6)  # figures have six decimals
        lines.append(f"| {model} | {len(schedulers)} | {len(some)} | {some[0]['between_prompts']:.0e} | {worst:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # networks this small do not benefit from a second one
    FIGURES.unlink(missing_ok=True)
    for name, (build, size) in models().items():
        with tempfile.TemporaryDirectory() as folder:
            tables.add(FIGURES, compare(name, build(Path(folder)), size))
            print(name, flush=True)
    print(table(tables.read(FIGURES)))


if __name__ == "__main__":
    main()
