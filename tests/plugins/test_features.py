"""Feature distances, layer mappers, projectors and normalizers against definitions written out here."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from distily_features import cosine, mse
from distily_layer_mappers import all_blocks, index, last_k, penultimate_k, uniform
from distily_projectors import identity, l2, layernorm, linear, orthogonal
from hypothesis import given
from hypothesis import strategies as st

from distily.errors import DistilyError
from distily.layers import layer_pairs

DEPTH = st.integers(1, 40)


def rows(width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2))


def test_cosine_is_scipys_and_its_gradient_stands_on_the_row():
    a, b = rows()
    expected = [scipy.spatial.distance.cosine(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(cosine(a, b), expected, rtol=1e-12)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cosine(x, b), a)
    (gradient,) = torch.autograd.grad(cosine(a, b).sum(), a)
    assert (gradient * a).sum(-1).abs().max() < 1e-12


def test_a_zero_row_has_cosine_distance_one_and_a_finite_gradient():
    a = torch.zeros(1, 4, requires_grad=True)
    value = cosine(a, torch.ones(1, 4))
    value.sum().backward()
    assert value.item() == 1
    assert a.grad.isfinite().all()


def test_mse_is_the_mean_over_the_width_with_gradient_two_differences_over_it():
    a, b = rows()
    np.testing.assert_allclose(mse(a, b), ((a - b).numpy() ** 2).mean(-1), rtol=1e-12)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(mse(a, b).sum(), a)
    torch.testing.assert_close(gradient, 2 * (a - b) / 7)


def test_normalised_mse_identities():
    """After layernorm it is 2 (1 − Pearson), after l2 it is 2 (1 − cosine) / H."""
    a, b = rows()
    pearson = torch.tensor([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    torch.testing.assert_close(mse(layernorm(a), layernorm(b)), 2 * (1 - pearson), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mse(l2(a), l2(b)), 2 * cosine(a, b) / 7)


@given(student=DEPTH, teacher=DEPTH)
def test_mappers_name_blocks_that_exist(student, teacher):
    for mapper in (uniform, last_k, penultimate_k):
        pairs = layer_pairs("it", mapper, student, teacher)
        assert all(1 <= s <= student and 1 <= t <= teacher for s, t in pairs)
    uniform_pairs = uniform(student, teacher)
    assert uniform_pairs == sorted(uniform_pairs)
    assert uniform_pairs[-1] == (student, teacher)


def test_mappers_by_example():
    assert uniform(16, 32) == [(i, 2 * i) for i in range(1, 17)]
    assert uniform(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert uniform(4, 6)[-1] == (4, 6)
    assert last_k(4, 12, k=2) == [(4, 12), (3, 11)]
    assert penultimate_k(14, 30) == [(13, 29)]
    assert penultimate_k(1, 6) == [(1, 6)]
    assert all_blocks(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert layer_pairs("index", lambda s, t: index(s, t, pairs=[[-1, -1], [0, 0], [1, 2]]), 4, 6) == [(4, 6), (0, 0), (1, 2)]


@pytest.mark.parametrize(
    ("mapper", "depths"),
    [
        (all_blocks, (3, 4)),
        (lambda s, t: last_k(s, t, k=5), (4, 6)),
        (lambda s, t: index(s, t, pairs=[[5, 1]]), (4, 6)),
        (lambda s, t: index(s, t, pairs=[[1]]), (4, 6)),
        (lambda s, t: [], (4, 6)),
    ],
)
def test_pairs_that_cannot_be_are_refused(mapper, depths):
    with pytest.raises(DistilyError):
        layer_pairs("it", mapper, *depths)


@pytest.mark.parametrize(("student", "teacher"), [(8, 16), (16, 8), (8, 8)])
def test_orthogonal_stays_orthonormal_while_it_trains(student, teacher):
    projector = orthogonal(student, teacher)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        projector(torch.randn(10, student)).square().sum().backward()
        optimizer.step()
    weight = projector.weight
    gram = weight.T @ weight if teacher >= student else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(student, teacher)), atol=1e-5, rtol=0)


def test_linear_begins_as_the_identity_for_equal_widths_and_identity_needs_them():
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(8, 8)(x), x)
    assert linear(8, 5)(x).shape == (3, 5)
    with pytest.raises(ValueError, match="equal widths"):
        identity(8, 5)
