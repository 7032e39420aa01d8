"""Moments of features: what each forgets, degenerate documents, the reduction of wide features, and peers that differ."""

from __future__ import annotations

import doctest

import distily_moments
import pytest
import torch
from distily_moments import channel_correlation, covariance, flow, mmd, neuron_selectivity
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.geometry import reduced

EVERY = [flow, mmd, neuron_selectivity, covariance, channel_correlation]


def rows(n: int, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=generator, dtype=torch.float64) for _ in range(2))


def sides(objective, n: int, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(n, 3, width) if objective is flow else rows(n, width)


def value(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> float:
    return objective(student, teacher, **chosen).mean().item()


def gradient(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> torch.Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(objective(student, teacher, **chosen).mean(), student)[0]


@pytest.mark.parametrize("objective", EVERY)
def test_the_order_of_the_tokens_is_forgotten_by_all_but_neuron_selectivity(objective):
    a, b = sides(objective, 9)
    change = abs(value(objective, a.flip(0), b) / value(objective, a, b) - 1)
    assert (change > 1e-2) if objective is neuron_selectivity else (change < 1e-12)


def test_neuron_selectivity_forgets_the_order_of_the_channels_instead():
    a, b = rows(9, 4)
    assert value(neuron_selectivity, a.flip(1), b) == pytest.approx(value(neuron_selectivity, a, b))
    assert value(neuron_selectivity, b.flip(1) * torch.tensor([1.0, -2.0, 3.0, 4.0]), b) == pytest.approx(0, abs=1e-15)
    assert value(neuron_selectivity, b.repeat(1, 2), b) == pytest.approx(0, abs=1e-15)  # twice as wide


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("objective", EVERY)
def test_tiny_documents_are_finite(objective, n):
    a, b = (side.float() for side in sides(objective, n))
    for student, teacher in ((a, b), (b, b), (a * 0, b), (a, b * 0)):
        result = objective(student, teacher)
        assert result.shape == (n,)
        assert result.isfinite().all()
        assert gradient(objective, student, teacher).isfinite().all()
    if n == 1 and objective in (covariance, neuron_selectivity):
        assert value(objective, a, b) == pytest.approx(0, abs=1e-6)


class TestFlow:
    def test_the_products_of_channels_scale_with_both_layers(self):
        a, b = rows(9, 3, 4)
        assert value(flow, 2 * a, 2 * b) == pytest.approx(16 * value(flow, a, b))

    def test_one_layer_has_no_flow(self):
        with pytest.raises(ValueError, match="two mapped layers"):
            flow(*rows(5, 1, 4))

    def test_torchdistill_sums_the_lengths_of_columns_without_a_square(self):
        """The paper's value is a squared Frobenius norm: it falls by four where the differences halve; torchdistill's by two."""
        from torchdistill.losses.mid_level import FSPLoss

        names = {
            f"{side}_{which}": {"path": which, "io": "output"} for side in ("student", "teacher") for which in ("first", "second")
        }
        peer = FSPLoss({"pair": names})

        def torchdistill(*layers: torch.Tensor) -> float:
            maps = [
                {"first": {"output": side[:, 0].T[None, :, :, None]}, "second": {"output": side[:, 1].T[None, :, :, None]}}
                for side in layers
            ]
            return peer(*maps).item()

        _, b = rows(9, 2, 4)
        further, nearer = (torch.stack((b[:, 0], factor * b[:, 1]), 1) for factor in (2.0, 1.5))
        assert value(flow, further, b) == pytest.approx(4 * value(flow, nearer, b))
        assert torchdistill(further, b) == pytest.approx(2 * torchdistill(nearer, b))


class TestMmd:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10_000), kernel=st.sampled_from(["linear", "polynomial", "gaussian"]), n=st.integers(1, 9))
    def test_it_is_a_squared_distance_of_distributions(self, seed, kernel, n):
        a, b = rows(n, 3, seed=seed)
        assert value(mmd, a, b, kernel=kernel) > -1e-12
        lengths = torch.arange(1.0, n + 1)[:, None]
        assert value(mmd, b.flip(0) * lengths, b, kernel=kernel) == pytest.approx(0, abs=1e-12)

    def test_each_kernel_sees_more_than_the_one_before(self):
        """Students with the teacher's mean direction, then with its second moments, too."""
        teacher = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).double()
        line = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]]).double()
        turned = teacher @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
        seen = {
            name: [value(mmd, student, teacher, kernel=kernel) > 1e-9 for kernel in ("linear", "polynomial", "gaussian")]
            for name, student in (("line", line), ("turned", turned))
        }
        assert seen == {"line": [False, True, True], "turned": [False, False, True]}

    def test_a_teacher_whose_rows_are_all_alike_still_gives_a_finite_gradient(self):
        a, b = rows(5, 3)
        b = b[:1].expand(5, 3)
        assert mmd(a, b).isfinite().all()
        assert gradient(mmd, a, b).isfinite().all()


class TestChannels:
    def test_correlations_forget_shift_and_scale_of_each_channel_and_covariances_the_shift(self):
        a, b = rows(20, 4)
        shifted, scaled = a + torch.arange(4), a * torch.tensor([1.0, 10.0, 100.0, 1000.0])
        assert value(covariance, shifted, b) == pytest.approx(value(covariance, a, b))
        assert value(covariance, scaled, b) == pytest.approx(value(covariance, a, b))
        assert value(covariance, shifted, b, correlation=False) == pytest.approx(value(covariance, a, b, correlation=False))
        assert value(covariance, scaled, b, correlation=False) > 1e6

    def test_a_channel_that_never_changes_correlates_with_none(self):
        a, b = rows(20, 4)
        a[:, 0] = b[:, 0] = 3.0
        assert value(covariance, a, b) == pytest.approx(value(covariance, a[:, 1:], b[:, 1:]) * 9 / 16)
        assert gradient(covariance, a, b).isfinite().all()

    def test_inter_channel_similarities_keep_the_mean(self):
        a, b = rows(20, 4)
        assert value(channel_correlation, 5 * a, b) == pytest.approx(value(channel_correlation, a, b))
        assert abs(value(channel_correlation, a + 1, b) / value(channel_correlation, a, b) - 1) > 0.1

    def test_torchdistills_loss_of_two_equal_documents_is_half_of_that_of_one(self):
        """It divides by the batch twice, so it depends on how many documents come together."""
        from torchdistill.losses.mid_level import ChSimLoss

        a, b = (side.T[None].contiguous() for side in rows(6, 4))
        one, two = (ChSimLoss.batch_loss(a.repeat(count, 1, 1), b.repeat(count, 1, 1)).item() for count in (1, 2))
        assert one == pytest.approx(value(channel_correlation, *rows(6, 4)))
        assert two == pytest.approx(one / 2)


class TestReduction:
    def test_its_columns_are_orthonormal_and_always_the_same(self):
        basis = reduced(torch.eye(9).double(), 4)
        torch.testing.assert_close(basis.T @ basis, torch.eye(4).double())
        distily_moments.reduced.__globals__["_orthonormal"].cache_clear()
        torch.manual_seed(1)
        assert torch.equal(reduced(torch.eye(9).double(), 4), basis)

    def test_it_draws_from_no_generator_that_others_use(self):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        reduced(torch.eye(23), 5)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_what_was_drawn_under_inference_mode_trains_later(self):
        with torch.inference_mode():
            reduced(torch.ones(2, 29), 5)
        a = torch.ones(2, 29, requires_grad=True)
        reduced(a, 5).sum().backward()
        assert a.grad is not None

    @pytest.mark.parametrize("objective", [flow, covariance, channel_correlation])
    def test_wide_features_are_reduced_and_narrow_ones_are_not(self, objective):
        a, b = sides(objective, 12, width=9)
        assert value(objective, a, b, dimensions=4) == pytest.approx(value(objective, reduced(a, 4), reduced(b, 4)))
        assert value(objective, a, b, dimensions=9) == value(objective, a, b)
        assert value(objective, b, b, dimensions=4) == 0


def test_the_docstrings_examples():
    assert doctest.testmod(distily_moments).failed == 0
