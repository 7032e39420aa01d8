"""Distances of features row by row: what the table of the oracles cannot show."""

from __future__ import annotations

import doctest
import math

import distily_features
import numpy as np
import pytest
import torch
from distily_features import VariationalInformation, cosine, l1, log_sum, mse, normalized_mse, smooth_l1
from distily_normalizers import l2, layernorm
from distily_projectors import orthogonal
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.schema import mistakes, options


def rows(n: int = 5, width: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))


def gradient(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> torch.Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(objective(student, teacher, **chosen).sum(), student)[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_cosine_ignores_lengths_so_its_gradient_stands_on_the_row(seed, scale):
    a, b = rows(seed=seed)
    torch.testing.assert_close(cosine(scale * a, b), cosine(a, b))
    assert (gradient(cosine, a, b) * a).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("objective", [cosine, normalized_mse])
def test_a_zero_row_stands_at_right_angles_to_everything_and_gets_no_gradient(objective):
    a, b = torch.zeros(1, 4), torch.ones(1, 4)
    assert objective(a, b).item() == 1
    assert objective(b, a).item() == 1
    assert (gradient(objective, a, b) == 0).all()


def test_a_teacher_of_length_zero_has_no_relative_error():
    a, b = torch.ones(1, 4), torch.zeros(1, 4)
    assert normalized_mse(a, b, variant="relative").item() == 0
    assert (gradient(normalized_mse, a, b, variant="relative") == 0).all()


def test_normalised_mse_identities():
    """After layernorm it is 2 (1 − Pearson), after l2 it is 2 (1 − cosine) / H; ``normalized_mse`` is H times the latter."""
    a, b = rows()
    pearson = torch.tensor([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    torch.testing.assert_close(mse(layernorm(a), layernorm(b)), 2 * (1 - pearson), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mse(l2(a), l2(b)), 2 * cosine(a, b) / 7)
    torch.testing.assert_close(normalized_mse(a, b), 2 * cosine(a, b))


def test_smooth_l1_lies_between_mse_and_l1():
    a, b = rows()
    torch.testing.assert_close(smooth_l1(a, b, delta=100.0), mse(a, b) / 200)
    torch.testing.assert_close(smooth_l1(a, b, delta=1e-9), l1(a, b))


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.1, 100), exponent=st.floats(1, 8))
def test_log_sum_of_scaled_differences_moves_by_a_constant(factor, exponent):
    """So the gradient's product with the difference is α, whatever the size of the difference: it grows as the fit improves."""
    a, b = rows()
    chosen = {"exponent": exponent, "epsilon": 1e-30}
    moved = log_sum(b + factor * (a - b), b, **chosen)
    torch.testing.assert_close(moved, log_sum(a, b, **chosen) + exponent * math.log(factor))
    products = (gradient(log_sum, a, b, **chosen) * (a - b)).sum(-1)
    torch.testing.assert_close(products, torch.full_like(products, exponent))


def test_log_sum_is_finite_where_a_power_of_the_difference_is_not():
    a, b = torch.full((1, 4), 1e12), torch.zeros(1, 4)
    assert torch.isinf(((a - b) ** 4).sum())
    assert log_sum(a, b).item() == pytest.approx(math.log(4) + 48 * math.log(10))
    assert gradient(log_sum, a, b).isfinite().all()


@pytest.mark.parametrize("exponent", [1.0, 1.5, 4.0])
def test_log_sum_at_equality_is_its_floor_without_a_gradient(exponent):
    a, _ = rows()
    torch.testing.assert_close(log_sum(a, a, exponent=exponent), torch.full((5,), math.log(1e-6), dtype=torch.float64))
    assert (gradient(log_sum, a, a, exponent=exponent) == 0).all()


def test_log_sum_of_a_batch_would_not_add():
    """Why there is a logarithm for each token: that of the whole batch is no mean of its parts'."""
    a, b = rows()
    whole = (a - b).pow(4).sum().log()
    parts = torch.stack([(x - y).pow(4).sum().log() for x, y in ((a[:2], b[:2]), (a[2:], b[2:]))])
    assert (whole - parts.mean()).abs() > 0.5
    assert log_sum(a, b).sum() == pytest.approx(log_sum(a[:2], b[:2]).sum() + log_sum(a[2:], b[2:]).sum())


class TestVariationalInformation:
    def fitted(self, weight: float, variance: float) -> VariationalInformation:
        objective = VariationalInformation(1, 1, initial_variance=variance).double()
        with torch.no_grad():
            objective.mean.weight.fill_(weight)
            objective.mean.bias.zero_()
        return objective

    def test_with_unit_variance_it_is_half_the_squared_error(self):
        a, b = rows(width=1)
        torch.testing.assert_close(self.fitted(1.0, 1.0)(a, b), mse(a, b) / 2, rtol=1e-6, atol=1e-6)

    def test_the_bound_is_tight_for_linear_gaussian_features(self):
        """I = −½ log(1 − 0.81) = 0.8304 nats; the entropy of b is ½ log 2πe. A wrong variance or slope gives less."""
        generator, rho = torch.Generator().manual_seed(0), 0.9
        a, noise = (torch.randn(200_000, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        b = rho * a + math.sqrt(1 - rho**2) * noise

        def bound(objective):
            value = objective(a, b).mean().item() + math.log(2 * math.pi) / 2
            return math.log(2 * math.pi * math.e) / 2 - value

        best = bound(self.fitted(rho, 1 - rho**2))
        assert best == pytest.approx(0.8304, abs=6e-3)
        assert bound(self.fitted(rho, 0.5)) < best - 0.1
        assert bound(self.fitted(0.5, 1 - rho**2)) < best - 0.1

    def test_a_noisy_massive_dimension_does_not_rule_it_once_it_is_learned(self):
        a, b = rows(200, 4)
        b = a + 0.1 * b
        b[:, 0] = 100 * torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.manual_seed(0)
        objective = VariationalInformation(4, 4).double()
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.3)
        for _ in range(150):
            optimizer.zero_grad()
            objective(a, b).mean().backward()
            optimizer.step()
        weights = 1 / (torch.nn.functional.softplus(objective.raw_variance) + 1e-5)
        assert weights[0] < weights[1:].min() / 100

    def test_parameters_come_from_the_seed_and_both_sides_of_the_bound_train(self):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(VariationalInformation(4, 6).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        objective = VariationalInformation(4, 6)
        objective(torch.randn(2, 4), torch.randn(2, 6)).sum().backward()
        assert all((each.grad != 0).any() for each in objective.parameters())


def test_the_vkd_recipe_of_parts_learns_a_rotation_and_nothing_else():
    """Against the normalised teacher: where the student is a turned copy, the projector alone brings the loss to 0 and stays
    orthogonal; a copy of twice the length keeps a distance that no rotation absorbs."""
    generator = torch.Generator().manual_seed(0)
    target = layernorm(torch.randn(64, 4, generator=generator))
    turn = torch.linalg.matrix_exp(
        torch.tensor([[0.0, 0.5, -0.3, 0.2], [-0.5, 0, 0.4, 0], [0.3, -0.4, 0, 0.6], [-0.2, 0, -0.6, 0]])
    )
    left = {}
    for length in (1, 2):
        torch.manual_seed(0)
        projector = orthogonal(4, 4)
        student = length * target @ projector.weight.detach() @ turn
        optimizer = torch.optim.Adam(projector.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss = smooth_l1(projector(student), target).mean()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(projector.weight.T @ projector.weight, torch.eye(4), atol=1e-5, rtol=0)
        left[length] = loss.item()
    assert left[1] < 1e-5
    assert left[2] > 0.1


@pytest.mark.parametrize(
    ("objective", "wrong"),
    [
        (smooth_l1, {"delta": 0}),
        (log_sum, {"exponent": 0.5}),
        (log_sum, {"epsilon": 0.0}),
        (log_sum, {"reduce": "batch"}),
        (normalized_mse, {"variant": "l1"}),
        (VariationalInformation, {"initial_variance": 0.0}),
    ],
)
def test_wrong_options_are_named(objective, wrong):
    lines = mistakes("it", wrong, options(objective))
    assert len(lines) == 1
    assert next(iter(wrong)) in lines[0]


def test_the_docstrings_examples():
    assert doctest.testmod(distily_features).failed == 0
