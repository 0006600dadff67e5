"""What a person gets: pictures drawn from the found text, its scores, the grid and the files to paste or load."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.callbacks.grid import grid, regenerate, to_image, to_png
from lightning_prompts.errors import UserError
from lightning_prompts.metrics import ClipImageSimilarity, WordRecall, lpips_lacks, perceptual_distance
from lightning_prompts.objectives.clip import clip_of
from lightning_prompts.problems import Problem, RunFolder, atomic_write, versions
from lightning_prompts.ranks import wait_for_all

REGENERATIONS = 4
SHOWN = 24  # problems in the grid


class Results(pl.Callback):
    """Writes `result.json`, `prompt.txt`, `grid.png` and `embedding.safetensors` when `fit` or `test` ends.

    The held-out scorer speaks here only, after everything has been selected.

    Args:
        scorer: Folder or hub id of the CLIP that scores and takes no part in any search; None for the embedded model's own
            on the embedded model, and for no held-out score elsewhere.
        seeds: Seeds that `predict` draws pictures from.
        settings: What to record as the run's settings.
        prompts: What `predict` draws instead of the found prompts.
        negative: What `predict` leads away from.
    """

    def __init__(
        self,
        scorer: str | None = None,
        seeds: Sequence[int] = (0,),
        settings: dict[str, Any] | None = None,
        prompts: Sequence[str] = (),
        negative: str = "",
    ) -> None:
        self.scorer, self.seeds, self.settings = scorer, tuple(seeds), settings or {}
        self.prompts, self.negative = tuple(prompts), negative

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Scores and writes."""
        self._finish(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws again from the text, scores and writes."""
        self._finish(trainer, pl_module)
        if reason := lpips_lacks():
            print(reason)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws one picture a prompt and seed."""
        folder: RunFolder = trainer.datamodule.folder  # type: ignore[attr-defined]
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        texts = {file_name(text): text for text in self.prompts}
        texts = texts or {problem.key: str(problem.prompt) for problem in _found(trainer)}
        without = f"-without-{file_name(self.negative)}" if self.negative else ""
        for name, text in texts.items():
            pictures = pl_module.draw([text] * len(self.seeds), noise, self.negative)
            for seed, picture in zip(self.seeds, pictures, strict=True):
                path = folder.path / "pictures" / f"{name}{without}-seed{seed}.png"
                atomic_write(path, to_png(to_image(picture)))
                print(f"{path}  {text}")

    def _finish(self, trainer: pl.Trainer, module: Any) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        wait_for_all()
        if not trainer.is_global_zero:
            return
        found = data.folder.load()  # by other ranks too
        data.records.update({key: found[key] for key in data.records if key in found})
        problems = _found(trainer)
        if problems:
            drawn = regenerate(module, problems, REGENERATIONS)
            try:
                self._score(module, data, problems, drawn)
            except UserError as error:  # the prompts are found all the same
                print(f"The pictures are not scored: {error}", file=sys.stderr)
            targets = [several[0] for several in data.pictures(problems[:SHOWN])]
            atomic_write(data.folder.grid, to_png(grid(targets, drawn[:SHOWN], problems[:SHOWN])))
            self._export(module, data.folder, problems)
            if trainer.logger:
                trainer.logger.experiment.add_images("regenerations", (torch.cat(list(drawn)) + 1) / 2)  # type: ignore[attr-defined]
        for problem in problems:
            data.folder.save(problem)
        data.folder.write_result(type(module).__name__, module.backbone.name, data.seed, self.settings, versions())
        _report(data.folder, list(data.records.values()))

    def _score(self, module: Any, data: Any, problems: list[Problem], drawn: Tensor) -> None:
        name = module.backbone.name
        own, heldout = (
            ClipImageSimilarity(clip_of(name), module.offline),
            heldout_clip(name, self.scorer, module.offline),
        )
        words = WordRecall(_synonyms(name))
        for problem, pictures, target in zip(problems, drawn, data.pictures(problems), strict=True):
            problem.clip_similarity = float(own(pictures, target))
            problem.heldout_clip_similarity = float(heldout(pictures, target)) if heldout else None
            problem.lpips = perceptual_distance(pictures, target)
            if problem.caption:
                problem.word_recall = float(words([str(problem.prompt)], [problem.caption]))

    def _export(self, module: Any, folder: RunFolder, problems: list[Problem]) -> None:
        """The found tokens' embeddings (M, D), one tensor a problem."""
        tensors = {problem.key: module.embedded(problem).float().cpu().contiguous() for problem in problems}
        prompts = {problem.key: str(problem.prompt) for problem in problems}
        atomic_write(folder.embedding, save(tensors, {"format": "pt", "backbone": module.backbone.name, **prompts}))


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (S, C, h, w) of seeds that a person gives."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def heldout_clip(backbone: str, scorer: str | None, offline: bool) -> ClipImageSimilarity | None:
    """The CLIP that takes no part in any search, as far as there is one."""
    name = scorer or (str(EMOJI.parent / "scorer") if backbone == "emoji" else None)
    return ClipImageSimilarity(name, offline) if name else None


def file_name(text: str) -> str:
    """A name of at most 45 letters, digits and dashes for what is drawn from a text; other texts have others."""
    start = re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _found(trainer: pl.Trainer) -> list[Problem]:
    records = trainer.datamodule.records.values()  # type: ignore[attr-defined]
    return [problem for problem in records if problem.prompt and problem.status != "failed"]


def _synonyms(backbone: str) -> dict[str, tuple[str, ...]]:
    if backbone != "emoji":
        return {}
    from lightning_prompts.emoji.world import SYNONYMS

    return SYNONYMS


def _report(folder: RunFolder, problems: list[Problem]) -> None:
    for problem in problems:
        note = f"  ({problem.status}: {problem.reason})" if problem.reason else ""
        score = "" if problem.clip_similarity is None else f"  [similarity {problem.clip_similarity:.2f}]"
        print(f"{problem.target}: {problem.prompt or '-'}{score}{note}")
    print(
        f"Results are in {folder.path}; look at {folder.grid}"
        if folder.grid.exists()
        else f"Results are in {folder.path}"
    )
