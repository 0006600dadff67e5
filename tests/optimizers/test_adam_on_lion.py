from copy import deepcopy

import pytest
import torch

from lightning_prompts.optimizers import AdamOnLion


def quadratic(x):
    return ((x - 1) ** 2 * torch.linspace(0.1, 5, x.numel()).view(x.shape)).sum()


def test_step_has_the_length_of_adam_and_the_direction_of_lion():
    start = torch.randn(5, 7)
    parameter = start.clone().requires_grad_()
    optimizer = AdamOnLion([parameter], lr=0.03, eps=1e-3)
    # torch's Adam at the same gradients: at lr 1 its step is Adam's direction
    shadow, momentum = torch.zeros(5, 7, requires_grad=True), torch.zeros(5, 7)
    adam = torch.optim.Adam([shadow], lr=1.0, eps=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        quadratic(parameter).backward()
        gradient, before, shadow_before = parameter.grad.clone(), parameter.detach().clone(), shadow.detach().clone()
        optimizer.step()
        shadow.grad = gradient
        adam.step()
        length = (shadow.detach() - shadow_before).norm()
        signs = torch.tensor(
            [
                [0.0 if c == 0 else (1.0 if c > 0 else -1.0) for c in row]
                for row in (0.9 * momentum + 0.1 * gradient).tolist()
            ]
        )
        momentum = 0.99 * momentum + 0.01 * gradient
        expected = before - 0.03 * length / signs.norm() * signs
        assert parameter.detach() == pytest.approx(expected, abs=1e-6)


def test_problems_in_a_batch_step_as_alone():
    start = torch.randn(3, 2, 4, 5)
    batch = start.clone().requires_grad_()
    alone = [start[p, s].clone().requires_grad_() for p in range(3) for s in range(2)]
    optimizers = [AdamOnLion([batch]), *(AdamOnLion([x]) for x in alone)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(quadratic(batch[p, s]) * (p + s + 1) for p in range(3) for s in range(2)).backward()
        for i, x in enumerate(alone):
            (quadratic(x) * (i // 2 + i % 2 + 1)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert batch.detach().flatten(0, 1) == pytest.approx(torch.stack(alone).detach(), abs=1e-6)


def test_optimizer_resumes_from_its_state():
    parameter = torch.randn(2, 3).requires_grad_()
    optimizer = AdamOnLion([parameter])
    for number in range(6):
        if number == 3:
            copy = parameter.detach().clone().requires_grad_()
            again = AdamOnLion([copy])
            again.load_state_dict(deepcopy(optimizer.state_dict()))
        optimizer.zero_grad()
        quadratic(parameter).backward()
        optimizer.step()
        if number >= 3:
            again.zero_grad()
            quadratic(copy).backward()
            again.step()
    assert torch.equal(parameter, copy)


def test_zero_gradient_moves_nothing_but_weight_decay_does():
    parameter = torch.ones(2, 3).requires_grad_()
    parameter.grad = torch.zeros(2, 3)
    AdamOnLion([parameter]).step()
    assert torch.equal(parameter, torch.ones(2, 3))
    AdamOnLion([parameter], weight_decay=0.1).step()
    assert (parameter < 1).all()


def test_weight_decay_is_added_to_the_gradient():
    start, gradient = torch.tensor([[0.5, -2.0, 0.1]]), torch.tensor([[0.01, 0.02, -0.03]])
    decayed, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    decayed.grad, plain.grad = gradient.clone(), gradient + 0.1 * start
    AdamOnLion([decayed], weight_decay=0.1).step()
    AdamOnLion([plain]).step()
    assert torch.equal(decayed, plain)


def test_default_step_of_a_single_number():
    """The first step of a single number is lr times g / (g + eps)."""
    parameter = torch.zeros(1, 1, requires_grad=True)
    parameter.grad = torch.full((1, 1), 1e-3)
    AdamOnLion([parameter]).step()
    assert parameter.item() == pytest.approx(-0.01 / 2, rel=1e-5)


def test_a_row_that_joins_later_steps_as_it_would_alone():
    first, later = torch.randn(2, 1, 4, 5)
    x = first.clone().requires_grad_()
    optimizer = AdamOnLion([x], lr=0.1)
    for _ in range(7):
        optimizer.zero_grad()
        quadratic(x).backward()
        optimizer.step()
    (state,) = optimizer.state.values()
    x.data = torch.cat([x.data, later])
    for name, value in state.items():
        state[name] = torch.cat([value, torch.zeros_like(value)])
    alone = later.clone().requires_grad_()
    single = AdamOnLion([alone], lr=0.1)
    for _ in range(5):
        x.grad = torch.zeros_like(x)
        alone.grad = None
        (quadratic(x[:1]) + quadratic(x[1:])).backward()
        quadratic(alone).backward()
        optimizer.step()
        single.step()
    torch.testing.assert_close(x.detach()[1:], alone.detach(), rtol=1e-6, atol=1e-7)


def test_nothing_happens_without_a_gradient():
    x = torch.randn(2, 3, 4).requires_grad_()
    before = x.detach().clone()
    optimizer = AdamOnLion([x], weight_decay=0.1)
    assert optimizer.step(lambda: 5) == 5
    assert torch.equal(x.detach(), before)
