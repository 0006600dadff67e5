"""Measure uses of found prompts: `python benchmarks/uses.py evolution` and `python benchmarks/uses.py removal`.

`evolution` mixes the prompts of pairs of targets and measures by the held-out CLIP how similar the images are to both
of them. `removal` generates images from texts and found prompts for two objects, with and without the prompt found for
one of them as the negative prompt, and counts the objects that the held-out CLIP recognizes; it renders scenes (needs
the font and the `emoji` package). Settings of `fit` follow the options. Both print one table with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from inversion import TARGETS, alone, fit, has, interval, share
from make_targets import outside
from PIL import Image
from torch import Tensor

from lightning_prompts.backbones import EMOJI
from lightning_prompts.commands.main import main as lightning_prompts
from lightning_prompts.commands.mix import joint_similarity
from lightning_prompts.data.images import to_tensor
from lightning_prompts.emoji import world
from lightning_prompts.methods import PH2P
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.sampling import SamplerSettings
from lightning_prompts.sampling.seeding import noise_of

SEEDS = {"evaluation": 20_261_121, "development": 20_261_125}  # scenes with two objects
FIRST = 1000  # first seed of the scored images; the evolution selects on others
NUM_IMAGES = 4  # images per prompt
NEAREST = 3  # an object is recognized if its name is among this many closest to the image


def listed(paths: list[Path]) -> list[dict[str, str]]:
    """Return images in the form that `fit` takes."""
    return [{"file": str(path)} for path in paths]


def evolution(args: argparse.Namespace, extra: list[str], scratch: Path) -> dict[str, str]:
    """Mix the prompts of targets 0 and 1, 2 and 3, and so on."""
    folder = (TARGETS / args.targets).resolve()
    images = sorted(folder.glob("*.png"))[: 2 * args.count]
    words = json.loads((folder / "words.json").read_text())
    problems = fit(args.config, listed(images), scratch / "run", extra)
    runs = [alone(scratch / "run", problem, scratch / problem["target"]) for problem in problems]
    found = [str(problem["prompt"]) for problem in problems]
    mixed, named = [], []
    for one in range(0, len(runs), 2):
        mix = scratch / f"mix{one}"
        command = ["predict", "--mix", *runs[one : one + 2], "--run", str(mix), "--seeds", args.seeds]
        lightning_prompts([*command, "--generations", str(args.generations), "--population", str(args.population)])
        mixed.append(json.loads((mix / "result.json").read_text())["prompts"][0]["prompt"])
        expected = [words[path.name] for path in images[one : one + 2]]
        named.append(all(any(has(mixed[-1], word) for word in some.values()) for some in expected))
    module, scorer = PH2P(), ClipSimilarity(str(EMOJI.parent / "scorer"))
    noise = noise_of(range(FIRST, FIRST + NUM_IMAGES), module.backbone.latent_shape)
    drawn = {text: module.generate([text] * NUM_IMAGES, noise) for text in {*found, *mixed}}
    targets = [to_tensor(Image.open(path).convert("RGB")).unsqueeze(0) for path in images]
    own, parents, joined, unrelated = [], [], [], []
    for pair, text in enumerate(mixed):
        here = [2 * pair, 2 * pair + 1]
        both = [targets[i] for i in here]
        own.append(joint_similarity(scorer, drawn[text], both)[1])
        parents.append(max(joint_similarity(scorer, drawn[found[i]], both)[1] for i in here))
        joined.append(
            joint_similarity(scorer, module.generate([", ".join(found[i] for i in here)] * NUM_IMAGES, noise), both)[1]
        )
        others = [joint_similarity(scorer, drawn[text], both)[1] for i, text in enumerate(found) if i not in here]
        unrelated.append(sum(others) / len(others))
    return {
        "pairs": f"{args.targets}, {len(mixed)}",
        "best mixtures that name an object or background of both targets": share(named),
        "similarity of the best mixture": interval(own),
        "of the two prompts joined by a comma": interval(joined),
        "of the better one of the two prompts": interval(parents),
        "of the prompts of the other targets": interval(unrelated),
        "best mixture minus other targets' prompts": interval([a - b for a, b in zip(own, unrelated, strict=True)]),
        "best mixture minus the joined prompts": interval([a - b for a, b in zip(own, joined, strict=True)]),
    }


class Recognizer:
    """The held-out CLIP, which returns the objects closest to an image, on any background."""

    def __init__(self) -> None:
        self.scorer, self.names = ClipSimilarity(str(EMOJI.parent / "scorer")), list(world.OBJECTS)
        texts = [f"{name}, {color} background" for name in self.names for color in world.COLORS]
        with torch.no_grad():
            features = self.scorer.features_of(texts)
        self.text_features = features.view(len(self.names), len(world.COLORS), -1)

    def __call__(self, images: Tensor, name: str) -> float:
        """Return the share of images (B, 3, H, W) in which an object is recognized."""
        cosines = torch.einsum("be,nce->bnc", self.scorer.features(images), self.text_features).amax(2)
        nearer = (cosines > cosines[:, [self.names.index(name)]]).sum(1)
        return float((nearer < NEAREST).float().mean())


def lone(name: str, index: int) -> Image.Image:
    """Render an object alone in the middle of an image."""
    color = list(world.COLORS)[index % len(world.COLORS)]
    other = list(world.COLORS)[(index + 1) % len(world.COLORS)]
    return world.render(
        world.Scene(name, other if name in world.SHAPES else None, "plain", color, "large", "center", "plain", index)
    )


def removal(args: argparse.Namespace, extra: list[str], scratch: Path) -> dict[str, str]:
    """Generate images of two objects and remove the second."""
    rows = [row for row in outside(SEEDS[args.targets], 40) if "second" in row[2]][: args.count]
    cases = [(words["object"], words["second"]) for _, _, words in rows]
    both, unwanted, wanted = (
        [scratch / f"{kind}{i}.png" for i in range(len(rows))] for kind in ("both", "bad", "good")
    )
    for i, ((image, _, _), (good, bad)) in enumerate(zip(rows, cases, strict=True)):
        image.save(both[i])
        lone(bad, i).save(unwanted[i])
        lone(good, i).save(wanted[i])
    removed = [str(p["prompt"]) for p in fit(args.config, listed(unwanted), scratch / "unwanted", extra)]
    plain = [str(p["prompt"]) for p in fit(args.config, listed(both), scratch / "both", extra)]
    against = []
    for i in range(len(rows)):
        negative = [
            "--data.negative_images",
            str(unwanted[i]),
            "--model.loss_weights.negative",
            str(args.negative_weight),
        ]
        (problem,) = fit(args.config, listed(both[i : i + 1]), scratch / f"against{i}", [*extra, *negative])
        against.append(str(problem["prompt"]))
    module, recognize, table = PH2P(sampler=SamplerSettings(guidance_scale=args.guidance_scale)), Recognizer(), {}

    def measure(name: str, images: list[Tensor]) -> None:
        seen = [[recognize(some, case[which]) for some, case in zip(images, cases, strict=True)] for which in (0, 1)]
        table[name] = f"{interval(seen[0])} | {interval(seen[1])}"

    def drawn(texts: list[list[str]], negatives: list[str]) -> list[Tensor]:
        images = []
        for i, (several, negative) in enumerate(zip(texts, negatives, strict=True)):
            noise = noise_of(range(FIRST + NUM_IMAGES * i, FIRST + NUM_IMAGES * (i + 1)), module.backbone.latent_shape)
            images.append(torch.cat([module.generate([text] * NUM_IMAGES, noise, negative) for text in several]))
        return images

    def load(paths: list[Path]) -> list[Tensor]:
        return [to_tensor(Image.open(path).convert("RGB")).unsqueeze(0) for path in paths]

    nothing = [""] * len(cases)
    texts = [[f"{good} {bad}", f"{bad} {good}"] for good, bad in cases]
    demands = [[f"a {bad} on a red background"] for _, bad in cases]
    found, led = [[text] for text in plain], [[text] for text in against]
    measure("rendered, the wanted object alone", load(wanted))
    measure("rendered, the unwanted object alone", load(unwanted))
    measure("rendered, both", load(both))
    measure("prompt with both names", drawn(texts, nothing))
    measure("prompt with both names, negative prompt: the unwanted name", drawn(texts, [bad for _, bad in cases]))
    measure("prompt with both names, negative prompt: found for the unwanted object", drawn(texts, removed))
    measure("prompt with the unwanted name", drawn(demands, nothing))
    measure("prompt with the unwanted name, negative prompt: found for the unwanted object", drawn(demands, removed))
    measure("prompt found for an image of both", drawn(found, nothing))
    measure("prompt found for an image of both, negative prompt: found for the unwanted object", drawn(found, removed))
    measure("prompt found for an image of both, with the unwanted object as negative image", drawn(led, nothing))
    print(*zip(cases, removed, plain, against, strict=True), sep="\n")
    return table


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("use", choices=["evolution", "removal"])
    parser.add_argument("--config", default="configs/ph2p.yaml")
    parser.add_argument("--targets", default="evaluation", choices=["evaluation", "development"])
    parser.add_argument("--count", type=int, default=10, help="pairs, or scenes with two objects")
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--seeds", default="0,1", help="seeds of the images by which the evolution selects")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--negative-weight", type=float, default=0.2)
    args, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = (evolution if args.use == "evolution" else removal)(args, extra, Path(scratch))
    print(
        "| | wanted recognized | unwanted recognized |\n|---|---|---|" if args.use == "removal" else "| | |\n|---|---|"
    )
    for name, value in table.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
