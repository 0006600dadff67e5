"""Recombine two found prompts by evolution, which PH2P (arXiv 2312.12416) names as a use of hard prompts.

The paper has no code for it. Here a child has tokens of its two parents and of both found prompts, and no others; it is
encoded to the same tokens when written as text, and differs from all earlier ones. The caller generates images, scores
and selects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from lightning_prompts.sampling.seeding import generator

MUTATION = 0.25
"""Probability that a token of a child is replaced by one of the two found prompts."""

TRIES = 50
"""Random draws per child; if all fail, as with short prompts, the generation stays smaller."""


@dataclass
class Member:
    """A prompt of the evolution: a child, or a found prompt, which has no generation and no parents."""

    index: int  # in the list of all members
    prompt: str
    token_ids: tuple[int, ...]
    generation: int | None = None
    parents: tuple[int, int] | None = None
    similarities: tuple[float, float] | None = None  # of its images to each of the two targets, -1 to 1
    score: float | None = None  # decides which members have children; higher is better


def crossover(a: Sequence[int], b: Sequence[int], draw: torch.Generator) -> list[int]:
    """Recombine two prompts: at least one token of each, and the others from both with equal probability.

    Unlike one-point crossover, this can combine two words at the same position of their prompts. A token that both
    parents have counts once, or as often as in the parent that has it more often, so that children of relatives do not
    fill up with it.

    Args:
        a: Token ids of one parent, at least one.
        b: Token ids of the other, at least one.
        draw: Generator of all random draws.

    Returns:
        Token ids: as many as one of the parents has, or a number between, and at least 2 if there are two different
        ones. Half of the children keep the order of their parents; the others are shuffled.
    """
    pool, more = [((i + 0.5) / len(a), token) for i, token in enumerate(a)], Counter(b) - Counter(a)
    for i, token in enumerate(b):
        if more[token]:
            more[token] -= 1
            pool.append(((i + 0.5) / len(b), token))
    of_b = [i for i, (_, token) in enumerate(pool) if token in b]
    certain = [_below(len(a), draw), of_b[_below(len(of_b), draw)]]
    order = list(dict.fromkeys([*certain, *torch.randperm(len(pool), generator=draw).tolist()]))
    shortest, longest = sorted(max(2, len(parent)) for parent in (a, b))
    order = order[: shortest + _below(longest - shortest + 1, draw)]
    chosen = [pool[order[i]] for i in torch.randperm(len(order), generator=draw).tolist()]
    if _below(2, draw):
        chosen.sort(key=itemgetter(0))
    return [token for _, token in chosen]


def mutate(child: Sequence[int], found: Sequence[Sequence[int]], draw: torch.Generator) -> list[int]:
    """Replace the token at a random position by a random token of one of the two found prompts."""
    source, changed = found[_below(2, draw)], list(child)
    changed[_below(len(changed), draw)] = source[_below(len(source), draw)]
    return changed


def breed(
    parents: Sequence[Member],
    members: Sequence[Member],
    decode: Callable[[list[int]], str | None],
    count: int,
    address: tuple[int, str, int],
) -> list[Member]:
    """Make the children of a generation.

    Args:
        parents: Members that may have children; with a single one, the other parent is one of the two found prompts.
        members: All members so far, the two found prompts first; no child equals one of them.
        decode: Returns the text of token ids, or None if encoding the text would give other tokens.
        count: Number of children.
        address: Seed, key and generation that the random draws of each try depend on.

    Returns:
        At most `count` new members, whose indices follow those of `members`.
    """
    seed, key, generation = address
    found, known, children = members[:2], {member.token_ids for member in members}, list[Member]()
    for attempt in range(TRIES * count):
        if len(children) == count:
            break
        draw = generator(seed, f"{key}/children", generation, attempt)
        pool = parents if len(parents) > 1 else (parents[0], found[_below(2, draw)])
        one, other = (pool[i] for i in torch.randperm(len(pool), generator=draw)[:2])
        tokens = crossover(one.token_ids, other.token_ids, draw)
        if torch.rand((), generator=draw) < MUTATION:
            tokens = mutate(tokens, [member.token_ids for member in found], draw)
        if (
            not combines(tokens, found[0].token_ids, found[1].token_ids)
            or not all(set(tokens) & set(parent.token_ids) for parent in (one, other))
            or tuple(tokens) in known
        ):
            continue
        text = decode(tokens)
        if text is not None:
            known.add(tuple(tokens))
            index = len(members) + len(children)
            children.append(Member(index, text, tuple(tokens), generation, (one.index, other.index)))
    return children


def combines(child: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Return whether a child has a token of each prompt, one that the other prompt lacks if there is one."""
    own = (set(a) - set(b) or set(a), set(b) - set(a) or set(b))
    return all(tokens & set(child) for tokens in own)


def fittest(members: Sequence[Member], count: int) -> list[Member]:
    """Return the members with the highest scores, best first; ties go to fewer tokens, then to the lower index."""
    return sorted(members, key=lambda m: (-(m.score or 0.0), len(m.token_ids), m.index))[:count]


def evolve(
    found: tuple[Member, Member],
    decode: Callable[[list[int]], str | None],
    score: Callable[[list[Member]], None],
    select: Callable[[int, list[Member], list[Member]], list[Member]],
    generations: int,
    population: int,
    seed: int,
    key: str,
    keep_found: bool = False,
) -> list[Member]:
    """Evolve prompts from two found ones.

    Selected members stay until others are selected in their place, so the best one is never lost.

    Args:
        found: The two found prompts, with the indices 0 and 1.
        decode: See `breed`.
        score: Sets the scores of members.
        select: Returns the members to keep, best first, given the generation, all members and the candidates. With
            EOFError the evolution ends and returns the members kept before, or else the best child.
        generations: Number of generations; there are fewer if no new child can be made.
        population: Children per generation.
        seed: Seed of all random draws, together with the key.
        key: Key of the two problems.
        keep_found: Whether the found prompts are candidates too, as where both are for the same target.

    Returns:
        The members kept last, best first; none if the two prompts cannot be recombined.
    """
    members = list(found)
    kept = list(found) if keep_found else list[Member]()
    score(members)
    for generation in range(generations):
        children = breed(kept or found, members, decode, population, (seed, key, generation))
        if not children:
            break
        score(children)
        members += children
        try:
            kept = select(generation, members, [*kept, *children])
        except EOFError:
            return kept or fittest(children, 1)
    return kept


def _below(end: int, draw: torch.Generator) -> int:
    """Draw a whole number in 0, ..., end - 1."""
    return int(torch.randint(end, (), generator=draw))
