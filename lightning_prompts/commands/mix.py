"""Mixes the prompts of two runs: draws, scores, asks and writes what `evolution` breeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.callbacks.results import noise_of
from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.commands.evolution import Member, evolve, fittest
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.errors import UserError, printable
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import clip_of
from lightning_prompts.runs.atomic_io import atomic_write, to_json
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.reports import SCHEMA_VERSION, versions
from lightning_prompts.sampling.figures import sheet, to_image, to_png
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.methods.inversion.base import Inverter

ACROSS = 8  # prompts beside each other in a generation's picture


class Parent(NamedTuple):
    """A found prompt to mix: its run, its record and the settings that its pictures were read with."""

    run: RunFolder
    problem: Problem
    data: dict[str, Any]

    def pictures(self, size: int) -> Tensor:
        """The target's pictures (I, 3, H, W) in [-1, 1]."""
        red, green, blue = self.data["background"]
        paths = map(self.run.located, self.problem.paths)
        images = [load_image(path, size, self.data["fit"], (red, green, blue)) for path in paths]
        return torch.stack([to_tensor(image) for image in images])


def parents_of(runs: Sequence[str]) -> tuple[Parent, Parent]:
    """The first prompt of each of two runs; of one run named twice, its first two."""
    several = [RunFolder(run) for run in runs]
    settings = [run.saved_settings() for run in several]
    backbones = [_backbone(run, one["model"]["init_args"]) for run, one in zip(several, settings, strict=True)]
    if backbones[0] != backbones[1]:
        raise UserError(
            f"The runs {runs[0]} and {runs[1]} are of the models {backbones[0]!r} and {backbones[1]!r}, whose tokens differ; "
            "give two runs of one model."
        )
    found = [run.hard_prompts() for run in several]
    twice = several[0].path.resolve() == several[1].path.resolve()
    if twice and len(found[1]) < 2:
        raise UserError(f"The run {runs[0]} has one prompt and two are mixed; give two runs.")
    problems = found[0][0], found[1][1 if twice else 0]
    data = [one["data"]["init_args"] for one in settings]
    one, other = (Parent(*parts) for parts in zip(several, problems, data, strict=True))
    return one, other


def _backbone(run: RunFolder, model: dict[str, Any]) -> str:
    """The model as it was named, a folder by its full path, with its revision."""
    name, revision = str(model["backbone"]["name"]), model["backbone"].get("revision")
    name = str(Path(run.located(name)).resolve()) if Path(run.located(name)).is_dir() else name
    return f"{name} {revision}" if revision else name


class Mix(pl.Callback):
    """Writes `generations.json`, `generation-N.png`, `prompt.txt`, `result.json` and pictures when `predict` ends.

    Args:
        folder: Where.
        parents: The two found prompts.
        generations: How often the chosen prompts have children.
        population: Children of a generation.
        select: How many prompts the score keeps for the next generation.
        choose: Whether the `score` chooses, or a person by `hand`.
        seeds: Seeds of the pictures that each prompt is drawn and scored on.
        negative: What the drawing leads away from.
        scores: Says which CLIP has taken no part, and judges the prompts that are kept.
    """

    def __init__(
        self,
        folder: RunFolder,
        parents: tuple[Parent, Parent],
        generations: int = 4,
        population: int = 16,
        select: int = 4,
        choose: Literal["score", "hand"] = "score",
        seeds: Sequence[int] = (0, 1, 2, 3),
        negative: str = "",
        scores: Scores | None = None,
    ) -> None:
        self.folder, self.parents, self.scores = folder, parents, scores or Scores()
        self.generations, self.population, self.select, self.choose = generations, population, select, choose
        self.seeds, self.negative = tuple(seeds), negative

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Inverter) -> None:
        """Evolves and writes."""
        if not trainer.is_global_zero:
            return
        size, seed = pl_module.backbone.image_size, pl_module.data.seed
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        clip = ClipSimilarity(clip_of(pl_module.backbone), pl_module.offline).to(pl_module.device)
        self.scores.check_heldout(pl_module, clip)
        self.targets = [parent.pictures(size) for parent in self.parents]
        self.drawn: dict[int, Tensor] = {}  # pictures (S, 3, H, W) of those that may still be chosen

        def read(token_ids: list[int]) -> str | None:
            (found,) = pl_module.written(torch.tensor([token_ids]))
            return str(found.prompt) if found.sound else None

        def score(members: list[Member]) -> None:
            texts = [member.prompt for member in members for _ in self.seeds]
            drawn = pl_module.draw(texts, noise.repeat(len(members), 1, 1, 1), self.negative)
            for member, pictures in zip(members, drawn.split(len(self.seeds)), strict=True):
                self.drawn[member.index] = pictures
                member.similarities, member.score = likeness(clip, pictures, self.targets)

        one, other = (parent.problem for parent in self.parents)
        found = tuple(Member(i, str(p.prompt), tuple(p.token_ids or ())) for i, p in enumerate((one, other)))
        key = f"{one.key}+{other.key}"
        extent = self.generations, self.population
        best = evolve(found, read, score, self.keep, *extent, seed, key, keep_found=one.key == other.key)  # type: ignore[arg-type]
        if not best:
            raise UserError(
                f"No mixture of {one.prompt!r} and {other.prompt!r} can be written down and read again; give other runs."
            )
        self._finish(pl_module, best, self.scores.heldout(pl_module, clip))

    def keep(self, generation: int, everyone: list[Member], candidates: list[Member]) -> list[Member]:
        """Shows a generation, and keeps the fittest or whom the person names."""
        atomic_write(self.folder.generations, to_json([asdict(member) for member in everyone]))
        columns = [pictures[:1] for pictures in self.targets] + [self.drawn[member.index] for member in candidates]
        names = [f"target: {parent.problem.target}" for parent in self.parents]
        path = self.folder.path / f"generation-{generation}.png"
        shown = sheet(columns, [*names, *(f"{m.index} [{m.score:.2f}] {m.prompt}" for m in candidates)], ACROSS)
        atomic_write(path, to_png(shown))
        best = fittest(candidates, self.select)
        if self.choose == "hand":
            for member in candidates:
                say(f"{member.index}  [{member.score:.2f}]  {member.prompt}")
            best = ask(path, candidates, best)
        else:
            say(f"{path}  [{best[0].score:.2f}]  {best[0].prompt}")
        self.drawn = {member.index: self.drawn[member.index] for member in best}
        return best

    def _finish(self, module: PromptMethod, best: list[Member], heldout: ClipSimilarity | None) -> None:
        entries = []
        for rank, member in enumerate(best, start=1):
            pictures = self.drawn[member.index]
            for seed, picture in zip(self.seeds, pictures, strict=True):
                atomic_write(self.folder.path / "pictures" / f"{rank}-seed{seed}.png", to_png(to_image(picture)))
            judged = likeness(heldout, pictures, self.targets) if heldout else (None, None)
            entry = asdict(member) | {"heldout_similarities": judged[0], "heldout_score": judged[1]}
            entries.append(entry)
        names = ("generations", "population", "select", "choose", "seeds", "negative")
        targets = [
            {"run": str(parent.run.path), "target": parent.problem.target, "key": parent.problem.key}
            for parent in self.parents
        ]
        result = {
            "schema_version": SCHEMA_VERSION,
            "method": "Mix",
            "backbone": module.backbone.name,
            "seed": module.data.seed,
            "settings": {name: getattr(self, name) for name in names},
            "versions": versions(),
            "targets": targets,
            "prompts": entries,
        }
        atomic_write(self.folder.result, to_json(result))
        lines = [" ".join(member.prompt.splitlines()) + "\n" for member in best]
        atomic_write(self.folder.prompt, "".join(lines).encode(errors="backslashreplace"))
        say(f"Results are in {self.folder.path}; look at {self.folder.path / 'pictures'}")


def likeness(clip: ClipSimilarity, drawn: Tensor, targets: Sequence[Tensor]) -> tuple[tuple[float, float], float]:
    """How much pictures (S, 3, H, W) look like two targets (I, 3, H, W) each, all in [-1, 1].

    Returns:
        The mean cosine to either target, and the mean over the pictures of the smaller of the two: a picture of one target
        alone is no mixture, whatever it gains in the mean of both, and nor is every second picture of the other one.
    """
    seen = clip.features(drawn)
    cosines = torch.stack([(seen @ clip.features(pictures).T).mean(1) for pictures in targets], dim=1)  # (S, 2)
    one, other = cosines.mean(0).tolist()
    return (one, other), float(cosines.amin(1).mean())


def ask(path: Path, candidates: Sequence[Member], best: list[Member]) -> list[Member]:
    """Whom a person wants to keep, best first; asks until the answer is numbers that are shown, or empty for the score's choice."""
    known, default = {member.index: member for member in candidates}, " ".join(str(member.index) for member in best)
    while True:
        answer = (
            input(printable(f"Look at {path}. Which do you keep, best first? [{default}] ")).replace(",", " ").split()
        )
        if all(re.fullmatch(r"[0-9]{1,9}", word) and int(word) in known for word in answer):
            return [known[number] for number in dict.fromkeys(map(int, answer))] or best
        say(
            f"Give numbers from {min(known)} to {max(known)} that are in the picture, such as {default}, or nothing for these."
        )
