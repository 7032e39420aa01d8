"""Combiners: what they guarantee for all gradients and values, their limits and events, and peers that are wrong.

That each computes its formula is in ``tests/oracles/combiners.py``.
"""

from __future__ import annotations

import math
from typing import Any

import distily_gradient_combiners as guards
import distily_multitask_combiners as multitask
import distily_value_combiners as by_value
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distily.combiners import Combiner, cosine, cosines, divide, norms
from distily.conformance.combiners import combiners
from distily.conformance.objectives import Subject
from distily.plugins import Offered

OFFERED = {name: each for module in (guards, multitask, by_value) for name, each in module.distily_combiners().items()}
OF_GRADIENTS = sorted(name for name, each in OFFERED.items() if each.measures == "gradients")
PROTECTING = ("project_auxiliary", "gradient_weighted", "cosine_gate")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(angle_cosine: float, length: float = 1.0) -> Tensor:
    """A primary gradient of length 2, and an auxiliary one ``length`` times as long at this angle."""
    sine = math.sqrt(max(0.0, 1 - angle_cosine**2))
    return torch.tensor([[2.0, 0.0], [2 * length * angle_cosine, 2 * length * sine]], dtype=torch.float64)


def combine(combiner: Combiner, rows: Tensor) -> Tensor:
    return combiner.coefficients(rows @ rows.T) @ rows


@st.composite
def gradients(draw: Any, least: int = 2, most: int = 4) -> Tensor:
    """K gradients of lengths over four orders of magnitude, in conflict more often than not."""
    terms, seed = draw(st.integers(least, most)), draw(st.integers(0, 10**6))
    rows = torch.randn(terms, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[1:] -= draw(st.floats(0, 3)) * rows[:1]
    return rows * 10.0 ** torch.tensor([draw(st.floats(-2, 2)) for _ in range(terms)])[:, None]


quickly = settings(max_examples=30, deadline=None)


# --- the kit ---


@pytest.mark.parametrize("name", OFFERED)
def test_it_keeps_the_contract(name: str) -> None:
    passed = list(combiners(Subject(Offered("combiners", name, OFFERED[name], "test"), {}, None)))
    assert passed[-1] == "no host synchronisation"


class Plain(Combiner):
    def __init__(self, terms: int) -> None:
        super().__init__(terms)
        self.register_buffer("seen", torch.zeros(terms, terms, dtype=torch.float64))

    def coefficients(self, measured: Tensor) -> Tensor:
        return measured.new_ones(measured.shape[:-1])


class Counting(Plain):
    def coefficients(self, measured: Tensor) -> Tensor:
        self.seen += 1
        return super().coefficients(measured)


class Keeping(Plain):
    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        self.seen = measured


class Forgetting(Plain):
    moved = 0.0

    def coefficients(self, measured: Tensor) -> Tensor:
        return super().coefficients(measured) * (1 + self.moved)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        self.moved += 1


class Lengths(Plain):
    def coefficients(self, measured: Tensor) -> Tensor:
        return divide(torch.ones_like(norms(measured)), norms(measured))


class Unsafe(Plain):
    def coefficients(self, measured: Tensor) -> Tensor:
        return norms(measured)[..., :1] / norms(measured)


class Mixing(Plain):
    def coefficients(self, measured: Tensor) -> Tensor:
        return super().coefficients(measured) * cosine(measured).mean()


class Waiting(Plain):
    def coefficients(self, measured: Tensor) -> Tensor:
        return super().coefficients(measured) * float(bool((measured >= -1e300).all()))


class Clashing(Plain):
    def __init__(self, terms: int, *, decay: float = 0.9) -> None:
        super().__init__(terms)


class Ignorant(Plain):
    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        measured.mul_(0.5)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (Clashing, "construction"),
        (Unsafe, "finite"),
        (Mixing, "matrices"),
        (Lengths, "scale"),
        (Counting, "purity"),
        (Ignorant, "advance"),
        (Keeping, "advance"),
        (Forgetting, "checkpoint"),
        (Waiting, "no host synchronisation"),
    ],
)
def test_the_kit_sees_what_is_wrong(wrong: type[Combiner], check: str) -> None:
    assert stops_at(wrong) == check


def stops_at(wrong: type[Combiner]) -> str:
    """The check that fails."""
    reached = []
    try:
        for label in combiners(Subject(Offered("combiners", "wrong", wrong, "test"), {}, None)):
            reached.append(label)
    except (AssertionError, RuntimeError, NotImplementedError):
        return reached[-1]
    return "nowhere"


def test_the_kit_lets_the_simplest_combiner_pass() -> None:
    assert stops_at(Plain) == "nowhere"


# --- cosines ---


def test_cosines_of_short_gradients_survive_float32() -> None:
    """The product of two squared lengths of 1e-12 would underflow."""
    rows = pair(0.6).float() * 1e-12
    assert cosine(rows @ rows.T) == pytest.approx(0.6, rel=1e-5)
    assert cosines(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# --- one scale for all ---


@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("name", [name for name in OF_GRADIENTS if name not in ("norm_balance", "gradient_weighted")])
def test_equal_gradients_give_their_sum(name: str, terms: int) -> None:
    rows = torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64).repeat(terms, 1)
    assert combine(OFFERED[name](terms), rows) == pytest.approx(rows.sum(0), rel=1e-12)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_a_term_without_gradient_leaves_the_primary_one(name: str) -> None:
    """But ``mgda`` stops, as by its definition; nothing helps CAGrad's worst term, so it keeps to the mean, over 1 + radius."""
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    factor = {"mgda": 0.0, "cagrad": 1 / 1.5}.get(name, 1.0)
    assert combine(OFFERED[name](2), rows) == pytest.approx(factor * rows[0], rel=1e-12, abs=1e-12)


def test_more_terms_than_a_solver_takes_are_refused() -> None:
    for name in ("mgda", "cagrad", "upgrad"):
        with pytest.raises(ValueError, match="at most 8 terms, not 9"):
            OFFERED[name](9)


# --- the primary gradient is protected ---


@pytest.mark.parametrize("length", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("name", PROTECTING)
def test_an_exactly_opposing_term_leaves_the_primary_gradient(name: str, length: float) -> None:
    rows = pair(-1.0, length)
    assert combine(OFFERED[name](2), rows) == pytest.approx(rows[0], abs=1e-12)
    joint = combine(guards.Sum(2), rows) @ rows[0]
    assert joint < rows[0] @ rows[0], "the case does not oppose"


@quickly
@given(gradients())
def test_the_first_order_change_of_the_primary_loss(rows: Tensor) -> None:
    """⟨u, g_L⟩ / ‖g_L‖² is bounded below, whatever the others do."""
    square, terms = float(rows[0] @ rows[0]), len(rows)

    def share(name: str, **options: Any) -> float:
        return float(combine(OFFERED[name](terms, **options), rows) @ rows[0]) / square

    lengths = rows.norm(dim=1)
    rounding = 1e-12 * float(lengths.max() / lengths[0])
    assert share("cosine_gate") >= 1 - rounding
    assert share("cosine_gate", gate="hard") >= 1 - rounding
    assert share("project_auxiliary") >= 1 - rounding
    assert share("norm_balance", kappa=0.4) >= 0.6 - rounding
    assert share("gradient_weighted", kappa=0.4, threshold=0.1) >= 1 - 0.04 - rounding


@quickly
@given(st.floats(-1, 1), st.floats(0.01, 100))
def test_closed_forms_of_two_terms(angle: float, length: float) -> None:
    rows = pair(angle, length)
    primary, other = rows
    square = float(primary @ primary)

    def change(name: str, **options: Any) -> float:
        return float(combine(OFFERED[name](2, **options), rows) @ primary) / square

    close = {"rel": 1e-9, "abs": 1e-9}
    assert change("sum") == pytest.approx(1 + angle * length, **close)
    assert change("norm_balance", kappa=0.5) == pytest.approx(1 + 0.5 * angle, **close)
    assert change("project_auxiliary") == pytest.approx(1 + max(0.0, angle * length), **close)
    surgery = combine(multitask.PCGrad(2), rows)
    if angle < 0:
        sine = 1 - angle**2
        assert surgery @ primary == pytest.approx(square * sine, **close)
        assert surgery @ other == pytest.approx(square * length**2 * sine, rel=1e-9, abs=1e-9 * length**2)


def test_the_sum_may_ascend_the_primary_loss_and_a_cap_alone_prevents_it() -> None:
    rows = pair(-0.9, 5.0)
    assert combine(guards.Sum(2), rows) @ rows[0] < 0
    capped = combine(guards.NormBalance(2, kappa=0.9, cap=True), rows)
    assert capped @ rows[0] > 0
    assert torch.equal(guards.NormBalance(2, kappa=0.0).coefficients(rows @ rows.T), torch.tensor([1.0, 0.0]).double())


@quickly
@given(gradients(), st.floats(1e-3, 1e3))
def test_what_a_rescaled_auxiliary_loss_changes(rows: Tensor, factor: float) -> None:
    """Nothing, where lengths are divided out."""
    scaled = rows.clone()
    scaled[1] *= factor
    for name in ("norm_balance", "nash"):
        expected = combine(OFFERED[name](len(rows)), rows)
        assert torch.allclose(combine(OFFERED[name](len(rows)), scaled), expected, rtol=1e-7, atol=1e-7 * float(rows[0].norm()))


# --- gradient_weighted: events ---


def steps(combiner: Combiner, angle: float, count: int, start: float = 0.0, each: float = 0.001) -> float:
    """Moves a combiner by steps at this cosine; returns the progress after them."""
    rows = pair(angle, 1.0)
    for step in range(count):
        combiner.advance(rows @ rows.T, rows.new_ones(len(rows)), start + step * each)
    return start + count * each


def is_off(combiner: Combiner) -> bool:
    return bool(combiner.report()["off_1"])


def test_weak_conflict_switches_off_after_its_share_of_training() -> None:
    """The mean of c = −0.2 passes −0.1 at step 7, since 1 − 0.9⁷ > ½; off is 50 steps of 0.1 % later."""
    combiner = guards.GradientWeighted(2)
    progress = steps(combiner, -0.2, 56)
    assert not is_off(combiner)
    steps(combiner, -0.2, 1, progress)
    assert is_off(combiner)
    assert torch.equal(combiner.coefficients(torch.eye(2)), torch.tensor([1.0, 0.0]))


def test_conflict_that_pauses_starts_anew() -> None:
    combiner = guards.GradientWeighted(2)
    progress = steps(combiner, -0.2, 40)
    progress = steps(combiner, 0.5, 10, progress)
    steps(combiner, -0.2, 40, progress)
    assert not is_off(combiner)


def test_strong_conflict_switches_off_without_waiting() -> None:
    """More than half of the auxiliary gradient would be removed: with c = −0.8 the mean passes −0.5 at step 10."""
    combiner = guards.GradientWeighted(2)
    progress = steps(combiner, -0.8, 9)
    assert not is_off(combiner)
    steps(combiner, -0.8, 1, progress)
    assert is_off(combiner)


def test_one_bad_batch_decides_nothing() -> None:
    combiner = guards.GradientWeighted(2)
    steps(combiner, -1.0, 1, each=0.2)
    assert not is_off(combiner)
    steps(combiner, 0.1, 100, 0.2)
    assert not is_off(combiner)


def test_off_is_for_good_also_after_a_restart() -> None:
    combiner = guards.GradientWeighted(2)
    progress = steps(combiner, -0.8, 20)
    restarted = guards.GradientWeighted(2)
    restarted.load_state_dict(combiner.state_dict())
    steps(restarted, 1.0, 50, progress)
    assert is_off(restarted)
    assert restarted.report()["smoothed_cosine_1"] > 0.9


def test_each_auxiliary_term_has_its_own_switch() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.1, 0.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    combiner = guards.GradientWeighted(3)
    for step in range(20):
        combiner.advance(rows @ rows.T, rows.new_ones(len(rows)), step / 1000)
    report = combiner.report()
    assert [bool(report["off_1"]), bool(report["off_2"])] == [True, False]
    coefficients = combiner.coefficients(rows @ rows.T)
    assert coefficients[:2].tolist() == [1.0, 0.0]
    assert coefficients[2] == pytest.approx(0.15 / rows[2].norm())


# --- multi-task methods ---


@quickly
@given(gradients())
def test_no_term_is_opposed(rows: Tensor) -> None:
    """MGDA, UPGrad and the bargain descend every loss; CAGrad stays in its ball."""
    terms, size = len(rows), rows.norm(dim=1)
    inner = rows @ combine(multitask.UPGrad(terms), rows)
    assert (inner >= -1e-9 * size * size.max()).all()
    shortest = combine(multitask.MGDA(terms), rows)
    assert (rows @ shortest >= shortest @ shortest / terms - 1e-9 * size.max() ** 2).all()
    coefficients = multitask.Nash(terms).coefficients(rows @ rows.T)
    if (coefficients > 0).all():
        agreed = coefficients * (rows @ rows.T @ coefficients)
        assert agreed == pytest.approx(torch.full_like(agreed, terms * float(rows[0] @ rows[0])), rel=1e-6)
    else:
        assert coefficients.tolist() == [1.0] + [0.0] * (terms - 1)
    mean = rows.mean(0)
    moved = combine(multitask.CAGrad(terms, radius=0.4), rows) * 1.4 / terms - mean
    assert moved.norm() <= 0.4 * mean.norm() * (1 + 1e-7) + 1e-9 * size.max()


@quickly
@given(gradients(most=2))
def test_two_terms_of_upgrad_are_pcgrad(rows: Tensor) -> None:
    first, second = (combine(each(2), rows) for each in (multitask.UPGrad, multitask.PCGrad))
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-9 * float(rows.norm()))


def test_three_terms_of_pcgrad_may_oppose_one_where_upgrad_does_not() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.9, 0.3], [-0.2, -1.0]], dtype=torch.float64)
    assert (rows @ combine(multitask.UPGrad(3), rows)).min() >= -1e-12
    assert (rows @ combine(multitask.PCGrad(3), rows)).min() < -0.05


def test_cagrad_without_radius_is_the_sum() -> None:
    rows = pair(-0.7, 3.0)
    assert multitask.CAGrad(2, radius=0.0).coefficients(rows @ rows.T).tolist() == [1.0, 1.0]


def test_the_bargain_ends_where_gradients_cancel() -> None:
    """At 1 + c = 0.001: beside it the bisector, ever longer coefficients; below it the primary gradient alone."""
    above, below = (multitask.Nash(2).coefficients(rows @ rows.T) for rows in (pair(-0.9989, 4.0), pair(-0.9991, 4.0)))
    assert above == pytest.approx(torch.tensor([1.0, 0.25]) * math.sqrt(2 / 0.0011), rel=1e-6)
    assert below.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("dtype", "angle"), [(torch.float32, 1e-3), (torch.float64, 4e-8)])
def test_almost_parallel_gradients_stop_aligned_mtl(dtype: torch.dtype, angle: float) -> None:
    """As published: the weakest component of two gradients that agree is their difference, down to where rounding hides it."""

    def coefficients(angle: float) -> list[float]:
        rows = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        return multitask.AlignedMTL(2).coefficients((rows @ rows.T).to(dtype)).tolist()

    assert coefficients(0.7 * angle) == pytest.approx([1.0, 1.0], rel=1e-5)
    assert coefficients(1.5 * angle) == pytest.approx([0.0, 0.0], abs=1e-3)


def test_gradvac_starts_as_pcgrad_and_moves_to_the_usual_angle() -> None:
    rows, other = pair(-0.3, 2.0), pair(0.8)
    combiner = multitask.GradVac(2, ema_decay=0.9)
    assert torch.allclose(combine(combiner, rows), combine(multitask.PCGrad(2), rows))
    for _ in range(200):
        combiner.advance(other @ other.T, other.new_ones(len(other)), 0.0)
    assert float(combiner.report()["goal_1"]) == pytest.approx(0.8)
    kept = pair(0.9)
    assert combiner.coefficients(kept @ kept.T).tolist() == [1.0, 1.0]


def test_gradnorm_makes_gradients_equally_long() -> None:
    combiner = guards.GradNorm(3, alpha=0.0, every=1)
    rows = torch.diag(torch.tensor([1000.0, 1.0, 0.1], dtype=torch.float64))
    for step in range(1000):
        combiner.advance(rows @ rows.T, rows.new_ones(len(rows)), step / 1000)
    weights = combiner.coefficients(rows @ rows.T)
    assert weights.sum() == pytest.approx(3.0)
    sizes = weights * rows.diagonal()
    assert sizes / sizes.mean() == pytest.approx(torch.ones(3).double(), rel=0.06)  # within two steps of 2.5 %


def test_gradnorm_tilts_towards_the_slower_term() -> None:
    """Gradients of one length; the second loss falls by 3 % a step, the first stays."""
    combiner = guards.GradNorm(2, alpha=1.0, every=1)
    for step in range(300):
        combiner.advance(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 0.97**step], dtype=torch.float64), step / 300)
    assert combiner.coefficients(torch.eye(2, dtype=torch.float64))[0] > 1.5


# --- values ---


def after(combiner: Combiner, *values: list[float], progress: float = 0.0) -> Tensor:
    """Coefficients after steps with these values."""
    for each in values:
        measured = torch.tensor(each, dtype=torch.float64)
        combiner.advance(measured, measured, progress)
    return combiner.coefficients(torch.tensor(values[-1], dtype=torch.float64))


@quickly
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_constant_factor_of_an_auxiliary_loss_drops_out(first: float, second: float, factor: float) -> None:
    """Its weighted value is the same, from the first step."""
    for name in ("ratio", "ema_normalized", "uncertainty"):
        plain, scaled = (after(OFFERED[name](2), [first, each])[1] for each in (second, second * factor))
        assert scaled * factor == pytest.approx(float(plain), rel=1e-9)


@pytest.mark.parametrize("name", ["ratio", "ema_normalized"])
def test_the_primary_term_is_never_scaled(name: str) -> None:
    for values in ([2.0, 1.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 1.0], [1e9, 1e-9]):
        assert after(OFFERED[name](2), values)[0] == 1.0


def test_ratio_is_capped_and_skips_what_is_solved() -> None:
    assert after(by_value.Ratio(2), [1.0, 1e-6]).tolist() == [1.0, 1000.0]
    assert after(by_value.Ratio(2), [1.0, 1e-9]).tolist() == [1.0, 0.0]
    assert after(by_value.Ratio(2), [1.0, -1.0]).tolist() == [1.0, 0.0]
    assert after(by_value.Ratio(2), [-1.0, 1.0]).tolist() == [1.0, 0.0]


def test_running_means_without_memory_are_the_ratio() -> None:
    values = ([2.0, 3.0], [1.0, 4.0])
    assert torch.equal(after(by_value.EmaNormalized(2, ema_decay=0.0), *values), after(by_value.Ratio(2), *values))
    constant = [after(by_value.EmaNormalized(2), *[[2.0, 5.0]] * count)[1] for count in (1, 2, 50)]
    assert constant == pytest.approx([0.4] * 3)


def test_running_means_freeze() -> None:
    combiner = by_value.EmaNormalized(2, ema_decay=0.0, freeze_after=0.1)
    kept = after(combiner, [1.0, 2.0], progress=0.1)
    assert torch.equal(after(combiner, [1.0, 7.0], progress=0.11), kept)
    assert kept[1] == 0.5


def test_uncertainty_is_not_led_by_one_loud_batch() -> None:
    """The plain step would be −0.01 · ½ (1 − 1e6) = 5000 in u, and the coefficient 0."""
    before = after(combiner := by_value.Uncertainty(2), [1.0, 1.0])
    loud = after(combiner, [1.0, 1e6])
    assert loud[1] == pytest.approx(float(before[1]) * math.exp(-0.005))


def test_uncertainty_is_bounded_as_losses_vanish() -> None:
    combiner = by_value.Uncertainty(2, learning_rate=1.0)
    assert after(combiner, *[[0.0, 1e-12]] * 40).tolist() == pytest.approx([math.exp(6)] * 2)


def test_dwa_waits_for_two_windows_then_favours_the_slower_term() -> None:
    combiner = by_value.Dwa(2, window=3)
    for _ in range(5):
        assert after(combiner, [2.0, 100.0]).tolist() == [1.0, 1.0]
    falling = after(combiner, [2.0, 100.0], *[[1.0, 100.0]] * 3)
    assert falling[1] > 1 > falling[0]
    assert falling.sum() == pytest.approx(2.0)
    assert falling[1] / falling[0] == pytest.approx(math.exp((1 - 0.5) / 2))


# --- peers ---


def test_torchjd_upgrad_opposes_a_short_gradient() -> None:
    """Its solver adds 1e-4 to the Gram matrix's diagonal, where a gradient of a tenth of the length has only 1e-2.

    c = −0.99: the published update has ⟨u, g_0⟩ / ‖g_0‖² = 1 − c² = 0.0199; torchjd's is −0.079, and raises that loss.
    """
    from torchjd.aggregation import UPGrad

    rows = pair(-0.99, 10.0) / 2
    peer, ours = 2 * UPGrad()(rows), combine(multitask.UPGrad(2), rows)
    assert float(peer @ rows[0]) == pytest.approx(-0.079, abs=1e-3)
    assert float(ours @ rows[0]) == pytest.approx(0.0199, rel=1e-6)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_torchjd_nash_gives_the_plain_sum_under_conflict() -> None:
    """Three terms of which the plain sum raises one: torchjd stays at its start of ones; G a = 1 / a holds for ours."""
    from torchjd.aggregation import NashMTL

    generator = torch.Generator().manual_seed(191)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    rows *= torch.exp(torch.randn(3, 1, generator=generator, dtype=torch.float64))
    peer = NashMTL(n_tasks=3, max_norm=0.0)(rows)
    assert torch.allclose(peer, rows.sum(0))
    assert float(peer @ rows[0]) == pytest.approx(-0.2554, abs=1e-4)
    coefficients = multitask.Nash(3).coefficients(rows @ rows.T)
    products = coefficients * (rows @ rows.T @ coefficients)
    assert products == pytest.approx(torch.full_like(products, 3 * float(rows[0] @ rows[0])), rel=1e-9)
