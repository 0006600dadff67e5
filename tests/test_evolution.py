from collections import Counter

import pytest
import torch

from lightning_prompts.commands.evolution import Member, breed, crossover, evolve, fittest, mixes, mutate

A, B = (1, 2, 3, 4), (11, 12, 13, 14)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def read(token_ids):
    return " ".join(map(str, token_ids))


def members(*prompts):
    return tuple(Member(i, read(prompt), tuple(prompt)) for i, prompt in enumerate(prompts))


@pytest.mark.parametrize(
    ("a", "b"),
    [(A, B), ((1,), (11,)), ((1,), B), (A, (11, 12)), (tuple(range(9)), (11,)), ((1, 1, 2), (2, 2, 11))],
    ids=str,
)
def test_child_has_tokens_of_each_parent_and_no_others(a, b):
    shortest, longest = sorted(max(2, len(parent)) for parent in (a, b))
    lengths = set()
    for seed in range(200):
        child = crossover(a, b, generator(seed))
        assert set(child) & set(a)
        assert set(child) & set(b)
        assert Counter(child) <= Counter(a) | Counter(b)
        lengths.add(len(child))
    assert lengths == set(range(shortest, longest + 1))


def test_tokens_are_taken_with_equal_chance_in_either_order():
    children = [crossover(A, B, generator(seed)) for seed in range(2000)]
    counts = Counter(token for child in children for token in child)
    assert set(counts) == {*A, *B}
    for count in counts.values():
        assert count == pytest.approx(1000, abs=120)  # 4 of 8 tokens a child; five standard deviations
    kept = [
        all([token for token in child if token in parent] == sorted({*child} & {*parent}) for parent in (A, B))
        for child in children
    ]
    assert 0.5 < sum(kept) / len(kept) < 0.8  # half of them, and those of the others that chance orders


def test_words_at_the_same_place_can_meet():
    assert any({1, 11} <= set(crossover(A, B, generator(seed))) for seed in range(50))


def test_mutation_takes_one_token_back_from_a_found_prompt():
    changed = set()
    for seed in range(300):
        child = mutate((1, 1, 11), (A, B), generator(seed))
        different = [i for i, (new, old) in enumerate(zip(child, (1, 1, 11), strict=True)) if new != old]
        assert len(different) <= 1
        changed |= {(i, child[i]) for i in different}
    assert {i for i, _ in changed} == {0, 1, 2}
    assert {token for _, token in changed} == {*A, *B}


def test_token_of_both_prompts_speaks_for_neither():
    assert mixes((1, 11), A, B)
    assert not mixes((1, 2), A, B)
    assert not mixes((1, 5), (1, 5), (5, 11))  # 5 is in both
    assert mixes((1, 11), (1, 5), (5, 11))
    assert mixes((1, 2), (1, 2), (2, 1))  # there are no others


def test_children_are_new_and_readable_and_say_whose_they_are():
    everyone = list(members(A, B))
    for generation in range(3):
        parents = everyone[-4:]
        children = breed(parents, everyone, lambda ids: None if ids[0] == 1 else read(ids), 6, (0, "key", generation))
        assert len(children) == 6
        everyone += children
        for child in children:
            assert child.generation == generation
            assert child.prompt == read(child.token_ids)
            assert child.token_ids[0] != 1
            assert mixes(child.token_ids, A, B)
            assert len(set(child.parents)) == 2
            for parent in child.parents:
                assert everyone[parent] in parents
                assert set(child.token_ids) & set(everyone[parent].token_ids)
    assert [member.index for member in everyone] == list(range(20))
    assert len({member.token_ids for member in everyone}) == 20


def test_single_parent_has_children_with_the_found_prompts():
    everyone = [*members(A, B), Member(2, read((1, 11)), (1, 11), 0, (0, 1))]
    children = breed(everyone[2:], everyone, read, 8, (0, "key", 1))
    assert {frozenset(child.parents) for child in children} == {frozenset((0, 2)), frozenset((1, 2))}


def test_short_prompts_have_few_children():
    everyone = members((1,), (11,))
    assert {child.token_ids for child in breed(everyone, everyone, read, 16, (0, "key", 0))} == {(1, 11), (11, 1)}


def test_fittest_are_in_order():
    scores = [(0.1, 3), (0.5, 4), (0.5, 3), (0.5, 3), (-0.2, 1)]
    some = [Member(i, "", tuple(range(count)), score=score) for i, (score, count) in enumerate(scores)]
    assert [member.index for member in fittest(some, 4)] == [2, 3, 1, 0]


def climb(seed=0, generations=6, choose=None, wanted=frozenset((1, 2, 11, 12)), keep_found=False):
    """Evolves towards wanted tokens; what was scored, what was chosen, and the result."""
    scored, chosen = [], []

    def score(some):
        scored.extend(some)
        for member in some:
            member.score = len(wanted & set(member.token_ids)) / len(set(member.token_ids) | wanted)

    def keep(generation, everyone, candidates):
        assert everyone == scored
        chosen.append(fittest(candidates, 3))
        return chosen[-1]

    best = evolve(members(A, B), read, score, choose or keep, generations, 8, seed, "key", keep_found)
    return scored, chosen, best


@pytest.mark.parametrize("seed", range(5))
def test_evolution_finds_the_best_mixture(seed):
    scored, chosen, best = climb(seed)
    assert best == chosen[-1]
    assert len(scored) == 2 + 6 * 8
    assert [some[0].score for some in chosen] == sorted(some[0].score for some in chosen)  # the best is never lost
    assert best[0].score == 1.0  # of 70 sets of four tokens, one is right


def test_found_prompts_can_be_kept_where_both_are_for_one_target():
    scored, _, best = climb(wanted=frozenset(A), keep_found=True)
    assert best[0] == scored[0]
    _, _, best = climb(wanted=frozenset(A))
    assert best[0].generation is not None
    nothing = (lambda ids: None, lambda some: None, lambda *args: [])
    assert evolve(members(A, B), *nothing, 2, 4, 0, "key", keep_found=True) == list(members(A, B))


def test_evolution_repeats_and_its_seed_matters():
    assert climb(1)[0] == climb(1)[0]
    assert [member.token_ids for member in climb(1)[0]] != [member.token_ids for member in climb(2)[0]]


def test_person_who_leaves_keeps_what_was_kept():
    def leave(at):
        def keep(generation, everyone, candidates):
            if generation == at:
                raise EOFError
            return [candidates[-1]]

        return keep

    scored, _, kept = climb(choose=leave(2))
    assert kept == [scored[17]]  # the last one of generation 1
    scored, _, kept = climb(choose=leave(0))
    assert kept == fittest(scored[2:], 1)


def test_prompts_that_cannot_be_mixed_give_nobody():
    assert evolve(members(A, B), lambda ids: None, lambda some: None, lambda *args: [], 3, 4, 0, "key") == []
