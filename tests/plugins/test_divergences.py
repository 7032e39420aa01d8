"""Divergences of next-token distributions: gradients in closed form, limits, bounds, masks, precision, and peers that differ.

Their values are in ``oracles/divergences.py``. No expected number here comes from a plugin, unless two of them are compared.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from distily_alpha_divergences import AlphaBeta, amari_alpha, renyi, total_variation
from distily_divergences import (
    ConfidenceKL,
    adaptive_kl,
    forward_kl,
    jeffreys,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.divergences import cichocki, trl
from torch import Tensor

from distily.testing import check_objective

LABELS = torch.tensor([0, 3, 10, 5, 5])


def confidence_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return ConfidenceKL(gamma=0.3).to(student.dtype)(student, teacher, labels=LABELS)


DIVERGENCES: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "jsd of a small share": partial(jsd, beta=0.01, normalize="beta"),
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "confidence_kl": confidence_kl,
    "total_variation": total_variation,
    "alpha_beta": AlphaBeta(),
    "amari_alpha": amari_alpha,
    "renyi": renyi,
    "renyi near 1": partial(renyi, alpha=0.99),
}
everyone = pytest.mark.parametrize("name", DIVERGENCES)


def rows(seed: int, n: int = 5, v: int = 11, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, v, generator=generator, dtype=torch.float64) * spread for _ in range(2))


def logits(*probabilities: float) -> Tensor:
    """One row; a probability of 0 is a logit of -inf."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def gradient(objective: Any, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(objective(student, teacher).sum(), student)[0]


def at_logits(slope: Tensor, s: Tensor) -> Tensor:
    """The gradient at the logits from that at the probabilities."""
    return s * (slope - (s * slope).sum(-1, keepdim=True))


# --- what all have in common ---


@everyone
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), v=st.integers(2, 40), spread=st.floats(0.1, 6.0))
def test_a_divergence_is_positive_zero_at_equality_and_blind_to_a_shift_of_all_logits(name, seed, v, spread):
    student, teacher = rows(seed, v=v, spread=spread)
    function = DIVERGENCES[name]
    value = function(student, teacher)
    assert (value > 0).all()
    torch.testing.assert_close(function(student + 5.0, teacher - 2.0), value, rtol=1e-9, atol=1e-12)
    assert function(teacher + 1.0, teacher).abs().max() < 1e-12


GRADIENTS = {
    "forward_kl": (forward_kl, lambda s, t: s - t),
    "reverse_kl": (reverse_kl, lambda s, t: s * ((s / t).log() - (s * (s / t).log()).sum(-1, keepdim=True))),
    "jsd": (partial(jsd, beta=0.3), lambda s, t: at_logits(0.7 * (s / (0.3 * t + 0.7 * s)).log(), s)),
    "skew_kl": (partial(skew_kl, skew=0.3), lambda s, t: at_logits(-0.7 * t / (0.3 * t + 0.7 * s), s)),
    "skew_reverse_kl": (
        partial(skew_reverse_kl, skew=0.3),
        lambda s, t: at_logits((s / (0.7 * t + 0.3 * s)).log() - 0.3 * s / (0.7 * t + 0.3 * s), s),
    ),
    "skew_reverse_kl, mixture detached": (
        partial(skew_reverse_kl, skew=0.3, detach_mixture=True),
        lambda s, t: at_logits((s / (0.7 * t + 0.3 * s)).log(), s),
    ),
    "total_variation": (total_variation, lambda s, t: at_logits(0.5 * torch.sign(s - t), s)),
    "alpha_beta": (AlphaBeta(alpha=0.2, beta=0.7), lambda s, t: at_logits(-(s**-0.3) * (t**0.2 - s**0.2) / 0.2, s)),
    "amari_alpha": (
        partial(amari_alpha, alpha=0.3),
        lambda s, t: (s * (t**0.3 * s**0.7).sum(-1, keepdim=True) - t**0.3 * s**0.7) / 0.3,
    ),
    "renyi": (partial(renyi, alpha=3.0), lambda s, t: s - t**3 * s**-2 / (t**3 * s**-2).sum(-1, keepdim=True)),
    "renyi near 1": (
        partial(renyi, alpha=1.01),
        lambda s, t: s - t**1.01 * s**-0.01 / (t**1.01 * s**-0.01).sum(-1, keepdim=True),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_closed_forms_of_the_documentation(name):
    student, teacher = rows(2)
    function, expected = GRADIENTS[name]
    s, t = (torch.from_numpy(scipy.special.softmax(each.numpy(), axis=-1)) for each in (student, teacher))
    torch.testing.assert_close(gradient(function, student, teacher), expected(s, t), rtol=1e-9, atol=1e-12)


def test_total_variation_has_gradient_zero_at_ties():
    """Two tokens tie: g = (1, −1, 0, 0) and ½ s (g − Σ s g). At equality nothing is left of it."""
    student, teacher = (torch.tensor([[first, -first, 0.0, 0.0]], dtype=torch.float64) for first in (1.0, -1.0))
    expected = at_logits(0.5 * torch.tensor([[1.0, -1.0, 0.0, 0.0]]), student.softmax(-1))
    torch.testing.assert_close(gradient(total_variation, student, teacher), expected)
    assert not gradient(total_variation, student, student).any()


SMALL = {  # value ÷ forward KL, near equality
    "reverse_kl": 1.0,
    "jeffreys": 1.0,
    "jsd": 0.25,
    "jsd of a small share": 1.0,
    "skew_kl": 0.9**2,
    "skew_reverse_kl": 0.9**2,
    "adaptive_kl": 1.0,
    "confidence_kl": 1.0,
    "amari_alpha": 1.0,
    "renyi": 0.5,
    "renyi near 1": 0.99,
}


@pytest.mark.parametrize("name", SMALL)
def test_of_second_order_all_are_forward_kl(name):
    """So that T² keeps the gradient's size for each, and learning rates carry over by these factors."""
    teacher, direction = rows(3, spread=1.0)
    student = teacher + 1e-5 * direction
    np.testing.assert_allclose(DIVERGENCES[name](student, teacher) / forward_kl(student, teacher), SMALL[name], rtol=1e-3)


def test_with_the_temperature_kl_becomes_a_squared_distance_of_logits_and_total_variation_an_absolute_one():
    student, teacher = (each - each.mean(-1, keepdim=True) for each in rows(4))
    difference, temperature = student - teacher, 1e5
    hot = [each / temperature for each in (student, teacher)]
    torch.testing.assert_close(temperature**2 * forward_kl(*hot), difference.square().mean(-1) / 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(temperature * total_variation(*hot), difference.abs().mean(-1) / 2, rtol=1e-3, atol=0)


# --- tokens without mass ---


@everyone
def test_tokens_masked_in_both_models_take_no_part(name):
    student, teacher = rows(6)
    masked = [torch.cat([each, torch.full((5, 2), -math.inf, dtype=torch.float64)], 1) for each in (student, teacher)]
    torch.testing.assert_close(DIVERGENCES[name](*masked), DIVERGENCES[name](student, teacher))
    expected = torch.nn.functional.pad(gradient(DIVERGENCES[name], student, teacher), (0, 2))
    torch.testing.assert_close(gradient(DIVERGENCES[name], *masked), expected)


@everyone
def test_a_one_hot_teacher_leaves_a_finite_gradient_where_the_value_is_finite(name):
    student, _ = rows(9)
    teacher = torch.where(torch.nn.functional.one_hot(LABELS, 11).bool(), 0.0, -math.inf).double()
    value = DIVERGENCES[name](student, teacher)
    needs_the_student_in_the_support = {"reverse_kl", "jeffreys", "adaptive_kl", "confidence_kl"}
    assert value.isinf().all() if name in needs_the_student_in_the_support else value.isfinite().all()
    if value.isfinite().all():
        assert gradient(DIVERGENCES[name], student, teacher).isfinite().all()


def test_a_one_hot_teacher_makes_forward_kl_the_label_cross_entropy():
    student, _ = rows(9)
    teacher = torch.where(torch.nn.functional.one_hot(LABELS, 11).bool(), 0.0, -math.inf).double()
    expected = -scipy.special.log_softmax(student.numpy(), axis=-1)[np.arange(5), LABELS]
    np.testing.assert_allclose(forward_kl(student, teacher), expected, rtol=1e-12)


HALF, FIRST = logits(0.5, 0.5), logits(1.0, 0.0)
LIMITS = [  # objective, where the teacher alone masks the second token, where the student alone does
    (forward_kl, math.log(2), math.inf),
    (reverse_kl, math.inf, math.log(2)),
    (jeffreys, math.inf, math.inf),
    (jsd, 1.5 * math.log(2) - 0.75 * math.log(3), 1.5 * math.log(2) - 0.75 * math.log(3)),
    (partial(skew_kl, skew=0.1), -math.log(0.55), 0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(10)),
    (partial(skew_reverse_kl, skew=0.1), 0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(10), -math.log(0.55)),
    (total_variation, 0.5, 0.5),
    (AlphaBeta(alpha=1.0, beta=0.0), math.log(2), math.inf),
    (AlphaBeta(alpha=0.0, beta=1.0), math.inf, math.log(2)),
    (AlphaBeta(alpha=1.0, beta=1.0), 0.25, 0.25),
    (AlphaBeta(alpha=0.5, beta=-0.5), math.inf, math.inf),
    (AlphaBeta(alpha=0.0, beta=0.0), math.inf, math.inf),
    (partial(amari_alpha, alpha=0.5), 4 * (1 - math.sqrt(0.5)), 4 * (1 - math.sqrt(0.5))),
    (partial(amari_alpha, alpha=2.0), 0.5, math.inf),
    (partial(amari_alpha, alpha=-1.0), math.inf, 0.5),
    (partial(renyi, alpha=0.5), math.log(2), math.log(2)),
    (partial(renyi, alpha=0.99), math.log(2), math.log(2) * 99),
    (partial(renyi, alpha=1.0), math.log(2), math.inf),
    (partial(renyi, alpha=3.0), math.log(2), math.inf),
]


@pytest.mark.parametrize(("objective", "teacher_masks", "student_masks"), LIMITS)
def test_tokens_masked_in_one_model_have_their_exact_cost_and_infinity_is_not_silently_dropped(
    objective, teacher_masks, student_masks
):
    for found, expected in ((objective(HALF, FIRST), teacher_masks), (objective(FIRST, HALF), student_masks)):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- bounds and identities ---


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 10.0), share=st.floats(0.01, 0.99))
def test_bounds(seed, spread, share):
    student, teacher = rows(seed, spread=spread)
    forward, reverse, variation = (each(student, teacher) for each in (forward_kl, reverse_kl, total_variation))
    slack = 1e-12
    entropy = scipy.stats.entropy([share, 1 - share])
    assert (jsd(student, teacher, beta=share) <= entropy + slack).all()
    half = jsd(student, teacher)
    assert (variation**2 / 2 <= half + slack).all()
    assert (half <= math.log(2) * variation + slack).all()
    for skewed in (skew_kl, skew_reverse_kl):
        assert (skewed(student, teacher, skew=share) <= -math.log(share) + slack).all()
    assert (variation <= (forward / 2).sqrt() + slack).all()  # Pinsker
    assert (variation <= (1 - (-forward).exp()).sqrt() + slack).all()  # Bretagnolle, Huber
    adaptive = adaptive_kl(student, teacher, head_mass=share)
    assert (torch.minimum(forward, reverse) <= adaptive * (1 + slack)).all()
    assert (adaptive <= torch.maximum(forward, reverse) * (1 + slack)).all()
    assert (amari_alpha(student, teacher, alpha=share) <= 1 / (share * (1 - share)) + slack).all()
    orders = torch.stack([renyi(student, teacher, alpha=alpha) for alpha in (0.1, 0.5, 0.96, 1.0, 1.04, 2.0, 50.0, 1e4)])
    assert (orders.diff(dim=0) >= -1e-9 * orders[1:]).all()


def test_bounds_are_reached_by_disjoint_distributions():
    left, right = logits(0.3, 0.7, 0.0, 0.0), logits(0.0, 0.0, 0.6, 0.4)
    np.testing.assert_allclose(jsd(left, right, beta=0.2), scipy.stats.entropy([0.2, 0.8]))
    np.testing.assert_allclose(skew_kl(left, right), -math.log(0.1))
    np.testing.assert_allclose(skew_reverse_kl(left, right), -math.log(0.1))
    np.testing.assert_allclose(total_variation(left, right), 1.0)
    np.testing.assert_allclose(amari_alpha(left, right, alpha=0.2), 1 / 0.16)
    assert renyi(left, right).isinf()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 0.99))
def test_identities(seed, share):
    student, teacher = rows(seed)

    def same(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    skewed = share * skew_kl(student, teacher, skew=share) + (1 - share) * skew_reverse_kl(student, teacher, skew=1 - share)
    same(jsd(student, teacher, beta=share), skewed)
    same(jsd(student, teacher, beta=share), jsd(teacher, student, beta=1 - share))
    same(jeffreys(student, teacher, reverse_share=share), jeffreys(teacher, student, reverse_share=1 - share))
    same(reverse_kl(student, teacher), forward_kl(teacher, student))
    same(AlphaBeta(alpha=share, beta=0.6)(student, teacher), AlphaBeta(alpha=0.6, beta=share)(teacher, student))
    amari = amari_alpha(student, teacher, alpha=share)
    same(renyi(student, teacher, alpha=share), -torch.log1p(-share * (1 - share) * amari) / (1 - share))


# --- ends of the options ---


@pytest.mark.parametrize(("end", "kl"), [(1e-9, forward_kl), (1 - 1e-9, reverse_kl)])
def test_shares_and_orders_lead_from_one_kl_to_the_other(end, kl):
    student, teacher = rows(5, spread=1.0)
    expected = kl(student, teacher)
    for found in (
        jsd(student, teacher, beta=end, normalize="beta"),
        jeffreys(student, teacher, reverse_share=end),
        amari_alpha(student, teacher, alpha=1 - end),
        AlphaBeta(alpha=1 - end, beta=end)(student, teacher),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [(0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (-0.5, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_alpha_beta_is_continuous_at_its_limits_and_the_authors_code_is_not(limit):
    """ABKD's code has 1/α (1/β) in the three limits of one parameter, where Cichocki et al. have 1/α² (1/β²)."""
    student, teacher = rows(6, spread=1.0)
    at = AlphaBeta(alpha=limit[0], beta=limit[1])(student, teacher)
    near = cichocki(student, teacher, limit[0] + 3e-5, limit[1] + 2e-5)  # the formula of all other α and β
    torch.testing.assert_close(at, near, rtol=1e-3, atol=0)
    alpha, beta = limit
    if alpha or beta:
        authors = at * abs(alpha or beta)
        assert torch.allclose(authors, near, rtol=1e-3) == (max(alpha, beta) == 1.0)  # a half of it at ±0.5: 0.41 for 0.81


def test_alpha_beta_refuses_what_is_unbounded():
    with pytest.raises(ValueError, match=r"alpha \+ beta is -0.1; below 0"):
        AlphaBeta(alpha=0.4, beta=-0.5)


def test_renyi_of_large_order_is_the_worst_log_ratio_and_its_gradient_that_of_one_token():
    student, teacher = rows(7)
    ratio = torch.from_numpy(
        scipy.special.log_softmax(teacher.numpy(), axis=-1) - scipy.special.log_softmax(student.numpy(), axis=-1)
    )
    torch.testing.assert_close(renyi(student, teacher, alpha=1e4), ratio.amax(-1), rtol=1e-3, atol=0)
    worst = torch.nn.functional.one_hot(ratio.argmax(-1), 11)
    torch.testing.assert_close(
        gradient(partial(renyi, alpha=1e4), student, teacher), student.softmax(-1) - worst, rtol=1e-6, atol=1e-9
    )


def test_adaptive_kl_keeps_the_token_that_reaches_the_mass():
    """Teacher (.4, .3, .3), half of the mass: the head is {.4, .3}. The authors' code takes {.4}, so that the shares are others."""
    s, t = [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]
    forward, reverse = scipy.stats.entropy(t, s), scipy.stats.entropy(s, t)
    ours, authors = 0.8 * forward + 0.2 * reverse, 0.3 * forward + 0.7 * reverse  # the gaps are .3, .5, .2
    found = adaptive_kl(logits(*s), logits(*t)).item()
    assert (found, authors) == pytest.approx((ours, 0.5523), abs=1e-4)
    assert found == pytest.approx(ours, rel=1e-12)


def test_adaptive_kl_has_no_gradient_through_its_weights():
    student, teacher = rows(8)
    s, t = (torch.softmax(each, -1) for each in (student, teacher))
    head = torch.zeros_like(t, dtype=torch.bool)
    for row, ranking in enumerate(t.argsort(-1, descending=True)):
        needed = int((t[row, ranking].cumsum(0) < 0.5).sum()) + 1
        head[row, ranking[:needed]] = True
    weight = ((t - s).abs() * head).sum(-1, keepdim=True) / (t - s).abs().sum(-1, keepdim=True)
    expected = weight * (s - t) + (1 - weight) * at_logits((s / t).log(), s)
    torch.testing.assert_close(gradient(adaptive_kl, student, teacher), expected, rtol=1e-9, atol=1e-12)


# --- precision ---


def exact_jsd(student: Tensor, teacher: Tensor, beta: float) -> list[float]:
    """By the definition, with 60 digits, from logits that float32 holds."""
    values = []
    with mpmath.workdps(60):
        share = mpmath.mpf(beta)
        for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
            s, t = ([mpmath.exp(logit) for logit in row] for row in (mine, theirs))
            s, t = ([each / mpmath.fsum(p) for each in p] for p in (s, t))
            m = [share * b + (1 - share) * a for a, b in zip(s, t, strict=True)]
            parts = [share * b * mpmath.log(b / c) + (1 - share) * a * mpmath.log(a / c) for a, b, c in zip(s, t, m, strict=True)]
            values.append(float(mpmath.fsum(parts) / (share * (1 - share))))
    return values


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("apart", [0.1, 3.0])
def test_normalised_jsd_is_accurate_in_float32_for_every_share(beta, apart):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 200, generator=generator) * 3
    student = teacher + torch.randn(2, 200, generator=generator) * apart
    found = jsd(student, teacher, beta=beta, normalize="beta")
    np.testing.assert_allclose(found, exact_jsd(student, teacher, beta), rtol=1e-5)


def test_the_plain_form_of_jsd_is_not_accurate_in_float32():
    """TRL's at β = 1e-6, divided by β (1−β): it is wrong by half and more, ours by less than 1e-5."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5000, generator=generator) * 3
    student = teacher + torch.randn(2, 5000, generator=generator) * 0.1
    exact = jsd(student.double(), teacher.double(), beta=1e-6, normalize="beta")
    errors = [
        ((value - exact).abs() / exact).max().item()
        for value in (jsd(student, teacher, beta=1e-6, normalize="beta"), trl(student, teacher, beta=1e-6) / 1e-6)
    ]
    assert errors[0] < 1e-5
    assert errors[1] > 0.5


def test_trl_jumps_where_its_beta_reaches_zero():
    """A thousandfold between β = 0.001 and 0; ours moves by the little that the two divergences differ there."""
    student, teacher = rows(1, spread=1.0)
    jump = trl(student, teacher, beta=0) / trl(student, teacher, beta=1e-3)
    assert (jump > 900).all()
    torch.testing.assert_close(
        jsd(student, teacher, beta=1e-3, normalize="beta"), forward_kl(student, teacher), rtol=1e-2, atol=0
    )


@everyone
def test_float32_and_bfloat16_logits_are_near_float64(name):
    student, teacher = rows(7, v=1000)
    exact = DIVERGENCES[name](student, teacher)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        rounded = [each.to(dtype).float() for each in (student, teacher)]
        assert (DIVERGENCES[name](*rounded) - exact).abs().max() < tolerance * exact.max()


# --- confidence_kl: a coefficient that is measured ---


def sure_of(probability: float) -> Tensor:
    return logits(probability, 1 - probability)


@pytest.mark.parametrize("gamma", ["label", "max"])
def test_gamma_is_the_mean_over_all_rows_however_they_are_divided(gamma):
    """BitDistiller's code adds up the means of K + 1 batches and divides by K: here, with K = 1, that is no probability at all."""
    objective = ConfidenceKL(gamma=gamma).double()
    batches = [[0.9], [0.6, 0.5, 0.6]]
    for probabilities in batches:
        teacher = torch.cat([sure_of(each) for each in probabilities])
        objective.observe(teacher.flip(0), teacher, labels=torch.zeros(len(probabilities), dtype=torch.long))
    objective.conclude()
    authors = sum(sum(each) / len(each) for each in batches) / (len(batches) - 1)
    assert (objective.gamma.item(), authors) == pytest.approx((0.65, 1.4667), abs=1e-4)
    assert objective.gamma.item() == pytest.approx(0.65, abs=1e-12)


def test_gamma_reads_the_label_or_the_likeliest_token():
    measured = {}
    for gamma in ("label", "max"):
        objective = ConfidenceKL(gamma=gamma).double()
        objective.observe(sure_of(0.5), sure_of(0.9), labels=torch.tensor([1]))
        objective.conclude()
        measured[gamma] = objective.gamma.item()
    assert measured == pytest.approx({"label": 0.1, "max": 0.9}, abs=1e-12)


def test_the_surer_the_teacher_the_more_the_reverse_kl_counts():
    student, teacher = rows(2)
    for label_logit, kl in ((60.0, reverse_kl), (-60.0, forward_kl)):
        objective = ConfidenceKL().double()
        seen = torch.tensor([[label_logit, 0.0]], dtype=torch.float64)
        objective.observe(seen, seen, labels=torch.tensor([0]))
        objective.conclude()
        torch.testing.assert_close(objective(student, teacher, labels=LABELS), kl(student, teacher), rtol=1e-9, atol=1e-12)


def test_gamma_travels_with_the_checkpoint_and_a_missing_measurement_does_not_go_unnoticed():
    student, teacher = rows(2)
    measured, fresh = ConfidenceKL().double(), ConfidenceKL().double()
    assert fresh(student, teacher, labels=LABELS).isnan().all()
    with pytest.raises(ValueError, match="no supervised token"):
        fresh.conclude()
    measured.observe(student, teacher, labels=LABELS)
    measured.conclude()
    fresh.load_state_dict(measured.state_dict())
    assert list(measured.state_dict()) == ["gamma"]
    torch.testing.assert_close(fresh(student, teacher, labels=LABELS), measured(student, teacher, labels=LABELS))


def test_a_gamma_that_is_given_is_not_measured():
    student, teacher = rows(2)
    objective = ConfidenceKL(gamma=0.3).double()
    assert objective.calibration_rows == 0
    objective.conclude()
    torch.testing.assert_close(
        objective(student, teacher, labels=LABELS), jeffreys(student, teacher, reverse_share=0.3), rtol=1e-7, atol=0
    )


# --- the contract, with other options than the defaults ---


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (jsd, {"beta": 1e-6, "normalize": "beta"}),
        (skew_kl, {"skew": 0.0}),
        (ConfidenceKL, {"gamma": 0.3}),
        (AlphaBeta, {"alpha": 1.0, "beta": 0.0}),
        (AlphaBeta, {"alpha": 0.0, "beta": 0.0}),
        (amari_alpha, {"alpha": 0.0}),
        (renyi, {"alpha": 1.0}),
        (renyi, {"alpha": 50.0}),
    ],
)
def test_contract(factory, options):
    assert "unsupervised" in check_objective(factory, **options)
