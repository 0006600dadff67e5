import pytest
import torch

from lightning_prompts.optimizers import AdamOnLion, BatchedAdam


def losses(x):
    return ((x - 1) ** 2 * torch.linspace(0.1, 5, x[0].numel(), dtype=x.dtype).view(x[0].shape)).flatten(1).sum(1)


def step(optimizer, x):
    optimizer.zero_grad()
    losses(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("torch_optimizer", "settings"),
    [
        (torch.optim.Adam, {"lr": 0.1, "eps": 1e-3}),
        (torch.optim.Adam, {"lr": 0.02, "betas": (0.5, 0.9999)}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_equals_torch_on_the_row_alone(torch_optimizer, settings, dtype):
    rows = torch.randn(3, 4, 5, dtype=dtype)
    batch = rows.clone().requires_grad_()
    alone = [row[None].clone().requires_grad_() for row in rows]
    optimizers = [torch_optimizer([x], **settings) for x in alone]
    ours = BatchedAdam([batch], **settings)
    for _ in range(200):
        step(ours, batch)
        for optimizer, x in zip(optimizers, alone, strict=True):
            step(optimizer, x)
    expected = torch.cat(alone).detach()
    torch.testing.assert_close(batch.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("optimizer", [BatchedAdam, AdamOnLion])
def test_row_added_later_steps_as_alone(optimizer):
    """PyTorch's optimizers count the steps of the parameter, so the first steps of the row would be too short."""
    first, later = torch.randn(2, 1, 4, 5)
    x = first.clone().requires_grad_()
    ours = optimizer([x], lr=0.1)
    for _ in range(7):
        step(ours, x)
    (state,) = ours.state.values()
    x.data = torch.cat([x.data, later])
    for name, value in state.items():
        state[name] = torch.cat([value, torch.zeros_like(value)])
    alone = later.clone().requires_grad_()
    single = optimizer([alone], lr=0.1)
    for _ in range(5):
        step(ours, x)
        step(single, alone)
    torch.testing.assert_close(x.detach()[1:], alone.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("torch_optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_defaults_equal_torchs(torch_optimizer):
    ours, theirs = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    settings = {"weight_decay": 0.01} if torch_optimizer is torch.optim.AdamW else {}  # torch's ours default there
    optimizers = BatchedAdam([ours], **settings), torch_optimizer([theirs])
    for scale in (1e-7, 1.0, -3.0):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = scale * torch.arange(6.0).view(2, 3)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_step_without_a_gradient_changes_nothing():
    x = torch.randn(2, 3).requires_grad_()
    before = x.detach().clone()
    BatchedAdam([x], weight_decay=0.1).step()
    assert torch.equal(x.detach(), before)
    assert BatchedAdam([x]).step(lambda: 5) == 5
