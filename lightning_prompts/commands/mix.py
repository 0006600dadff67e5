"""Recombine the prompts of two runs by `evolution`, which selects by the images, and write the best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_prompts.callbacks.scores import Scores
from lightning_prompts.commands.evolution import Member, evolve, fittest
from lightning_prompts.data.images import load_image, to_tensor
from lightning_prompts.errors import UserError, printable
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import default_clip
from lightning_prompts.runs.atomic_io import atomic_write, to_json
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.record import Problem
from lightning_prompts.runs.reports import SCHEMA_VERSION, versions
from lightning_prompts.sampling.figures import sheet, to_image, to_png
from lightning_prompts.sampling.seeding import noise_of
from lightning_prompts.terminal import say

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.methods.inversion.base import Inverter

COLUMNS = 8  # of the figure of a generation


class Parent(NamedTuple):
    """A found prompt to recombine: its run, its record, and the run's data settings."""

    run: RunFolder
    problem: Problem
    data: dict[str, Any]

    def images(self, size: int) -> Tensor:
        """Load the images of the target, (I, 3, H, W) in [-1, 1], as the run did."""
        red, green, blue = self.data["background"]
        paths = map(self.run.saved.located, self.problem.paths)
        images = [load_image(path, size, self.data["fit"], (red, green, blue)) for path in paths]
        return torch.stack([to_tensor(image) for image in images])


def find_parents(runs: Sequence[str]) -> tuple[Parent, Parent]:
    """Return the first prompt of each of two runs; of one run given twice, its first two.

    Raises:
        UserError: A run does not exist or has too few prompts of tokens, or the runs used different models.
    """
    folders = [RunFolder(run) for run in runs]
    settings = [folder.saved.load() for folder in folders]
    backbones = [_backbone(folder, each["model"]["init_args"]) for folder, each in zip(folders, settings, strict=True)]
    if backbones[0] != backbones[1]:
        raise UserError(
            f"The runs {runs[0]} and {runs[1]} used the models {backbones[0]!r} and {backbones[1]!r}, whose tokens "
            "differ; give two runs of one model."
        )
    found = [folder.hard_prompts() for folder in folders]
    same = folders[0].path.resolve() == folders[1].path.resolve()
    if same and len(found[1]) < 2:
        raise UserError(f"The run {runs[0]} has one prompt, and --mix needs two; give two runs.")
    problems = found[0][0], found[1][1 if same else 0]
    data = [each["data"]["init_args"] for each in settings]
    one, other = (Parent(*parts) for parts in zip(folders, problems, data, strict=True))
    return one, other


def _backbone(run: RunFolder, model: dict[str, Any]) -> str:
    """Return the model's name as it was given, a folder as its full path, with the revision."""
    name, revision = str(model["backbone"]["name"]), model["backbone"].get("revision")
    name = str(Path(run.saved.located(name)).resolve()) if Path(run.saved.located(name)).is_dir() else name
    return f"{name} {revision}" if revision else name


class Crossover(pl.Callback):
    """Evolve prompts from two found ones when `predict` ends.

    Writes `generations.json`, `generation-N.png`, `prompt.txt`, `result.json` and images.

    Args:
        folder: The folder to write to.
        parents: The two found prompts.
        generations: Number of generations.
        population: Children per generation.
        select: Prompts that the score keeps for the next generation.
        choose: Whether the `score` chooses the prompts to keep, or a user by `hand`.
        seeds: Seeds of the images that each prompt is scored by.
        negative: Negative prompt of these images.
        scores: The held-out CLIP that scores the prompts kept last.
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
        """Evolve prompts and write the best."""
        if not trainer.is_global_zero:
            return
        size, seed = pl_module.backbone.image_size, pl_module.data.seed
        noise = noise_of(self.seeds, pl_module.backbone.latent_shape).to(pl_module.device)
        clip = ClipSimilarity(default_clip(pl_module.backbone), pl_module.offline).to(pl_module.device)
        self.scores.check_heldout(pl_module, clip)
        self.targets = [parent.images(size) for parent in self.parents]
        self.images: dict[int, Tensor] = {}  # (S, 3, H, W) of each member that may still be selected

        def decode(token_ids: list[int]) -> str | None:
            (found,) = pl_module.prompt.decode(torch.tensor([token_ids]))
            return str(found.prompt) if found.valid else None

        def score(members: list[Member]) -> None:
            texts = [member.prompt for member in members for _ in self.seeds]
            images = pl_module.generate(texts, noise.repeat(len(members), 1, 1, 1), self.negative)
            for member, own in zip(members, images.split(len(self.seeds)), strict=True):
                self.images[member.index] = own
                member.similarities, member.score = joint_similarity(clip, own, self.targets)

        one, other = (parent.problem for parent in self.parents)
        found = tuple(Member(i, str(p.prompt), tuple(p.token_ids or ())) for i, p in enumerate((one, other)))
        key = f"{one.key}+{other.key}"
        sizes, same = (self.generations, self.population), one.key == other.key
        best = evolve(found, decode, score, self.keep, *sizes, seed, key, keep_found=same)  # type: ignore[arg-type]
        if not best:
            raise UserError(
                f"Every recombination of {one.prompt!r} and {other.prompt!r} has other tokens when its text is "
                "encoded; give other runs."
            )
        self._write(pl_module, best, self.scores.heldout(pl_module, clip))

    def keep(self, generation: int, members: list[Member], candidates: list[Member]) -> list[Member]:
        """Write a generation, and return the candidates to keep: the fittest, or those that the user names."""
        atomic_write(self.folder.generations, to_json([asdict(member) for member in members]))
        columns = [images[:1] for images in self.targets] + [self.images[member.index] for member in candidates]
        names = [f"target: {parent.problem.target}" for parent in self.parents]
        path = self.folder.path / f"generation-{generation}.png"
        figure = sheet(columns, [*names, *(f"{m.index} [{m.score:.2f}] {m.prompt}" for m in candidates)], COLUMNS)
        atomic_write(path, to_png(figure))
        best = fittest(candidates, self.select)
        if self.choose == "hand":
            for member in candidates:
                say(f"{member.index}  [{member.score:.2f}]  {member.prompt}")
            best = ask(path, candidates, best)
        else:
            say(f"{path}  [{best[0].score:.2f}]  {best[0].prompt}")
        self.images = {member.index: self.images[member.index] for member in best}
        return best

    def _write(self, module: PromptMethod, best: list[Member], heldout: ClipSimilarity | None) -> None:
        """Write the images, scores and prompts of the members kept last."""
        entries = []
        for rank, member in enumerate(best, start=1):
            images = self.images[member.index]
            for seed, image in zip(self.seeds, images, strict=True):
                atomic_write(self.folder.path / "images" / f"{rank}-seed{seed}.png", to_png(to_image(image)))
            similarities, score = joint_similarity(heldout, images, self.targets) if heldout else (None, None)
            entries.append(asdict(member) | {"heldout_similarities": similarities, "heldout_score": score})
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
        say(f"Results are in {self.folder.path}; look at {self.folder.path / 'images'}")


def joint_similarity(
    clip: ClipSimilarity, images: Tensor, targets: Sequence[Tensor]
) -> tuple[tuple[float, float], float]:
    """Return how similar images (S, 3, H, W) are to two targets (I, 3, H, W) each, all in [-1, 1].

    Returns:
        The mean cosine to each target, and the mean over the images of the smaller of the two cosines. The mean of both
        cosines would not do, as an image of one target alone can raise it; nor would the smaller mean, as every second
        image could show the other target.
    """
    features = clip.features(images)
    cosines = torch.stack([(features @ clip.features(target).T).mean(1) for target in targets], dim=1)  # (S, 2)
    one, other = cosines.mean(0).tolist()
    return (one, other), float(cosines.amin(1).mean())


def ask(path: Path, candidates: Sequence[Member], best: list[Member]) -> list[Member]:
    """Ask the user which members to keep until the answer is numbers of the figure, or empty for the score's choice.

    Returns:
        The members to keep, best first.

    Raises:
        EOFError: The input has ended.
    """
    by_index, default = {member.index: member for member in candidates}, " ".join(str(member.index) for member in best)
    while True:
        answer = (
            input(printable(f"Look at {path}. Which do you keep, best first? [{default}] ")).replace(",", " ").split()
        )
        if all(re.fullmatch(r"[0-9]{1,9}", word) and int(word) in by_index for word in answer):
            return [by_index[number] for number in dict.fromkeys(map(int, answer))] or best
        say(
            f"Give numbers from {min(by_index)} to {max(by_index)} that are in the figure, such as {default}, or an "
            "empty line for these."
        )
