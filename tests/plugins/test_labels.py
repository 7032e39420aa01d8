"""Objectives with labels: what the table of oracles cannot say of them. Expectations are computed here from probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch
from distily_labels import cross_entropy, decoupled_kd, normalized_kd, token_scaled
from hypothesis import given, settings
from hypothesis import strategies as st

LABELS = torch.tensor([0, 3, 10, 5, 5])


def rows(seed: int, n: int = 5, v: int = 11, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, v, generator=generator, dtype=torch.float64) * spread)


def one_hot(labels: torch.Tensor, v: int = 11) -> torch.Tensor:
    return torch.full((len(labels), v), -math.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), student)[0]


class TestCrossEntropy:
    def test_it_is_minus_the_log_probability_of_the_label(self):
        student, _ = rows(8)
        expected = -scipy.special.log_softmax(student.numpy(), axis=-1)[np.arange(5), LABELS]
        np.testing.assert_allclose(cross_entropy(student, None, labels=LABELS), expected, rtol=1e-12)

    def test_its_gradient_is_the_prediction_less_the_label(self):
        student, _ = rows(9)
        student.requires_grad_()
        expected = student.softmax(-1) - torch.nn.functional.one_hot(LABELS, 11)
        torch.testing.assert_close(gradient(cross_entropy(student, None, labels=LABELS), student), expected)


class TestDecoupled:
    def test_what_the_other_tokens_teach_does_not_shrink_as_the_teacher_grows_sure_of_the_label(self):
        """Forward KL gives them the factor 1 − t_y, below 1e-8 for the second teacher; here nothing changes."""
        student, teacher = rows(0)
        student.requires_grad_()
        surer = teacher.scatter_add(1, LABELS[:, None], torch.full((5, 1), 30.0, dtype=torch.float64))
        assert (1.0 - surer.softmax(-1).gather(1, LABELS[:, None])).max() < 1e-8
        before, after = (
            gradient(decoupled_kd(student, each, labels=LABELS, target_weight=0.0), student) for each in (teacher, surer)
        )
        torch.testing.assert_close(before, after)
        assert before.norm() > 0.1

    def test_a_teacher_that_is_sure_to_17_digits_loses_none_of_them(self):
        """1 − t_y is 5e-18: taken from 1 it would be 0, and the target part infinite. Both sides have 3 tokens."""
        teacher = torch.tensor([[40.0, 0.0, math.log(0.2)]], dtype=torch.float64)
        student = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
        rest = 1.2 * math.exp(-40)
        assert 1.0 - teacher.softmax(-1)[0, 0].item() == 0.0
        target = math.log(3.0) + rest * (math.log(rest) - math.log(2 / 3))
        others = 5 / 6 * math.log(5 / 3) + 1 / 6 * math.log(1 / 3)
        label = torch.tensor([0])
        assert decoupled_kd(student, teacher, labels=label, other_weight=0.0).item() == pytest.approx(target, rel=1e-14)
        assert decoupled_kd(student, teacher, labels=label, target_weight=0.0).item() == pytest.approx(others * 0.5, rel=1e-14)
        # the same two with the sides exchanged: now the target part is (2/3) · (ln(2/3) − ln(rest)) − (1/3) · ln 3
        swapped = decoupled_kd(teacher, student, labels=label, other_weight=0.0).item()
        assert swapped == pytest.approx(2 / 3 * (math.log(2 / 3) - math.log(rest)) - math.log(3) / 3, rel=1e-14)

    def test_a_one_hot_teacher_makes_it_the_label_loss(self):
        student, _ = rows(1)
        student.requires_grad_()
        value = decoupled_kd(student, one_hot(LABELS), labels=LABELS)
        expected = cross_entropy(student, None, labels=LABELS)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient(value, student), gradient(expected, student))


class TestNormalized:
    def test_the_second_part_has_the_gradient_of_decoupled_kd(self):
        """CE(t̂, ŝ) = KL(t̂‖ŝ) + H(t̂), and the teacher's entropy is a constant."""
        student, teacher = rows(2)
        student.requires_grad_()
        parts = [normalized_kd(student, teacher, labels=LABELS, gamma=gamma) for gamma in (1.0, 0.0)]
        other = decoupled_kd(student, teacher, labels=LABELS, target_weight=0.0, other_weight=1.0)
        torch.testing.assert_close(gradient(parts[0] - parts[1], student), gradient(other, student))

    def test_a_temperature_leaves_the_label_part_alone(self):
        student, teacher = rows(3)
        values = [normalized_kd(student, teacher, labels=LABELS, gamma=0.0, temperature=t) for t in (1.0, 4.0)]
        torch.testing.assert_close(*values)

    def test_a_one_hot_teacher_makes_it_the_label_loss(self):
        student, _ = rows(4)
        student.requires_grad_()
        value = normalized_kd(student, one_hot(LABELS), labels=LABELS)
        torch.testing.assert_close(value, cross_entropy(student, None, labels=LABELS))
        assert gradient(value, student).isfinite().all()

    def test_the_authors_code_keeps_the_label_in_its_second_part(self):
        """cls_KD at 1c2c0ff scatters ones into a mask of ones, so that it selects every token: γ T² times the whole soft
        cross-entropy, which pulls the label a second time. The paper takes the label out.
        """
        student = torch.tensor([[0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
        teacher = torch.tensor([[3.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
        label, gamma = torch.tensor([0]), 1.5
        mask = torch.ones_like(student).scatter_(1, label[:, None], 1).bool()
        assert mask.all()
        s, t = student.softmax(-1), teacher.softmax(-1)
        code = -(t[0, 0] * s[0, 0].log()) - gamma * (t[mask] * s[mask].log()).sum()
        paper = normalized_kd(student, teacher, labels=label, gamma=gamma)
        assert code.item() == pytest.approx(3.7685, abs=1e-4)
        assert paper.item() == pytest.approx(2.9380, abs=1e-4)


class TestTokenScaled:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 8), weight_temperature=st.floats(0.1, 100.0))
    def test_it_is_a_weighted_mean_and_leans_to_what_the_teacher_finds_hard(self, seed, n, weight_temperature):
        student, teacher = rows(seed, n)
        labels = torch.randint(11, (n,), generator=torch.Generator().manual_seed(seed))
        values = token_scaled(student, teacher, labels=labels, weight_temperature=weight_temperature)
        soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        weights = values / soft
        assert weights.mean().item() == pytest.approx(1.0)
        hardness = cross_entropy(teacher, None, labels=labels)
        assert torch.equal(weights.argmax(), hardness.argmax())

    def test_a_teacher_that_finds_all_labels_alike_gives_the_plain_mean(self):
        student, teacher = rows(5, 2)
        teacher = teacher[:1].expand(2, -1)
        soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(token_scaled(student, teacher, labels=torch.tensor([4, 4])), soft)

    def test_a_high_weight_temperature_gives_the_plain_mean(self):
        student, teacher = rows(6)
        soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(token_scaled(student, teacher, labels=LABELS, weight_temperature=1e6), soft, rtol=1e-5, atol=0)

    def test_a_label_that_the_teacher_rules_out_counts_as_the_hardest_of_the_others(self):
        student, teacher = rows(7, 3)
        labels = torch.tensor([1, 2, 3])
        teacher[2, 3] = -math.inf
        losses = cross_entropy(teacher, None, labels=labels)
        assert losses[2].isinf()
        losses[2] = losses[:2].max()
        soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        expected = 3 * (losses / 10.0).softmax(0) * soft
        torch.testing.assert_close(token_scaled(student, teacher, labels=labels), expected)
