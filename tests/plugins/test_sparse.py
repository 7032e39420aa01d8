"""A part of the vocabulary, and targets drawn from the teacher: bounds, gradients in closed form, statistics, peers."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from distily_sparse import sampled_targets, top_k, top_p
from hypothesis import given, settings
from hypothesis import strategies as st

V = 9


def rows(seed: int, n: int = 4, v: int = V, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, v, generator=generator, dtype=torch.float64) * spread)


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), student)[0]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(scipy.stats.entropy(teacher.softmax(-1).numpy(), student.softmax(-1).numpy(), axis=-1))


class TestTails:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 20.0))
    def test_a_bucket_gives_a_lower_bound_that_rises_with_k_to_the_whole_kl(self, seed, spread):
        student, teacher = rows(seed, spread=spread)
        values = torch.stack([top_k(student, teacher, k=k) for k in range(1, V + 1)])
        assert (values.diff(dim=0) > -1e-12).all()
        torch.testing.assert_close(values[-1], forward_kl(student, teacher), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(top_k(student, teacher, k=V + 100), values[-1])

    @pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
    @pytest.mark.parametrize("support", ["teacher", "student", "union"])
    def test_the_whole_vocabulary_is_the_whole_kl_whatever_the_tail(self, tail, support):
        student, teacher = rows(1)
        torch.testing.assert_close(top_k(student, teacher, k=V, tail=tail, support=support), forward_kl(student, teacher))

    def test_gradients_are_the_closed_forms(self):
        """``bucket``: s − t in S, s (1 − t_out/s_out) outside. ``zero``: T_S s − [in S] t. ``renormalize``: ŝ − t̂ in S."""
        student, teacher = rows(2)
        student.requires_grad_()
        s, t = student.softmax(-1).detach(), teacher.softmax(-1)
        inside = t >= t.topk(3).values[:, -1:]
        s_in, t_in = ((each * inside).sum(-1, keepdim=True) for each in (s, t))
        expected = {
            "bucket": torch.where(inside, s - t, s * (1 - (1 - t_in) / (1 - s_in))),
            "zero": t_in * s - inside * t,
            "renormalize": inside * (s / s_in - t / t_in),
        }
        for tail, form in expected.items():
            torch.testing.assert_close(gradient(top_k(student, teacher, k=3, tail=tail), student), form)

    def test_zero_is_least_for_a_student_that_is_too_sure(self):
        """Its minimum, T ln T < 0, is at t / T on the support: below the value at the teacher itself, which is 0."""
        teacher = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]], dtype=torch.float64).log()
        too_sure = torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0, 0.0]], dtype=torch.float64).log()
        assert top_k(teacher, teacher, k=2, tail="zero").item() == pytest.approx(0.0, abs=1e-15)
        teacher[0, 2] -= 1e-9  # no tie
        assert top_k(too_sure, teacher, k=2, tail="zero").item() == pytest.approx(0.6 * math.log(0.6))
        assert top_k(too_sure, teacher, k=2, tail="bucket").item() == math.inf

    def test_the_zero_of_distillkit_is_another(self):
        """Its ``ZERO`` renormalises the teacher on the support and keeps the student's full softmax: never below ln(1/S_S) − …;
        ours = T (theirs + ln T).
        """
        student, teacher = torch.zeros(1, 5, dtype=torch.float64), torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).double().log()
        kept = teacher.exp()[0, :2]
        mass = kept.sum()
        stored = kept / mass
        theirs = (stored * (stored.log() - math.log(1 / 5))).sum().item()
        ours = top_k(student, teacher, k=2, tail="zero").item()
        assert (theirs, ours) == pytest.approx((1.0112, 0.4581), abs=1e-4)
        assert ours == pytest.approx(mass.item() * (theirs + math.log(mass)))

    def test_a_bucket_too_small_for_one_minus_a_sum_is_still_exact(self):
        """The teacher's tail is 2e-20: peers clamp it to 1e-7 (TRL) or 1e-6 (DistillKit), which moves reverse KL by a half."""
        teacher = torch.tensor([[0.0, -46.0, -46.0]], dtype=torch.float64)
        student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
        found = top_k(student, teacher, k=1, divergence="reverse_kl").item()
        exact = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - (math.log(2) - 46))
        clamped = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(1e-7))
        assert found == pytest.approx(exact, rel=1e-12)
        assert (found, clamped) == pytest.approx((21.9603, 7.3659), abs=1e-3)

    def test_reverse_kl_looks_at_the_students_tokens(self):
        """Half of the student's mass is on a token that the teacher hardly gives any; on the teacher's support it is a bucket."""
        teacher = torch.tensor([[0.9, 0.04, 0.03, 0.02, 0.01]], dtype=torch.float64).log()
        student = torch.tensor([[0.5, 1e-6, 1e-6, 1e-6, 0.5 - 3e-6]], dtype=torch.float64).log()
        whole = scipy.stats.entropy(student.exp()[0], teacher.exp()[0])
        values = {
            side: top_k(student, teacher, k=2, support=side, divergence="reverse_kl").item() for side in ("teacher", "student")
        }
        assert values["student"] == pytest.approx(whole, rel=1e-4)
        assert values["teacher"] < 0.7 * whole


class TestTopP:
    def test_it_takes_as_many_tokens_as_the_mass_asks_for(self):
        teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.96, 0.02, 0.01, 0.01]], dtype=torch.float64).log()
        student = torch.zeros(2, 4, dtype=torch.float64)
        for p, counts in ((0.4, (1, 1)), (0.6, (2, 1)), (0.95, (3, 1)), (0.99, (4, 3))):
            expected = [top_k(student[row : row + 1], teacher[row : row + 1], k=k) for row, k in enumerate(counts)]
            torch.testing.assert_close(top_p(student, teacher, p=p), torch.cat(expected))

    def test_a_mass_that_is_reached_exactly_is_enough(self):
        teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
        student = torch.zeros(1, 4, dtype=torch.float64)
        for p, k in ((0.5, 1), (0.75, 2)):
            assert torch.equal(top_p(student, teacher, p=p), top_k(student, teacher, k=k))

    def test_k_is_a_cap_and_p_1_is_top_k(self):
        student, teacher = rows(3, spread=0.1)
        torch.testing.assert_close(top_p(student, teacher, p=0.95, k=2), top_k(student, teacher, k=2))
        torch.testing.assert_close(top_p(student, teacher, p=1.0, k=5), top_k(student, teacher, k=5))


class TestSampled:
    """The target w of a row is read off the gradient: s Σ w − w."""

    TEACHER = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)

    def targets(self, n: int, **options: object) -> torch.Tensor:
        student = torch.zeros(n, 5, dtype=torch.float64, requires_grad=True)
        teacher = self.TEACHER.log().expand(n, -1)
        value = sampled_targets(student, teacher, row_seeds=torch.arange(n) * 7919, **options)
        total = value.detach()[:, None] / math.log(5)  # the student is uniform: −Σ w log s = Σ w · ln 5
        return 0.2 * total - gradient(value, student)

    @pytest.mark.parametrize("options", [{}, {"rho": 0.6, "normalize": False}])
    def test_on_average_the_target_is_the_teacher(self, options):
        n, samples = 20_000, 8
        targets = self.targets(n, samples=samples, **options)
        q = self.TEACHER ** options.get("rho", 1.0)
        q = q / q.sum()
        spread = (self.TEACHER / q * (q * (1 - q)).sqrt()) / math.sqrt(samples)
        assert ((targets.mean(0) - self.TEACHER).abs() < 5 * spread / math.sqrt(n)).all()
        torch.testing.assert_close(targets.std(0), spread, rtol=0.05, atol=0)

    def test_weights_divided_by_their_sum_have_less_variance_and_a_bias(self):
        plain, divided = (self.targets(20_000, samples=8, rho=0.6, normalize=normalize) for normalize in (False, True))
        torch.testing.assert_close(divided.sum(-1), torch.ones(20_000, dtype=torch.float64))
        assert (divided.std(0)[0], divided.std(0)[1]) < (plain.std(0)[0], plain.std(0)[1])
        assert (divided.mean(0) - self.TEACHER)[0].item() == pytest.approx(-0.02, abs=0.01)

    def test_many_samples_are_the_soft_cross_entropy(self):
        student, teacher = rows(4, 2)
        expected = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        found = sampled_targets(student, teacher, row_seeds=torch.tensor([1, 2]), samples=200_000)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)

    def test_a_row_draws_by_its_seed_alone(self):
        student, teacher = rows(5, 6)
        seeds = torch.tensor([3, 1, 4, 1, 5, 9])
        whole = sampled_targets(student, teacher, row_seeds=seeds)
        parts = [sampled_targets(student[r : r + 1], teacher[r : r + 1], row_seeds=seeds[r : r + 1]) for r in range(6)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, sampled_targets(student, teacher, row_seeds=seeds + 1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tokens_that_the_teacher_rules_out_are_never_drawn(self, dtype):
        """The first, the last and one between are masked; the student has no mass there either, so one draw would be infinite."""
        teacher = torch.zeros(2000, 7, dtype=dtype)
        teacher[:, [0, 3, 6]] = -math.inf
        assert sampled_targets(teacher, teacher, row_seeds=torch.arange(2000), samples=20).isfinite().all()
