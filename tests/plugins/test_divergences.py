"""Divergences against scipy in float64, closed forms and identities; no function of the plugin is used by an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from distily_divergences import cross_entropy, forward_kl, jsd, reverse_kl
from hypothesis import given, settings
from hypothesis import strategies as st

DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def rows(seed: int, n: int = 5, v: int = 11, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, v, generator=generator, dtype=torch.float64) * spread for _ in range(2))


def distribution(logits: torch.Tensor) -> np.ndarray:
    return scipy.special.softmax(logits.detach().numpy(), axis=-1)


def oracle(name: str, student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> np.ndarray:
    s, t = distribution(student), distribution(teacher)
    if name == "forward_kl":
        return scipy.stats.entropy(t, s, axis=-1)
    if name == "reverse_kl":
        return scipy.stats.entropy(s, t, axis=-1)
    m = beta * t + (1 - beta) * s
    return beta * scipy.stats.entropy(t, m, axis=-1) + (1 - beta) * scipy.stats.entropy(s, m, axis=-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), v=st.integers(2, 40), spread=st.floats(0.1, 6.0))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_are_those_of_scipy(name, seed, v, spread):
    student, teacher = rows(seed, v=v, spread=spread)
    np.testing.assert_allclose(DIVERGENCES[name](student, teacher), oracle(name, student, teacher), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_jsd_with_any_beta(beta):
    student, teacher = rows(1)
    np.testing.assert_allclose(jsd(student, teacher, beta=beta), oracle("jsd", student, teacher, beta), rtol=1e-9)


def test_gradients_are_the_closed_forms():
    """Forward KL: s − t. Reverse KL: s (log s − log t − KL(s‖t)). JSD: (1−β) s (log s − log m − KL(s‖m))."""
    student, teacher = rows(2)
    student.requires_grad_()
    s, t = (torch.from_numpy(distribution(x)) for x in (student, teacher))
    beta = 0.3
    m = beta * t + (1 - beta) * s
    expected = {
        "forward_kl": s - t,
        "reverse_kl": s * (s.log() - t.log() - (s * (s / t).log()).sum(-1, keepdim=True)),
        "jsd": (1 - beta) * s * ((s / m).log() - (s * (s / m).log()).sum(-1, keepdim=True)),
    }
    for name, function in DIVERGENCES.items():
        value = function(student, teacher, **({"beta": beta} if name == "jsd" else {}))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_shifting_all_logits_changes_nothing_and_equality_is_zero(name):
    student, teacher = rows(3)
    function = DIVERGENCES[name]
    torch.testing.assert_close(function(student + 5.0, teacher - 2.0), function(student, teacher))
    assert function(teacher + 1.0, teacher).abs().max() < 1e-12
    assert (function(student, teacher) > 0).all()


def test_reverse_is_forward_with_the_arguments_exchanged_and_jsd_is_bounded_by_ln_2():
    student, teacher = rows(4, spread=20.0)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))
    assert (jsd(student, teacher) <= math.log(2) + 1e-12).all()


def test_normalised_jsd_reaches_both_kl_divergences_at_its_ends():
    student, teacher = rows(5, spread=0.5)
    torch.testing.assert_close(
        jsd(student, teacher, beta=1e-7, normalize=True), forward_kl(student, teacher), rtol=1e-5, atol=1e-8
    )
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - 1e-7, normalize=True), reverse_kl(student, teacher), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_masked_by_minus_infinity_in_both_models_take_no_part(name):
    student, teacher = rows(6)
    padded = [torch.cat([x, torch.full((5, 2), -math.inf, dtype=torch.float64)], 1).requires_grad_() for x in (student, teacher)]
    value = DIVERGENCES[name](*padded)
    torch.testing.assert_close(value, DIVERGENCES[name](student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), padded[0])
    assert not gradient[:, -2:].nan_to_num(1.0).any() or name != "forward_kl"


def test_mass_of_the_teacher_that_the_student_cannot_reach_is_infinite_not_silently_dropped():
    student, teacher = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert forward_kl(student, teacher).isinf().all()
    assert reverse_kl(student, teacher).isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_rounded_to_bf16_are_near(name):
    student, teacher = rows(7, n=64, v=1000)
    rounded = [x.bfloat16().float() for x in (student, teacher)]
    exact = DIVERGENCES[name](student, teacher)
    assert (DIVERGENCES[name](*rounded) - exact).abs().max() < 2e-2 * exact.max()


def test_cross_entropy_is_minus_the_label_log_probability():
    student, _ = rows(8)
    labels = torch.tensor([0, 3, 10, 5, 5])
    expected = -scipy.special.log_softmax(student.numpy(), axis=-1)[np.arange(5), labels]
    np.testing.assert_allclose(cross_entropy(student, None, labels=labels), expected, rtol=1e-12)


def test_a_one_hot_teacher_makes_forward_kl_the_cross_entropy():
    student, _ = rows(9)
    labels = torch.tensor([0, 3, 10, 5, 5])
    teacher = torch.where(torch.nn.functional.one_hot(labels, 11).bool(), 0.0, -math.inf).double()
    torch.testing.assert_close(forward_kl(student, teacher), cross_entropy(student, None, labels=labels))
