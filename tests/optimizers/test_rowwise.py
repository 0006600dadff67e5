"""Each row of a parameter takes the steps that PyTorch's optimizer takes for it alone."""

import copy
from functools import partial

import pytest
import torch

from lightning_prompts.engine.batch import Batch, concatenate, merge
from lightning_prompts.errors import UserError
from lightning_prompts.optimizers import AdamOnLion, BatchedLBFGS, build_optimizer, check_optimizer
from lightning_prompts.runs.record import Problem

OPTIMIZERS = {
    "ASGD": partial(torch.optim.ASGD, lr=0.1, t0=2, weight_decay=0.1),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "Adam": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3),
    "Adamax": partial(torch.optim.Adamax, lr=0.1),
    "Muon": partial(torch.optim.Muon, lr=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.1),
    "RAdam": partial(torch.optim.RAdam, lr=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5, centered=True),
    "Rprop": partial(torch.optim.Rprop, lr=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD, foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "NAdam, foreach": partial(torch.optim.NAdam, lr=0.1, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "SGD, plain": partial(torch.optim.SGD, lr=0.1),
}
M, D = 3, 4


class Alone:
    """A row that PyTorch's optimizer has for itself."""

    def __init__(self, build, row):
        self.row = torch.nn.Parameter(row.clone())
        self.optimizer = build([self.row])

    def step(self, gradient):
        self.row.grad = gradient.clone()
        self.optimizer.step()


class Together(Batch):
    """A batch whose rows are given by name, with an optimizer of the parameter."""

    def __init__(self, build, size=3):
        module = torch.nn.Module()
        module.rows = torch.nn.Parameter(torch.empty(0, M, D))
        super().__init__(module, size)
        self.optimizers = [build_optimizer(build, self.parameter)]

    def add(self, rows):
        """Fill free places with rows (M, D) by name."""
        problems = [Problem(name, name) for name in rows]
        added = list(rows.values())
        self.refill(iter(problems), lambda records: None, lambda joined: torch.stack(added[: len(joined)]))

    def leave(self, name):
        (row,) = (i for i, record in enumerate(self.records) if record.key == name)
        self.finish(row)

    def take_step(self, gradients):
        self.parameter.grad = torch.stack([gradients[record.key] for record in self.records])
        (optimizer,) = self.optimizers
        optimizer.step()


def gradients_at(step, names="abcde"):
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(M, D, generator=draw) for name in names}


def rows_of(names):
    draw = torch.Generator().manual_seed(1234)
    return {name: row for name, row in ((name, torch.randn(M, D, generator=draw)) for name in "abcde") if name in names}


def assert_as_alone(batch, alone):
    for record, row in zip(batch.records, batch.parameter.detach(), strict=True):
        assert torch.equal(row, alone[record.key].row.detach()), record.key


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rows_that_join_and_leave_step_as_alone(build):
    batch, alone = Together(build), {}

    def join(names):
        batch.add(rows_of(names))
        alone.update({name: Alone(build, rows_of(name)[name]) for name in names})

    def steps(first, last):
        for step in range(first, last):
            given = gradients_at(step)
            batch.take_step(given)
            for record in batch.records:
                alone[record.key].step(given[record.key])

    join("ab")
    steps(0, 3)
    join("c")
    steps(3, 5)
    batch.leave("a")
    join("d")
    steps(5, 9)
    assert [record.key for record in batch.records] == ["b", "c", "d"]
    assert_as_alone(batch, alone)
    batch.clear_optimizer_rows(torch.tensor([1]))  # a restart
    alone["c"] = Alone(build, alone["c"].row.detach())
    steps(9, 12)
    assert_as_alone(batch, alone)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restored_state_goes_on_unbroken(build, tmp_path):
    unbroken = Together(build)
    unbroken.add(rows_of("ab"))
    for step in range(3):
        unbroken.take_step(gradients_at(step))
    unbroken.add(rows_of("c"))  # has no state yet when it is saved
    torch.save(unbroken.optimizers[0].state_dict(), tmp_path / "state")
    resumed = Together(build)
    resumed.add(rows_of("abc"))
    resumed.parameter.data.copy_(unbroken.parameter.data)
    resumed.optimizers[0].load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(3, 7):
        for batch in (unbroken, resumed):
            batch.take_step(gradients_at(step))
    assert torch.equal(resumed.parameter, unbroken.parameter)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_merged_states_of_two_ranks_go_on_as_alone(build):
    parts, alone = [], {name: Alone(build, row) for name, row in rows_of("abcd").items()}
    for names, count in (("ab", 2), ("cd", 5)):  # the ranks have taken different numbers of steps
        batch = Together(build)
        batch.add(rows_of(names))
        for step in range(count):
            batch.take_step(gradients_at(step))
            for name in names:
                alone[name].step(gradients_at(step)[name])
        for row in batch.rows:
            row.steps = count
        state = copy.deepcopy(batch.optimizers[0].state_dict())
        parts.append({"batch": batch.save(), "state_dict": {"rows": batch.parameter.data}, "optimizer_states": [state]})
    whole = merge(parts, lambda record: record["key"] != "b")
    merged = Together(build)
    merged.add(rows_of("acd"))
    merged.parameter.data.copy_(concatenate([whole["state_dict"]["rows"]]))
    merged.optimizers[0].load_state_dict(whole["optimizer_states"][0])
    for step in range(5, 8):
        merged.take_step(gradients_at(step))
        for name in "acd":
            alone[name].step(gradients_at(step)[name])
    assert_as_alone(merged, alone)


def test_all_optimizers_of_pytorch_are_covered():
    names = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert names - {"Optimizer", "LBFGS", "SparseAdam"} == {name.partition(",")[0] for name in OPTIMIZERS}


def test_changed_settings_of_the_group_apply():
    """As a scheduler changes them, or a checkpoint."""
    batch = Together(partial(torch.optim.SGD, lr=0.1))
    batch.add(rows_of("a"))
    before = batch.parameter.detach().clone()
    batch.optimizers[0].param_groups[0]["lr"] = 0.5
    batch.take_step(gradients_at(0))
    torch.testing.assert_close(before - batch.parameter.detach(), 0.5 * gradients_at(0)["a"][None])


def test_without_a_gradient_nothing_changes():
    x = torch.randn(2, 3).requires_grad_()
    before = x.detach().clone()
    optimizer = build_optimizer(partial(torch.optim.AdamW, weight_decay=0.1), x)
    assert optimizer.step(lambda: 5) == 5
    assert torch.equal(x.detach(), before)
    assert not optimizer.state


def test_own_optimizers_are_kept():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    assert type(build_optimizer(AdamOnLion, x)) is AdamOnLion
    assert type(build_optimizer(BatchedLBFGS, x)) is BatchedLBFGS


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(torch.optim.SGD, lr=-1.0), r"--model\.optimizer\.lr must be positive, got -1\."),
        (partial(torch.optim.Muon, lr=-1.0), r"--model\.optimizer\.lr must be positive, got -1\."),
        (partial(AdamOnLion, lr=-1.0), r"--model\.optimizer\.lr must be positive, got -1\."),
        (partial(BatchedLBFGS, lr=-1.0), r"--model\.optimizer\.lr must be positive, got -1\."),
        (partial(torch.optim.SGD, lr=0.0), r"--model\.optimizer\.lr must be positive, got 0\."),
        (partial(torch.optim.SGD, lr=float("nan")), r"--model\.optimizer\.lr must be positive, got nan\."),
        (partial(torch.optim.SGD, lr=float("inf")), r"--model\.optimizer\.lr must be positive, got inf\."),
        (partial(torch.optim.Adam, betas=(0.9, 2.0)), r"--model\.optimizer: Invalid beta parameter at index 1: 2\.0\."),
        (partial(BatchedLBFGS, max_iter=0), r"--model\.optimizer\.max_iter must be at least 1, got 0\."),
        (partial(AdamOnLion, betas=(0.9, 1.0)), r"--model\.optimizer\.betas must be at least 0 and below 1"),
        (partial(torch.optim.SGD, speed=1.0), r"--model\.optimizer cannot be built \(.*'speed'\)\."),
        (torch.optim.LBFGS, r"--model\.optimizer LBFGS takes all problems as one; give BatchedLBFGS\."),
        (torch.optim.SparseAdam, r"SparseAdam needs sparse gradients"),
        (list, r"--model\.optimizer must build an optimizer, got a list\."),
        (None, r"--model\.optimizer must be an optimizer's name, .* got None\."),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        check_optimizer(build, closure=True)


@pytest.mark.parametrize("build", [BatchedLBFGS, torch.optim.LBFGS])
def test_optimizers_of_several_losses_per_step_are_refused_elsewhere(build):
    with pytest.raises(UserError, match="needs several losses per step; give another, such as AdamW"):
        check_optimizer(build)
