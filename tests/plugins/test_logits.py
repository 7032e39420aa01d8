"""Objectives on logits that are no divergence: limits, invariances, degenerate rows and peers with other factors."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from distily_logits import (
    hinge_ranking,
    logistic_ranking,
    logit_mse,
    pearson,
    probability_mse,
    soft_cross_entropy,
    standardized_kl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.peers import torchdistill_losses


def rows(seed: int, n: int = 5, v: int = 11, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, v, generator=generator, dtype=torch.float64) * spread)


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), student)[0]


def masked(logits: torch.Tensor, columns: slice) -> torch.Tensor:
    logits = logits.clone()
    logits[:, columns] = -math.inf
    return logits


class TestSoftCrossEntropy:
    def test_it_is_forward_kl_plus_the_entropy_of_the_teacher(self):
        student, teacher = rows(0)
        s, t = student.softmax(-1).numpy(), teacher.softmax(-1).numpy()
        expected = scipy.stats.entropy(t, s, axis=-1) + scipy.stats.entropy(t, axis=-1)
        torch.testing.assert_close(soft_cross_entropy(student, teacher), torch.from_numpy(expected))

    def test_its_gradient_is_that_of_forward_kl(self):
        student, teacher = rows(1)
        student.requires_grad_()
        expected = student.softmax(-1) - teacher.softmax(-1)
        torch.testing.assert_close(gradient(soft_cross_entropy(student, teacher), student), expected)


class TestMse:
    def test_the_centred_one_is_the_limit_of_forward_kl_at_high_temperature(self):
        """T² KL(t‖s) → ‖Δ‖² / (2 V); the error falls as 1/T."""
        student, teacher = rows(2)
        errors = []
        for temperature in (100.0, 1000.0):
            s, t = ((logits / temperature).softmax(-1).numpy() for logits in (student, teacher))
            limit = 2 * temperature**2 * scipy.stats.entropy(t, s, axis=-1)
            errors.append((logit_mse(student, teacher) / torch.from_numpy(limit) - 1).abs().max().item())
        assert errors[1] < 0.01
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)

    def test_only_the_centred_one_ignores_a_shift_that_no_probability_sees(self):
        student, teacher = rows(3)
        torch.testing.assert_close(logit_mse(student + 5.0, teacher - 2.0), logit_mse(student, teacher))
        shifted = logit_mse(teacher + 3.0, teacher, center=False)
        torch.testing.assert_close(shifted, torch.full((5,), 9.0, dtype=torch.float64))

    @pytest.mark.parametrize("center", [True, False])
    def test_tokens_that_the_teacher_masks_take_no_part(self, center):
        student, teacher = rows(4)
        student.requires_grad_()
        value = logit_mse(student, masked(teacher, slice(8, None)), center=center)
        torch.testing.assert_close(value, logit_mse(student[:, :8], teacher[:, :8], center=center))
        assert not gradient(value, student)[:, 8:].any()

    def test_of_probabilities_lies_between_0_and_2(self):
        sure = torch.tensor([[0.0, -math.inf, -math.inf]])
        torch.testing.assert_close(probability_mse(sure, sure.roll(1, -1)), torch.tensor([2.0]))
        assert probability_mse(sure, sure).item() == 0.0


class TestStandardized:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10.0), shift=st.floats(-10.0, 10.0))
    def test_scale_and_shift_of_either_side_change_nothing(self, seed, scale, shift):
        student, teacher = rows(seed)
        value = standardized_kl(student, teacher)
        torch.testing.assert_close(standardized_kl(scale * student + shift, teacher), value, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(standardized_kl(student, scale * teacher + shift), value, rtol=1e-4, atol=1e-7)
        assert standardized_kl(scale * teacher + shift, teacher).abs().max() < 1e-9

    def test_the_deviation_is_the_unbiased_one_of_the_authors_code(self):
        """Of 3 tokens the one over V is smaller by sqrt(2/3), and the value another."""
        student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        both = []
        for unbiased in (True, False):
            s, t = ((z - z.mean()) / (z.std(unbiased=unbiased) + 1e-7) / 0.5 for z in (student, teacher))
            both.append(0.25 * torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum").item())
        assert standardized_kl(student, teacher).item() == pytest.approx(both[0], rel=1e-6)
        assert both == pytest.approx([0.8509, 1.1114], abs=1e-4)

    def test_at_temperature_1_the_z_scores_of_a_large_vocabulary_are_almost_uniform(self):
        """Why the default is 0.5: of 50,257 normal logits the likeliest token gets 0.1 % at T = 1, and 100 times that at 0.5."""
        generator = torch.Generator().manual_seed(0)
        logits = 6.0 * torch.randn(1, 50257, generator=generator)
        scores = (logits - logits.mean()) / logits.std()
        assert scores.softmax(-1).max() < 0.002
        assert (scores / 0.5).softmax(-1).max() > 5 * scores.softmax(-1).max()

    def test_a_student_whose_logits_are_all_equal_has_a_finite_gradient(self):
        _, teacher = rows(5)
        student = torch.zeros_like(teacher).requires_grad_()
        assert gradient(standardized_kl(student, teacher), student).isfinite().all()

    def test_tokens_that_both_sides_mask_take_no_part(self):
        student, teacher = (masked(logits, slice(8, None)) for logits in rows(6))
        torch.testing.assert_close(standardized_kl(student, teacher), standardized_kl(student[:, :8], teacher[:, :8]))


class TestPearson:
    def test_it_ignores_how_sure_the_student_is_as_long_as_probabilities_are_an_affine_image(self):
        _, teacher = rows(7)
        t = teacher.softmax(-1)
        flatter = (0.3 * t + 0.7 / t.shape[-1]).log()
        assert pearson(flatter, teacher).abs().max() < 1e-12

    def test_at_high_temperature_it_is_the_correlation_of_the_logits_and_keeps_its_gradient(self):
        student, teacher = rows(8)
        student.requires_grad_()
        expected = 1.0 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(student, teacher, strict=True)])
        hot = pearson(student / 1e4, teacher / 1e4)
        torch.testing.assert_close(hot, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gradient(hot, student), gradient(expected, student), rtol=1e-2, atol=1e-3)

    def test_ports_of_dist_grow_as_the_square_of_the_temperature(self):
        """torchdistill's whole loss at T = 4 is 16 times the correlation's distance, which is of order 1 as it is."""
        student, teacher = rows(9)
        port = torchdistill_losses().DISTLoss("m", "output", "m", "output", beta=1.0, gamma=0.0, tau=4.0)
        theirs = port({"m": {"output": student}}, {"m": {"output": teacher}}).item()
        ours = pearson(student / 4, teacher / 4).mean().item()
        assert theirs == pytest.approx(16 * ours)
        assert (theirs, ours) == pytest.approx((18.3326, 1.1458), abs=1e-4)

    def test_a_uniform_student_correlates_with_nothing(self):
        _, teacher = rows(10)
        student = torch.zeros_like(teacher).requires_grad_()
        value = pearson(student, teacher)
        torch.testing.assert_close(value, torch.ones_like(value))
        assert gradient(value, student).isfinite().all()


class TestRanking:
    def test_hinge_is_0_once_the_student_leads_by_more_than_the_teacher(self):
        teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
        wider = torch.tensor([[0.7, 0.25, 0.05, 0.0]], dtype=torch.float64).log()
        narrower = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64).log()
        assert hinge_ranking(wider, teacher, k=3).item() == 0.0
        assert hinge_ranking(teacher, teacher).item() == 0.0
        assert hinge_ranking(narrower, teacher).item() == pytest.approx((3 * 0.1 + 2 * 0.2 + 0.3) / 6)

    def test_logistic_reads_the_order_alone_and_is_never_0(self):
        student, teacher = rows(11)
        torch.testing.assert_close(logistic_ranking(student, 0.5 * teacher, k=4), logistic_ranking(student, teacher, k=4))
        torch.testing.assert_close(logistic_ranking(student + 4.0, teacher), logistic_ranking(student, teacher))
        usual, wide, widest = (logistic_ranking(scale * teacher, teacher).max().item() for scale in (1.0, 10.0, 1000.0))
        assert usual > wide > widest
        assert wide > 0.0
        assert (logistic_ranking(-teacher, teacher) > math.log(2)).all()

    @pytest.mark.parametrize("objective", [hinge_ranking, logistic_ranking])
    def test_a_teacher_with_nothing_to_rank_gives_0_with_a_finite_gradient(self, objective):
        student, _ = rows(12)
        student.requires_grad_()
        one_hot = masked(torch.zeros(5, 11, dtype=torch.float64), slice(1, None))
        for teacher in (torch.zeros(5, 11, dtype=torch.float64), one_hot):
            value = objective(student, teacher)
            assert not value.any()
            assert not gradient(value, student).any()

    def test_every_token_counts_once_where_distillkit_counts_every_pair_of_the_batch(self):
        """A teacher row with a tie has fewer pairs: their mean over all pairs gives it less weight, ours does not."""
        teacher = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64).log()
        student = torch.zeros(2, 3, dtype=torch.float64)
        student[1, 2] = 2.0
        ours = logistic_ranking(student, teacher).mean().item()
        pairs = [math.log(2)] * 3 + [math.log1p(math.exp(2.0))] * 2
        assert ours == pytest.approx((math.log(2) + math.log1p(math.exp(2.0))) / 2)
        assert (ours, sum(pairs) / 5) == pytest.approx((1.4100, 1.2667), abs=1e-4)
