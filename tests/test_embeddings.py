import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_prompts.embeddings import farthest, lerp, principal_axes, shift, slerp, transfer


def paper(a, b, value):
    """Compute the formula of arXiv 2308.12059 in float64, for rows of one length, neither equal nor opposite."""
    a, b = a.double(), b.double()
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1)).unsqueeze(-1)
    return torch.sin((1 - value) * angle) / angle.sin() * a + torch.sin(value * angle) / angle.sin() * b


@pytest.mark.parametrize("value", [0, 0.1, 0.5, 0.9, 1, -0.3, 1.4])
def test_slerp_equals_the_papers_for_rows_of_equal_length(value):
    a, b = (7 * F.normalize(torch.randn(50, 16), dim=-1) for _ in range(2))
    assert slerp(a, b, value).double() == pytest.approx(paper(a, b, value), abs=1e-5)
    assert slerp(a.double(), b.double(), value) == pytest.approx(paper(a, b, value), abs=1e-6)


def test_slerp_interpolates_angle_and_norm_linearly():
    a, b = torch.randn(2, 20, 8, dtype=torch.float64)
    whole = torch.acos(F.cosine_similarity(a, b, dim=-1))
    for value in (0.25, 0.5, 0.75):
        result = slerp(a, b, value)
        assert torch.acos(F.cosine_similarity(a, result, dim=-1)) == pytest.approx(value * whole, abs=1e-7)
        assert result.norm(dim=-1) == pytest.approx(lerp(a.norm(dim=-1), b.norm(dim=-1), value), abs=1e-9)


@pytest.mark.parametrize("gap", [0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_of_almost_equal_or_opposite_rows_is_stable(gap, sign):
    a = torch.randn(30, 12)
    b = (sign * 2 * (a.double() + gap * torch.randn(30, 12).double())).float()
    for value in (0, 0.3, 0.5, 1):
        result = slerp(a, b, value)
        assert result.norm(dim=-1) == pytest.approx((1 + value) * a.norm(dim=-1), rel=1e-5 + 2 * gap * 12)
        if sign == 1:
            assert result == pytest.approx(lerp(a, b, value), abs=1e-5 + 2 * gap)
        else:
            angle = torch.acos(F.cosine_similarity(a, result, dim=-1).clamp(-1, 1))
            assert angle == pytest.approx(torch.full((30,), value * math.pi), abs=0.02)
    assert slerp(a, b, 0) == pytest.approx(a, abs=1e-5)
    assert slerp(a, b, 1) == pytest.approx(b, abs=1e-4)


def test_slerp_from_and_to_zeros_is_linear():
    a = torch.randn(3, 5)
    assert torch.equal(slerp(a, torch.zeros(3, 5), 0.25), 0.75 * a)
    assert torch.equal(slerp(torch.zeros(3, 5), a, 0.25), 0.25 * a)
    assert torch.equal(slerp(torch.zeros(3, 5), torch.zeros(3, 5), 0.25), torch.zeros(3, 5))


def test_slerp_treats_each_row_separately():
    a, b = torch.randn(2, 4, 6, 8)
    value = torch.rand(4, 6, 1)
    result = slerp(a, b, value)
    for i, j in itertools.product(range(4), range(6)):
        assert torch.allclose(slerp(a[i, j], b[i, j], float(value[i, j])), result[i, j], atol=1e-6)


@pytest.mark.parametrize("other", ["far", "equal", "opposite"])
def test_slerp_has_finite_and_correct_gradients(other):
    a = torch.randn(3, 5, dtype=torch.float64)
    b = {"far": torch.randn(3, 5, dtype=torch.float64), "equal": a.clone(), "opposite": -a}[other]
    value = torch.full((3, 1), 0.3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (a, b, value)]
    if other == "far":
        assert torch.autograd.gradcheck(slerp, leaves)
    gradients = torch.autograd.grad(slerp(*leaves).sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_shift_gives_the_mean_and_deviation_of_the_reference():
    embeds, like = torch.randn(2, 3, 7, 5) * 3 + 2, torch.randn(2, 3, 7, 5)
    shifted = shift(embeds, like)
    for p, s in itertools.product(range(2), range(3)):
        assert float(shifted[p, s].mean()) == pytest.approx(float(like[p, s].mean()), abs=1e-5)
        assert float(shifted[p, s].std()) == pytest.approx(float(like[p, s].std()), abs=1e-5)
        assert float(torch.corrcoef(torch.stack([shifted[p, s].flatten(), embeds[p, s].flatten()]))[0, 1]) > 0.99999


def test_farthest_maximizes_the_minimum_distance():
    vectors = torch.randn(40, 6)
    distance = 1 - F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    expected = [3]
    while len(expected) < 7:
        rest = [i for i in range(40) if i not in expected]
        expected.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in expected)))
    assert farthest(vectors, 7, first=3) == expected


def test_farthest_selects_near_duplicates_last():
    corners = torch.eye(4)
    vectors = torch.cat([corners, corners + 1e-4])
    assert {i % 4 for i in farthest(vectors, 4)} == {0, 1, 2, 3}
    assert sorted(farthest(torch.ones(5, 3), 5)) == [0, 1, 2, 3, 4]


def test_transfer_adds_a_difference():
    a, b, c = torch.randn(3, 4, 6)
    assert torch.allclose(transfer(a, a, b), b, atol=1e-6)
    assert torch.allclose(transfer(c, a, b, 0.5), c + (b - a) / 2, atol=1e-6)
    assert torch.equal(transfer(c, a, a), c)


def test_principal_axes_equal_eigenvectors_of_the_covariance():
    vectors = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5], dtype=torch.float64) + 7
    _, expected = torch.linalg.eigh(vectors.T.cov())
    result = principal_axes(vectors, 2)
    for axis, eigenvector in zip(result, (expected[:, -1], expected[:, -2]), strict=True):
        assert float(axis @ eigenvector) ** 2 == pytest.approx(1)
        assert float(axis.norm()) == pytest.approx(1)
        assert axis[axis.abs().argmax()] > 0
