"""HSIC and CKA: against the estimator written with kernels, and what they must and must not see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.similarity import linear_cka, linear_hsic


def rows(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_kernels(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Song et al. 2012, equation 5, on the kernels themselves."""
    n, ones = len(x), torch.ones(len(x), dtype=x.dtype)
    k, m = ((each @ each.T).fill_diagonal_(0.0) for each in (x, y))
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (torch.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 12), widths=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 999))
def test_both_forms_are_the_unbiased_estimator_on_kernels(n, widths, seed):
    x, y = rows(n, widths[0], seed), rows(n, widths[1], seed + 1) + 3.0
    torch.testing.assert_close(linear_hsic(x, y), with_kernels(x, y), rtol=1e-8, atol=1e-9)
    assert -1.0 - 1e-9 <= linear_cka(x, y).item() <= 1.0 + 1e-9


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_sees_neither_rotation_nor_scale_nor_shift_but_other_linear_maps(unbiased):
    x, y = rows(40, 6), rows(40, 9, 1)
    y[:, :6] += x
    value = linear_cka(x, y, unbiased=unbiased)
    rotation = torch.linalg.qr(rows(6, 6, 2)).Q
    torch.testing.assert_close(linear_cka(x @ rotation * 7.0 + 5.0, y, unbiased=unbiased), value)
    torch.testing.assert_close(linear_cka(x, 3.0 * x @ rotation, unbiased=unbiased).item(), 1.0)
    assert abs(linear_cka(x @ rows(6, 6, 3), y, unbiased=unbiased) - value) > 0.01


def test_independent_rows_look_alike_to_the_biased_estimator_alone():
    """Kornblith et al. 2019's own estimate of unrelated Gaussians is about H / (n + H) = ½; the unbiased one is 0 in the mean."""
    pairs = [(rows(64, 64, 2 * seed), rows(64, 64, 2 * seed + 1)) for seed in range(20)]
    means = [sum(linear_cka(*pair, unbiased=unbiased).item() for pair in pairs) / 20 for unbiased in (False, True)]
    assert means[0] == pytest.approx(0.5, abs=0.02)
    assert means[1] == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_sets_that_say_nothing_give_0_and_no_gradient(n, unbiased):
    varied = rows(n, 5, 1)
    for silent in (torch.zeros(n, 5), torch.ones(n, 5), *([torch.eye(5)[:n]] if unbiased else [])):
        x = silent.double().requires_grad_()
        value = linear_cka(x, varied, unbiased=unbiased)
        value.backward()
        assert value.item() == 0.0
        assert not x.grad.any()


def test_the_gradient_is_that_of_the_value_and_is_finite_at_the_maximum():
    y = rows(8, 5, 1)
    for unbiased in (True, False):
        assert torch.autograd.gradcheck(lambda x, u=unbiased: linear_cka(x, y, unbiased=u), rows(8, 3).requires_grad_())
    x = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_cka(x, y), x)
    assert gradient.abs().max() < 1e-12


def test_massive_activations_stay_in_the_range_of_float32():
    x = rows(64, 256).float()
    torch.testing.assert_close(linear_cka(x * 1e10, x * 1e-10), torch.ones(()), atol=1e-4, rtol=0)
