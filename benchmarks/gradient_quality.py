"""Measure what the shortcut text gradient predicts: `python benchmarks/gradient_quality.py`.

Run `python benchmarks/word_search.py` first.

In the spaces that word_search.py enumerates, a word of a random candidate is replaced by another with as many tokens.
The gradient at the candidate predicts the change of the loss, and the tables have the true change. Prints the rank
correlation of both over all such replacements, as the mean over prompts with its 95% interval, by the number of
denoiser calls before the gradient and with it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from inversion import interval
from prompt_pool import sample_prompts
from scipy.stats import spearmanr
from torch import Tensor
from word_search import PROMPTS, SCHEDULE, SEED, SETTINGS, Small, Table, enumerated

from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.sampling.seeding import SEARCH, draw_noise

CANDIDATES = 6
CALLS = [*((before, 1) for before in range(8)), (4, 4), (0, 8)]  # calls before the gradient, and calls with it, of 8


def changes(method: Small, table: Table, choice: list[int], before: int, grad_steps: int) -> list[tuple[float, float]]:
    """Return predicted and true changes of the loss for each replacement of a word by one with as many tokens."""
    space, words = method.prompt.spaces[0], method.prompt.word_ids[0]
    ids = [encode_text(method.vocabulary.tokenizer, [text], method.vocabulary.length) for text in space.texts(choice)]
    embeddings = [method.prompt.table[row].clone().requires_grad_() for row in ids]
    prompt_embeds, negative_prompt_embeds = (
        method.backbone.encode(*pair) for pair in zip(ids, embeddings, strict=True)
    )
    method.grad_steps = grad_steps
    loss = method.shortcut_loss(torch.tensor([0]), prompt_embeds, negative_prompt_embeds, before + grad_steps)
    slopes: tuple[Tensor, ...] = torch.autograd.grad(loss.sum(), embeddings)
    now, pairs = mean(table, space.texts(choice)), []
    for slope, embedded, parts in zip(slopes, embeddings, space.parts(choice), strict=True):
        place = 1
        for part in parts:
            count, here = len(method.prompt.tokens(part.text)), part.slot
            for number, other in enumerate([] if here is None else words[here]):
                replaced = [number if slot == here else word for slot, word in enumerate(choice)]
                if len(other) == count and replaced != choice:
                    step = method.prompt.table[torch.tensor(other)] - embedded[0, place : place + count].detach()
                    predicted = float((step * slope[0, place : place + count]).sum())
                    pairs.append((predicted, mean(table, space.texts(replaced)) - now))
            place += count
    return pairs


def mean(table: Table, texts: tuple[str, str]) -> float:
    """Return the mean loss of a candidate over its seeds."""
    return sum(table[texts]) / len(table[texts])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/word_search"))
    args = parser.parse_args()
    method, correlations = Small(schedule=SCHEDULE, **SETTINGS), {calls: list[float]() for calls in CALLS}
    for one in sample_prompts(SEED, PROMPTS):
        table, space = enumerated(one.prompt, args.runs / "tables"), method.space(one.prompt)
        method.prompt.set_spaces([space])
        method.text_features = method.clip.features_of([one.prompt])
        shape = method.backbone.latent_shape
        method.noise = draw_noise(0, [one.prompt], SEARCH, method.seeds, shape, torch.device("cpu"))
        rng = random.Random(one.prompt)
        choices = [[rng.randrange(len(slot.words)) for slot in space.slots] for _ in range(CANDIDATES)]
        for calls in CALLS:
            pairs = [pair for choice in choices for pair in changes(method, table, choice, *calls)]
            correlations[calls].append(float(spearmanr(*zip(*pairs, strict=True))[0]))
    print("| calls before the gradient | calls with it | rank correlation |\n|---|---|---|")
    for (before, grad_steps), values in correlations.items():
        print(f"| {before} | {grad_steps} | {interval(values)} |")


if __name__ == "__main__":
    main()
