"""Prompts that mix two found ones: recombination and selection, named as a use of hard prompts in PH2P (arXiv 2312.12416).

The paper releases no code for it. Here each child has tokens of two parents and of both found prompts, and no others. It is
readable as text, and none comes twice. What is drawn, scored and chosen is the caller's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from lightning_prompts.sampling.seeding import generator

MUTATION = 0.25
"""Chance that a token of a child is replaced by one of the two found prompts."""

TRIES = 50
"""Draws for each child that is wanted, before a generation stays smaller: short prompts have few mixtures."""


@dataclass
class Member:
    """One prompt of the evolution: a found one, which has no generation and no parents, or a child."""

    index: int  # its place in the list of all
    prompt: str
    token_ids: tuple[int, ...]
    generation: int | None = None
    parents: tuple[int, int] | None = None
    similarities: tuple[float, float] | None = None  # of its pictures to each of the two targets, -1 to 1
    score: float | None = None  # decides who has children; higher is better


def crossover(a: Sequence[int], b: Sequence[int], draw: torch.Generator) -> list[int]:
    """Recombines two prompts: at least one token of each, the others from both with equal chance.

    Unlike the exchange of equal places, this lets two words meet that stand at the same place of their prompts. A token that
    both have counts once, or as often as the parent that has it more often, so that relatives' children do not fill up with it.

    Args:
        a: Token ids of one parent, 1 or more.
        b: Token ids of the other, 1 or more.
        draw: Decides everything.

    Returns:
        Token ids; as many as one of the parents has, or a number between, and at least 2 if there are two different ones. In
        half of the cases they are in the order that they have in the parents, in the others in any.
    """
    pool, more = [((i + 0.5) / len(a), token) for i, token in enumerate(a)], Counter(b) - Counter(a)
    for i, token in enumerate(b):
        if more[token]:
            more[token] -= 1
            pool.append(((i + 0.5) / len(b), token))
    of_b = [i for i, (_, token) in enumerate(pool) if token in b]
    certain = [_below(len(a), draw), of_b[_below(len(of_b), draw)]]
    some = list(dict.fromkeys([*certain, *torch.randperm(len(pool), generator=draw).tolist()]))
    shortest, longest = sorted(max(2, len(parent)) for parent in (a, b))
    some = some[: shortest + _below(longest - shortest + 1, draw)]
    chosen = [pool[some[i]] for i in torch.randperm(len(some), generator=draw).tolist()]
    if _below(2, draw):
        chosen.sort(key=itemgetter(0))
    return [token for _, token in chosen]


def mutate(child: Sequence[int], found: Sequence[Sequence[int]], draw: torch.Generator) -> list[int]:
    """Takes back one token, at a random place, from one of the two found prompts."""
    source, changed = found[_below(2, draw)], list(child)
    changed[_below(len(changed), draw)] = source[_below(len(source), draw)]
    return changed


def breed(
    parents: Sequence[Member],
    everyone: Sequence[Member],
    read: Callable[[list[int]], str | None],
    count: int,
    address: tuple[int, str, int],
) -> list[Member]:
    """Makes a generation.

    Args:
        parents: Who may have children; a single one has them with the two found prompts.
        everyone: All members so far, the two found prompts first; no child repeats one of them.
        read: The text of token ids, None if they do not survive being written down and read again.
        count: Children wanted.
        address: Seed, key and number of the generation; each try has its own random draws there.

    Returns:
        At most `count` new members, numbered on from `everyone`.
    """
    seed, key, generation = address
    found, known, children = everyone[:2], {member.token_ids for member in everyone}, list[Member]()
    for attempt in range(TRIES * count):
        if len(children) == count:
            break
        draw = generator(seed, f"{key}/children", generation, attempt)
        pool = parents if len(parents) > 1 else (parents[0], found[_below(2, draw)])
        one, other = (pool[i] for i in torch.randperm(len(pool), generator=draw)[:2])
        tokens = crossover(one.token_ids, other.token_ids, draw)
        if torch.rand((), generator=draw) < MUTATION:
            tokens = mutate(tokens, [member.token_ids for member in found], draw)
        mixed = mixes(tokens, found[0].token_ids, found[1].token_ids)
        if (
            not mixed
            or not all(set(tokens) & set(parent.token_ids) for parent in (one, other))
            or tuple(tokens) in known
        ):
            continue
        text = read(tokens)
        if text is not None:
            known.add(tuple(tokens))
            index = len(everyone) + len(children)
            children.append(Member(index, text, tuple(tokens), generation, (one.index, other.index)))
    return children


def mixes(child: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether a child has a token of each prompt; one that is in both prompts speaks for neither, if there are others."""
    own = (set(a) - set(b) or set(a), set(b) - set(a) or set(b))
    return all(tokens & set(child) for tokens in own)


def fittest(members: Sequence[Member], count: int) -> list[Member]:
    """The members with the highest scores, best first; ties go to fewer tokens, then to the older."""
    return sorted(members, key=lambda m: (-(m.score or 0.0), len(m.token_ids), m.index))[:count]


def evolve(
    found: tuple[Member, Member],
    read: Callable[[list[int]], str | None],
    score: Callable[[list[Member]], None],
    choose: Callable[[int, list[Member], list[Member]], list[Member]],
    generations: int,
    population: int,
    seed: int,
    key: str,
    keep_found: bool = False,
) -> list[Member]:
    """Lets two prompts have children, and the chosen among these and so on.

    The chosen stay until others are chosen instead, so the best is never lost.

    Args:
        found: The two found prompts, numbered 0 and 1.
        read: See `breed`.
        score: Gives members their scores.
        choose: From the number of a generation, all members and those that can be chosen, whom to keep, best first. EOFError
            ends the evolution with those that were kept before, or else with the best child.
        generations: How many; there are fewer if no new child can be made.
        population: Children of a generation.
        seed: Addresses every random draw, together with the key.
        key: Names the two problems.
        keep_found: The found prompts themselves can be kept, as is right where both are for one target.

    Returns:
        Who was kept last, best first; nobody if the two prompts cannot be mixed.
    """
    everyone = list(found)
    kept = list(found) if keep_found else list[Member]()
    score(everyone)
    for generation in range(generations):
        children = breed(kept or found, everyone, read, population, (seed, key, generation))
        if not children:
            break
        score(children)
        everyone += children
        try:
            kept = choose(generation, everyone, [*kept, *children])
        except EOFError:
            return kept or fittest(children, 1)
    return kept


def _below(end: int, draw: torch.Generator) -> int:
    """A whole number in 0, ..., end - 1."""
    return int(torch.randint(end, (), generator=draw))
