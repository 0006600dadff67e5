"""The batch alone: rows join, step, leave, and are restored from a checkpoint."""

import pytest
import torch
from torch import nn

from lightning_prompts.engine.batch import Batch, Row, concatenate, fit_shape, merge
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.runs.record import Problem

LR = 0.1


class Prompt(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(0, *shape))


def problems(*names):
    return [Problem(name, f"{name}.png") for name in names]


def filled(names="abc", size=3, shape=(2,), momentum=0.0, weight_decay=0.0):
    """Return a batch with a row of ones per problem, and SGD as its optimizer."""
    batch = Batch(Prompt(*shape), size)
    optimizer = torch.optim.SGD([batch.parameter], lr=LR, momentum=momentum, weight_decay=weight_decay)
    batch.optimizers = [optimizer]
    refill(batch, *names)
    return batch, optimizer


def refill(batch, *names, shape=(2,)):
    return batch.refill(iter(problems(*names)), lambda records: None, lambda rows: torch.ones(len(rows), *shape))


def step(batch, optimizer, loss, rows=None, clip=None):
    rows = batch.active_rows() if rows is None else torch.tensor(rows)
    batch.step(optimizer.step, loss(batch.parameter[rows]), rows, torch.Tensor.backward, clip)


def linear(slopes):
    """Return losses whose gradients are the given slopes (Q, 2)."""
    return lambda parameter: (parameter * torch.tensor(slopes)).sum(1)


def test_step_equals_the_optimizers():
    batch, optimizer = filled()
    step(batch, optimizer, linear([[1.0, -2.0], [3.0, 0.0], [0.0, 5.0]]))
    expected = 1 - LR * torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 5.0]])
    torch.testing.assert_close(batch.parameter.detach(), expected)


def test_steps_and_costs_are_counted_in_the_rows_that_took_them(monkeypatch):
    now = iter([0.0, 100.0, 106.0, 106.0, 107.0, 107.0])  # the batch begins, its rows change, and two steps end
    monkeypatch.setattr("lightning_prompts.engine.batch.time.perf_counter", lambda: next(now))
    batch, _ = filled()
    batch.count_step(torch.tensor([0, 2]))
    batch.count_step(torch.tensor([2]))
    batch.add_cost(torch.tensor([1, 2]), 5)
    assert batch.steps == [1, 0, 2]
    assert [record.seconds for record in batch.records] == [3.0, 0.0, 4.0]
    assert [record.unet_samples for record in batch.records] == [0, 5, 5]


def test_other_rows_stay_unchanged():
    """Neither momentum nor weight decay moves them."""
    batch, optimizer = filled(momentum=0.9, weight_decay=0.5)
    step(batch, optimizer, linear([[1.0, 1.0]] * 3))
    before = batch.parameter.detach().clone()
    step(batch, optimizer, linear([[1.0, 1.0]]), rows=[1])
    assert torch.equal(batch.parameter[[0, 2]], before[[0, 2]])
    assert not torch.equal(batch.parameter[1], before[1])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_gradient_skips_the_step_of_its_row(wrong):
    batch, optimizer = filled(momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        step(batch, optimizer, linear([[1.0, wrong], [1.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(batch.parameter[0].detach(), torch.ones(2))
    assert (batch.parameter[1:] < 1).all()
    assert batch.skipped.tolist() == [2, 0, 0]
    step(batch, optimizer, linear([[0.0, 0.0]] * 3))
    torch.testing.assert_close(batch.parameter[1], batch.parameter[2])
    buffer = optimizer.state[batch.parameter]["momentum_buffer"]
    assert (buffer[0] <= 0.5 * (1 + 0.9 + 0.81)).all()  # weight decay alone


def test_gradients_are_clipped_on_both_sides():
    batch, optimizer = filled()
    step(batch, optimizer, linear([[7.0, -7.0], [0.3, -0.3], [0.0, 0.0]]), clip=0.5)
    expected = 1 - LR * torch.tensor([[0.5, -0.5], [0.3, -0.3], [0.0, 0.0]])
    torch.testing.assert_close(batch.parameter.detach(), expected)


def test_halvings_shorten_the_step():
    batch, optimizer = filled()
    batch[1].halvings = 2
    step(batch, optimizer, linear([[1.0, 1.0]] * 3))
    torch.testing.assert_close(batch.parameter[:, 0].detach(), 1 - LR * torch.tensor([1.0, 0.25, 1.0]))


def test_finished_rows_are_replaced_and_others_keep_their_state():
    batch, optimizer = filled(momentum=0.9)
    step(batch, optimizer, linear([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    before, state = batch.parameter.detach().clone(), optimizer.state[batch.parameter]
    momentum = state["momentum_buffer"].clone()
    batch.skipped = torch.tensor([4, 5, 6])
    batch.finish(1)
    assert batch.active_rows().tolist() == [0, 2]
    change = refill(batch, "d", "e")
    assert [record.key for record in change.added] == ["d"]
    assert [record.key for record in change.evicted] == ["b"]
    assert [record.key for record in batch.records] == ["a", "c", "d"]
    torch.testing.assert_close(batch.parameter.detach(), torch.cat([before[[0, 2]], torch.ones(1, 2)]))
    torch.testing.assert_close(state["momentum_buffer"], torch.cat([momentum[[0, 2]], torch.zeros(1, 2)]))
    assert batch.skipped.tolist() == [4, 6, 0]
    assert [record.key for record in batch.finished] == ["b"]


def test_state_with_a_row_per_problem_follows_its_problem():
    """Of any shape; state without rows, such as Adam's number of steps, stays as it is."""
    batch, optimizer = filled()
    state = optimizer.state[batch.parameter]
    counts, memory = torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 5, 7)
    state.update(steps=torch.tensor(4.0), counts=counts, memory=memory, note="text")
    batch.finish(0)
    refill(batch, "d", "e")
    assert state["counts"].tolist() == [2.0, 3.0, 0.0]
    assert torch.equal(state["memory"], torch.cat([memory[1:], torch.zeros(1, 5, 7)]))
    assert (state["steps"], state["note"]) == (4.0, "text")
    batch.reset_rows(torch.tensor([1]), torch.full((1, 2), 7.0))
    assert state["counts"].tolist() == [2.0, 0.0, 0.0]
    assert batch.parameter[1].tolist() == [7.0, 7.0]


def test_reset_rows_lose_the_history_of_lbfgs():
    batch, _ = filled()
    optimizer = BatchedLBFGS([batch.parameter], max_iter=3)
    batch.optimizers = [optimizer]

    def losses(x):
        return ((x - 3) ** 2 * torch.tensor([1.0, 7.0])).sum(1)

    optimizer.step(lambda: losses(batch.parameter))
    assert optimizer.state[batch.parameter]["pairs"].all()
    values = torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    batch.reset_rows(torch.tensor([2, 0]), values)
    assert optimizer.state[batch.parameter]["pairs"].bool().tolist() == [False, True, False]
    optimizer.step(lambda: losses(batch.parameter))
    fresh = values.clone().requires_grad_()
    BatchedLBFGS([fresh], max_iter=3).step(lambda: losses(fresh))
    torch.testing.assert_close(batch.parameter[[2, 0]], fresh)


def test_refill_without_changes_leaves_the_batch_as_it_is():
    batch, _ = filled("ab")
    change = batch.refill(iter(()), lambda records: pytest.fail("set"), lambda rows: pytest.fail("initialized"))
    assert change == ([], [])
    assert not batch.exhausted


def test_failed_problems_are_finished_at_once():
    batch, _ = filled("", size=2)
    arrivals = problems("x", "y", "z")
    arrivals[0].status = "failed"
    batch.refill(iter(arrivals), lambda records: None, lambda rows: torch.ones(len(rows), 2))
    assert [record.key for record in batch.finished] == ["x"]
    assert [record.key for record in batch.records] == ["y", "z"]


def test_batch_is_exhausted_when_its_last_row_is_finished():
    batch, _ = filled("a", size=1)
    assert not batch.exhausted
    assert refill(batch) == ([], [])
    batch.finish(0)
    refill(batch)
    assert batch.exhausted


def test_longer_rows_pad_the_shorter_ones():
    batch, optimizer = filled("a", momentum=0.9)
    step(batch, optimizer, linear([[1.0, 1.0]]))
    refill(batch, "b", shape=(3,))
    torch.testing.assert_close(batch.parameter.detach(), torch.tensor([[0.9, 0.9, 0.0], [1.0, 1.0, 1.0]]))
    assert optimizer.state[batch.parameter]["momentum_buffer"].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert fit_shape(torch.ones(1, 3), (2,)).tolist() == [[1.0, 1.0]]
    assert concatenate([torch.ones(1, 1), torch.ones(1, 2)]).tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_reset_row_has_no_momentum():
    batch, optimizer = filled(momentum=0.9)
    step(batch, optimizer, linear([[1.0, 1.0]] * 3))
    batch.reset_rows(torch.tensor([1]), torch.full((1, 2), 5.0))
    assert batch.parameter[1].tolist() == [5.0, 5.0]
    assert optimizer.state[batch.parameter]["momentum_buffer"][:, 0].tolist() == [1.0, 0.0, 1.0]


def test_offer_keeps_only_lower_losses():
    batch, _ = filled("a")
    accepted = [batch.offer(0, "x", loss) for loss in (3.0, 3.0, 4.0, 2.0)]
    assert accepted == [True, False, False, True]
    assert batch[0].stale == 0
    assert not batch.offer(0, "y", 1.0, acceptable=False)
    assert (batch[0].stale, batch[0].record.validation_loss) == (1, 2.0)
    assert batch.offer(0, "z", 0.5, [3, 4], [[0.1, 0.2], [0.3, 0.4]])
    record = batch[0].record
    assert (record.prompt, record.token_ids, record.embedding) == ("z", [3, 4], [[0.1, 0.2], [0.3, 0.4]])


def test_batch_is_restored_from_a_checkpoint():
    batch, _ = filled()
    batch.rows = [
        Row(
            record,
            steps=3 * i,
            stale=i,
            halvings=2 - i,
            active=i != 1,
            best=torch.full((2, 3), float(i)) if i else None,
        )
        for i, record in enumerate(batch.records)
    ]
    batch.skipped = torch.tensor([1, 0, 7])
    again = Batch(Prompt(2), 3)
    again.load(batch.save())
    assert [vars(row) | {"best": None} for row in again.rows] == [vars(row) | {"best": None} for row in batch.rows]
    assert again.rows[0].best is None
    assert all(torch.equal(one.best, other.best) for one, other in zip(again.rows[1:], batch.rows[1:], strict=True))
    assert again.skipped.tolist() == [1, 0, 7]
    assert again.skipped.dtype == torch.long


def checkpoints(*several, steps=None):
    """Return what ranks with these problems save; without `steps`, row i of rank r has taken 10 (r + 1) + i steps."""
    parts = []
    for number, names in enumerate(several):
        batch, _ = filled(names)
        for i, row in enumerate(batch.rows):
            row.steps = 10 * (1 + number) + i if steps is None else steps[row.record.key]
        values = batch.parameter.detach() + number
        states = [{"state": {0: {"step": torch.tensor(1.0 + number), "exp_avg": values * 2}}, "param_groups": []}]
        saved = {**batch.save(), "parts": 2}
        parts.append({"batch": saved, "state_dict": {"prompt": values}, "optimizer_states": states, "epoch": number})
    return parts


def test_merge_keeps_the_row_with_the_most_steps():
    parts = checkpoints("abc", "bd")
    merged = merge(parts, lambda record: record["key"] != "c")
    assert [record["key"] for record in merged["batch"]["records"]] == ["a", "b", "d"]
    assert merged["batch"]["steps"] == [10, 20, 21]
    assert (merged["batch"]["parts"], merged["epoch"]) == (2, 0)
    assert merged["state_dict"]["prompt"][:, 0].tolist() == [1.0, 2.0, 2.0]
    assert merged["optimizer_states"][0]["state"][0]["exp_avg"][:, 0].tolist() == [2.0, 4.0, 4.0]
    assert merged["optimizer_states"][0]["state"][0]["step"] == 1
    assert parts[0]["batch"]["steps"] == [10, 11, 12]  # stays unchanged
    assert parts[0]["optimizer_states"][0]["state"][0]["exp_avg"].shape == (3, 2)


@pytest.mark.parametrize(
    ("names", "wanted", "kept"),
    [(["abc"], "ac", [1.0, 1.0]), (["abc", "bd"], "bd", [2.0, 2.0]), (["ab", "c", "d"], "abd", [1.0, 1.0, 3.0])],
    ids=["one rank", "the first without a row", "one without a row"],
)
def test_merge_of_some_rows(names, wanted, kept):
    merged = merge(checkpoints(*names), lambda record: record["key"] in wanted)
    assert [record["key"] for record in merged["batch"]["records"]] == list(wanted)
    assert merged["state_dict"]["prompt"][:, 1].tolist() == kept
    assert merged["optimizer_states"][0]["state"][0]["exp_avg"][:, 1].tolist() == [2 * value for value in kept]


def test_merge_orders_rows_by_rank():
    merged = merge(checkpoints("ab", "c", steps={"a": 30, "b": 20, "c": 10}), lambda record: True)
    assert [record["key"] for record in merged["batch"]["records"]] == ["a", "b", "c"]
