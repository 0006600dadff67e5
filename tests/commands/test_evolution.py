from collections import Counter

import pytest
import torch

from lightning_prompts.commands.evolution import Member, breed, combines, crossover, evolve, fittest, mutate

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
def test_child_has_tokens_of_both_parents_and_no_others(a, b):
    shortest, longest = sorted(max(2, len(parent)) for parent in (a, b))
    lengths = set()
    for seed in range(200):
        child = crossover(a, b, generator(seed))
        assert set(child) & set(a)
        assert set(child) & set(b)
        assert Counter(child) <= Counter(a) | Counter(b)
        lengths.add(len(child))
    assert lengths == set(range(shortest, longest + 1))


def test_crossover_takes_tokens_with_equal_probability():
    children = [crossover(A, B, generator(seed)) for seed in range(2000)]
    counts = Counter(token for child in children for token in child)
    assert set(counts) == {*A, *B}
    for count in counts.values():
        assert count == pytest.approx(1000, abs=120)  # 4 of 8 tokens a child; five standard deviations
    in_order = [
        all([token for token in child if token in parent] == sorted({*child} & {*parent}) for parent in (A, B))
        for child in children
    ]
    assert 0.5 < sum(in_order) / len(in_order) < 0.8  # half of the children by construction, and some by chance


def test_child_may_have_both_tokens_of_one_position():
    assert any({1, 11} <= set(crossover(A, B, generator(seed))) for seed in range(50))


def test_mutation_replaces_one_token_by_one_of_the_found_prompts():
    changed = set()
    for seed in range(300):
        child = mutate((1, 1, 11), (A, B), generator(seed))
        different = [i for i, (new, old) in enumerate(zip(child, (1, 1, 11), strict=True)) if new != old]
        assert len(different) <= 1
        changed |= {(i, child[i]) for i in different}
    assert {i for i, _ in changed} == {0, 1, 2}
    assert {token for _, token in changed} == {*A, *B}


def test_shared_tokens_count_for_neither_prompt():
    assert combines((1, 11), A, B)
    assert not combines((1, 2), A, B)
    assert not combines((1, 5), (1, 5), (5, 11))  # 5 is in both
    assert combines((1, 11), (1, 5), (5, 11))
    assert combines((1, 2), (1, 2), (2, 1))  # there are no other tokens


def test_children_are_new_and_record_their_parents():
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
            assert combines(child.token_ids, A, B)
            assert len(set(child.parents)) == 2
            for parent in child.parents:
                assert everyone[parent] in parents
                assert set(child.token_ids) & set(everyone[parent].token_ids)
    assert [member.index for member in everyone] == list(range(20))
    assert len({member.token_ids for member in everyone}) == 20


def test_single_parent_is_crossed_with_the_found_prompts():
    everyone = [*members(A, B), Member(2, read((1, 11)), (1, 11), 0, (0, 1))]
    children = breed(everyone[2:], everyone, read, 8, (0, "key", 1))
    assert {frozenset(child.parents) for child in children} == {frozenset((0, 2)), frozenset((1, 2))}


def test_short_prompts_have_few_children():
    everyone = members((1,), (11,))
    assert {child.token_ids for child in breed(everyone, everyone, read, 16, (0, "key", 0))} == {(1, 11), (11, 1)}


def test_fittest_are_sorted_by_score_length_and_index():
    scores = [(0.1, 3), (0.5, 4), (0.5, 3), (0.5, 3), (-0.2, 1)]
    some = [Member(i, "", tuple(range(count)), score=score) for i, (score, count) in enumerate(scores)]
    assert [member.index for member in fittest(some, 4)] == [2, 3, 1, 0]


def evolve_towards(seed=0, generations=6, select=None, wanted=frozenset((1, 2, 11, 12)), keep_found=False):
    """Evolve towards wanted tokens; return the scored members, the kept ones of each generation, and the result."""
    scored, chosen = [], []

    def score(some):
        scored.extend(some)
        for member in some:
            member.score = len(wanted & set(member.token_ids)) / len(set(member.token_ids) | wanted)

    def keep(generation, everyone, candidates):
        assert everyone == scored
        chosen.append(fittest(candidates, 3))
        return chosen[-1]

    best = evolve(members(A, B), read, score, select or keep, generations, 8, seed, "key", keep_found)
    return scored, chosen, best


@pytest.mark.parametrize("seed", range(5))
def test_evolution_finds_the_best_recombination(seed):
    scored, chosen, best = evolve_towards(seed)
    assert best == chosen[-1]
    assert len(scored) == 2 + 6 * 8
    assert [some[0].score for some in chosen] == sorted(
        some[0].score for some in chosen
    )  # the best score never decreases
    assert best[0].score == 1.0  # of 70 sets of four tokens, one is right


def test_keep_found_lets_found_prompts_win():
    scored, _, best = evolve_towards(wanted=frozenset(A), keep_found=True)
    assert best[0] == scored[0]
    _, _, best = evolve_towards(wanted=frozenset(A))
    assert best[0].generation is not None
    nothing = (lambda ids: None, lambda some: None, lambda *args: [])
    assert evolve(members(A, B), *nothing, 2, 4, 0, "key", keep_found=True) == list(members(A, B))


def test_evolution_is_reproducible_and_depends_on_its_seed():
    assert evolve_towards(1)[0] == evolve_towards(1)[0]
    assert [member.token_ids for member in evolve_towards(1)[0]] != [
        member.token_ids for member in evolve_towards(2)[0]
    ]


def test_end_of_input_keeps_the_last_selection():
    def leave(at):
        def keep(generation, everyone, candidates):
            if generation == at:
                raise EOFError
            return [candidates[-1]]

        return keep

    scored, _, kept = evolve_towards(select=leave(2))
    assert kept == [scored[17]]  # the last one of generation 1
    scored, _, kept = evolve_towards(select=leave(0))
    assert kept == fittest(scored[2:], 1)


def test_prompts_that_cannot_be_recombined_have_no_children():
    assert evolve(members(A, B), lambda ids: None, lambda some: None, lambda *args: [], 3, 4, 0, "key") == []
