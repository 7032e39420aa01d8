"""``sinkhorn``: transport between two sets of predictions, against solvers and closed forms.

What is expected is computed here from the probabilities, never with the plugin's own functions.
"""

from __future__ import annotations

import doctest
import math
from collections.abc import Iterator

import distily_sinkhorn.hidden
import distily_sinkhorn.logits
import distily_sinkhorn.solver
import geomloss
import numpy as np
import ot
import pytest
import torch
from distily_sinkhorn import hidden_sinkhorn, sinkhorn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from distily.schema import mistakes, options

CONVERGED = {"iterations": 3000, "tolerance": 1e-13}


def logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def pair(rows: int = 7, vocabulary: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return logits(rows, vocabulary, seed), logits(rows, vocabulary, seed + 1000)


def l1(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    left, right = left.softmax(-1).numpy(), right.softmax(-1).numpy()
    return np.abs(left[:, None, :] - right[None, :, :]).sum(-1)


def value(student: torch.Tensor, teacher: torch.Tensor, **chosen: object) -> float:
    return sinkhorn(student, teacher, **chosen).mean().item()


def gradient(student: torch.Tensor, teacher: torch.Tensor, **chosen: object) -> torch.Tensor:
    student = student.clone().requires_grad_()
    sinkhorn(student, teacher, **chosen).mean().backward()
    return student.grad


@pytest.fixture
def own_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve on the CPU as on a GPU, without POT."""
    monkeypatch.setattr(distily_sinkhorn.solver, "_pot_solves", lambda *_: False)


class TestValue:
    """Closed forms and the limits of epsilon."""

    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    def test_one_row_gives_the_distance_of_the_two_distributions(self, kind: str) -> None:
        student, teacher = pair(rows=1)
        assert value(student, teacher, value=kind) == pytest.approx(l1(student, teacher)[0, 0])

    def test_two_sure_rows_that_agree_by_half(self) -> None:
        """Student tokens {0, 1}, teacher {0, 0}: half of the mass moves by 2; no blur is left."""
        student = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
        assert value(student, student[[0, 0]], value="plan_cost") == pytest.approx(1.0)
        assert value(student, student[[0, 0]], value="dual") == pytest.approx(1.0)
        # OT(s, s): the plan has 1/2 - q and q with q/(1/2 - q) = exp(-2/epsilon)
        self_cost = -0.5 * math.log((1 + math.exp(-2 / 0.5)) / 2)
        expected = 1.0 - self_cost / 2
        assert value(student, student[[0, 0]], epsilon=0.5) == pytest.approx(expected)

    def test_two_tokens_are_a_line_so_the_sorted_rows_are_matched(self) -> None:
        student, teacher = pair(rows=6, vocabulary=2)
        in_order = [side.softmax(-1)[:, 0].sort().values for side in (student, teacher)]
        expected = 2 * (in_order[0] - in_order[1]).abs().mean().item()
        got = value(student, teacher, value="plan_cost", epsilon=1e-3, **CONVERGED)
        assert got == pytest.approx(expected, abs=1e-3)

    def test_small_epsilon_is_the_best_assignment(self) -> None:
        student, teacher = pair(rows=8)
        cost = l1(student, teacher)
        expected = cost[linear_sum_assignment(cost)].mean()
        assert expected == pytest.approx(ot.emd2([], [], cost))
        for kind in ("divergence", "dual", "plan_cost"):
            got = value(student, teacher, value=kind, epsilon=2e-3, **CONVERGED)
            # every entropy is at most epsilon log n
            assert got == pytest.approx(expected, abs=2e-3 * math.log(8) * 1.01)

    def test_large_epsilon_compares_mean_costs(self) -> None:
        student, teacher = pair()
        across = l1(student, teacher).mean()
        within = (l1(student, student).mean() + l1(teacher, teacher).mean()) / 2
        variance = l1(student, student).var() + l1(teacher, teacher).var()  # what is left / epsilon
        margin = variance / 100
        got = value(student, teacher, value="dual", epsilon=100)
        assert got == pytest.approx(across, abs=margin)
        assert value(student, teacher, epsilon=100) == pytest.approx(across - within, abs=margin)

    @pytest.mark.parametrize("kind", ["dual", "plan_cost"])
    def test_rows_are_potentials_or_costs_of_the_plan(self, kind: str) -> None:
        student, teacher = pair()
        cost, uniform = l1(student, teacher), np.full(7, 1 / 7)
        plan, log = ot.sinkhorn(uniform, uniform, cost, 0.1, stopThr=1e-15, log=True)
        expected = {
            "dual": 0.1 * (np.log(log["u"]) + np.log(log["v"]) + 2 * np.log(7)),
            "plan_cost": 7 * (plan * cost).sum(1),
        }[kind]
        got = sinkhorn(student, teacher, value=kind, **CONVERGED)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)


class TestEquality:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rho", [None, 1.0])
    def test_equal_sets_give_exactly_nothing(self, dtype: torch.dtype, rho: float | None) -> None:
        """Exactly: even where the sweeps have not converged, both plans are the same numbers."""
        both = logits(9, 13).to(dtype)
        rows = sinkhorn(both, both.clone(), rho=rho, iterations=3)
        assert rows.eq(0).all()
        assert gradient(both, both.clone(), rho=rho, iterations=3).eq(0).all()

    @pytest.mark.parametrize("kind", ["dual", "plan_cost"])
    def test_the_other_values_are_above_zero_there(self, kind: str) -> None:
        both = logits(9, 13)
        assert value(both, both, value=kind, epsilon=1.0) > 0.1

    def test_never_alone(self) -> None:
        """The caution of the docstring: the teacher's rows in another order are a perfect score."""
        teacher = logits(9, 13)
        student = teacher.roll(1, 0)
        divergence = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
        assert divergence > 1
        assert abs(value(student, teacher, **CONVERGED)) < 1e-9


class TestAgainstSolvers:
    @pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.5])
    def test_plan_cost_is_pot_sinkhorn2(self, epsilon: float) -> None:
        student, teacher = pair()
        expected = ot.sinkhorn2([], [], l1(student, teacher), epsilon, numItermax=3000, stopThr=1e-14)
        got = value(student, teacher, value="plan_cost", epsilon=epsilon, **CONVERGED)
        assert got == pytest.approx(float(expected), rel=1e-9)

    @pytest.mark.parametrize(("epsilon", "rho"), [(0.1, 0.2), (0.1, 1.0), (0.5, 5.0)])
    def test_unbalanced_is_pot_unbalanced(self, epsilon: float, rho: float) -> None:
        student, teacher = pair()
        cost, uniform = l1(student, teacher), np.full(7, 1 / 7)
        plan = ot.unbalanced.sinkhorn_unbalanced(
            uniform, uniform, cost, epsilon, rho, reg_type="kl", numItermax=5000, stopThr=1e-15
        )

        def divergence(left: np.ndarray, right: np.ndarray) -> float:
            return float((left * np.log(left / right) - left + right).sum())

        primal = (plan * cost).sum() + epsilon * divergence(plan, np.full((7, 7), 1 / 49))
        primal += rho * (divergence(plan.sum(1), uniform) + divergence(plan.sum(0), uniform))
        chosen = {"epsilon": epsilon, "rho": rho, "iterations": 500}
        assert value(student, teacher, value="dual", **chosen) == pytest.approx(primal, rel=1e-9)
        transported = value(student, teacher, value="plan_cost", **chosen)
        assert transported == pytest.approx((plan * cost).sum(), rel=1e-9)

    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    def test_a_large_rho_is_balanced(self, kind: str) -> None:
        student, teacher = pair()
        balanced = value(student, teacher, value=kind, **CONVERGED)
        got = value(student, teacher, value=kind, rho=1e5, iterations=500)
        assert got == pytest.approx(balanced, abs=1e-4)

    @pytest.mark.parametrize("rho", [None, 0.3, 2.0])
    def test_divergence_and_its_gradient_are_those_of_geomloss(self, rho: float | None) -> None:
        """geomloss 0.3.1 scales the unbalanced value by rho + epsilon/2, and means to scale its
        gradient by rho + epsilon, but autograd never calls the method that would: put right here.
        """
        student, teacher = pair()
        solver = geomloss.SamplesLoss(
            "sinkhorn",
            p=1,
            blur=0.1,
            reach=rho,
            scaling=0.997,
            diameter=2.0,
            cost=lambda left, right: (left.unsqueeze(-2) - right.unsqueeze(-3)).abs().sum(-1),
            backend="tensorized",
        )
        points = student.clone().requires_grad_()
        expected = solver(points.softmax(-1), teacher.softmax(-1))
        expected.backward()
        slope = points.grad if rho is None else points.grad * (rho + 0.1) / (rho + 0.1 / 2)
        chosen = {"rho": rho, "iterations": 1000, "tolerance": 1e-13}
        assert value(student, teacher, **chosen) == pytest.approx(expected.item(), rel=1e-4)
        got = gradient(student, teacher, **chosen)
        assert (got - slope).norm() < 3e-3 * slope.norm()

    def test_our_sweeps_and_pot_walk_the_same_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not only the same end: the same numbers after any number of sweeps."""
        student, teacher = pair(rows=12)
        chosen = {"tolerance": 0.0, "epsilon": 0.05}
        for iterations in (1, 7, 50):
            chosen["iterations"] = iterations
            by_pot = sinkhorn(student, teacher, **chosen), gradient(student, teacher, **chosen)
            with monkeypatch.context() as patch:
                patch.setattr(distily_sinkhorn.solver, "_pot_solves", lambda *_: False)
                by_us = sinkhorn(student, teacher, **chosen), gradient(student, teacher, **chosen)
            for theirs, ours in zip(by_pot, by_us, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)

    def test_the_defaults_are_near_convergence(self) -> None:
        student, teacher = (side.float() for side in pair(rows=48, vocabulary=100))
        converged = value(student, teacher, iterations=500, tolerance=0.0)
        assert value(student, teacher) == pytest.approx(converged, abs=1e-3)


class TestGradient:
    @pytest.mark.parametrize("rho", [None, 0.5])
    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    def test_finite_differences(self, kind: str, rho: float | None) -> None:
        """Of the mean, the only number with a meaning; random rows are away from ties."""
        student, teacher = pair(rows=4, vocabulary=5)

        def mean(inputs: torch.Tensor) -> torch.Tensor:
            chosen = {"iterations": 150, "tolerance": 1e-15, "epsilon": 0.3}
            return sinkhorn(inputs, teacher, value=kind, rho=rho, **chosen).mean()

        assert torch.autograd.gradcheck(mean, student.requires_grad_(), eps=1e-6, atol=1e-8)

    def test_plan_cost_moves_the_plan_too(self) -> None:
        """Not the gradient of SinKD's formula with the plan held fixed, which is that of dual."""
        student, teacher = pair()
        whole = gradient(student, teacher, value="plan_cost", **CONVERGED)
        plan_held = gradient(student, teacher, value="dual", **CONVERGED)
        assert (whole - plan_held).norm() > 0.05 * plan_held.norm()

    def test_each_row_brings_its_own_gradient(self) -> None:
        """Weights of the rows weigh the rows of the gradient."""
        student, teacher = pair()
        weights = torch.arange(7.0, dtype=torch.float64)
        inputs = student.clone().requires_grad_()
        (sinkhorn(inputs, teacher) * weights).mean().backward()
        expected = gradient(student, teacher) * weights[:, None]
        torch.testing.assert_close(inputs.grad, expected)

    def test_the_teacher_gets_none(self) -> None:
        student, teacher = pair()
        rows = sinkhorn(student.requires_grad_(), teacher.requires_grad_())
        rows.sum().backward()
        assert teacher.grad is None

    def test_descent_finds_the_teachers_set(self) -> None:
        student, teacher = pair(rows=5, vocabulary=6)
        student.requires_grad_()
        optimizer = torch.optim.Adam([student], lr=0.2)
        before = value(student.detach(), teacher)
        for _ in range(40):
            optimizer.zero_grad()
            sinkhorn(student, teacher).mean().backward()
            optimizer.step()
        assert value(student.detach(), teacher) < 0.1 * before


class TestProperties:
    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 9))
    def test_range_and_order_of_rows(self, seed: int, rows: int, vocabulary: int) -> None:
        student, teacher = pair(rows, vocabulary, seed)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        for kind in ("divergence", "dual", "plan_cost"):
            chosen = {"value": kind, "epsilon": 0.5, "iterations": 500, "tolerance": 1e-12}
            got = value(student, teacher, **chosen)
            assert -1e-9 <= got <= 2
            assert value(student[order], teacher, **chosen) == pytest.approx(got, abs=1e-9)
            assert value(student, teacher[order], **chosen) == pytest.approx(got, abs=1e-9)
            assert value(teacher, student, **chosen) == pytest.approx(got, abs=1e-9)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.floats(0.05, 5.0))
    def test_order_of_the_values(self, seed: int, epsilon: float) -> None:
        """Assignment <= plan_cost <= dual <= mean cost: P minimises, and a b' is allowed."""
        student, teacher = pair(5, 6, seed)
        cost = l1(student, teacher)
        chosen = {"epsilon": epsilon, "iterations": 2000, "tolerance": 1e-12}
        transported = value(student, teacher, value="plan_cost", **chosen)
        dual = value(student, teacher, value="dual", **chosen)
        lowest = cost[linear_sum_assignment(cost)].mean()
        assert lowest - 1e-9 <= transported <= dual + 1e-9 <= cost.mean() + 2e-9

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-30, 30))
    def test_a_constant_on_a_rows_logits_changes_nothing(self, seed: int, shift: float) -> None:
        student, teacher = pair(4, 5, seed)
        assert value(student + shift, teacher) == pytest.approx(value(student, teacher), abs=1e-9)


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        student, teacher = (side.to(dtype) for side in pair(rows=16, vocabulary=50))
        rows = sinkhorn(student, teacher)
        assert rows.dtype == torch.float32
        expected = sinkhorn(student.double(), teacher.double())
        torch.testing.assert_close(rows, expected.float(), rtol=0, atol=2e-6)
        got = gradient(student, teacher)
        assert got.dtype == dtype
        expected = gradient(student.double(), teacher.double())
        assert (got - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()

    def test_autocast_rounds_nothing(self) -> None:
        student, teacher = (side.float() for side in pair())
        expected = gradient(student, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            got = gradient(student, teacher)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    @pytest.mark.parametrize("rho", [None, 1.0])
    def test_masked_vocabulary_entries(self, kind: str, rho: float | None) -> None:
        """An entry at -inf in both models is an entry that is not there; one side's has p = 0."""
        student, teacher = pair()
        masked = [side.clone() for side in (student, teacher)]
        for side in masked:
            side[:, :2] = -math.inf
        got = value(*masked, value=kind, rho=rho)
        assert got == pytest.approx(value(student[:, 2:], teacher[:, 2:], value=kind, rho=rho))
        slope = gradient(masked[0], teacher, value=kind, rho=rho)
        assert slope.isfinite().all()
        assert slope[:, :2].eq(0).all()

    @pytest.mark.usefixtures("own_sweeps")
    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    def test_a_kernel_that_underflows_is_no_trouble(self, kind: str) -> None:
        """exp(-2/0.005) is 0 in float32: rows sure of different tokens."""
        student, teacher = 40 * torch.eye(6), 40 * torch.eye(6).roll(3, 1)
        rows = sinkhorn(student, teacher, value=kind, epsilon=0.005)
        assert rows.isfinite().all()
        assert gradient(student, teacher, value=kind, epsilon=0.005).isfinite().all()
        assert rows.mean() == pytest.approx(0, abs=1e-2)  # the same set in another order

    def test_the_costs_of_a_large_vocabulary_in_float32(self) -> None:
        student, teacher = pair(rows=3, vocabulary=150_000)
        expected = value(student, teacher, value="plan_cost")
        assert value(student.float(), teacher.float(), value="plan_cost") == pytest.approx(expected, abs=2e-6)


class Watch(TorchDispatchMode):
    """The operations called, each with the size of the largest tensor that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor)]
        name = function.overloadpacket.__name__
        self.largest[name] = max([self.largest.get(name, 0), *sizes])
        return result


@pytest.mark.usefixtures("own_sweeps")
class TestResources:
    @pytest.mark.parametrize(("rows", "vocabulary"), [(16, 500), (30, 20), (3, 9000)])
    @pytest.mark.parametrize("kind", ["divergence", "plan_cost"])
    def test_nothing_is_larger_than_the_inputs(self, rows: int, vocabulary: int, kind: str) -> None:
        """Forward and backward; three n x n problems at once are the only factor."""
        student, teacher = pair(rows, vocabulary)
        with Watch() as watch:
            gradient(student, teacher, value=kind, iterations=2)
        assert max(watch.largest.values()) <= max(3 * rows * rows, rows * vocabulary)

    def test_scratch_is_bounded_and_its_size_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        student, teacher = pair(6, 40)
        expected = value(student, teacher), gradient(student, teacher)
        for elements in (1, 30, 100):
            monkeypatch.setattr(distily_sinkhorn.logits, "SCRATCH_ELEMENTS", elements)
            assert value(student, teacher) == pytest.approx(expected[0], abs=1e-13)
            with Watch() as watch:
                torch.testing.assert_close(gradient(student, teacher), expected[1])
            # the differences of one row from all the others, for as many entries as fit
            assert max(watch.largest["abs_"], watch.largest["sign_"]) <= max(elements, 6)

    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    @pytest.mark.parametrize("rho", [None, 1.0])
    def test_the_host_never_reads_a_number(self, kind: str, rho: float | None) -> None:
        """Nothing makes the host wait for the GPU: no .item(), no shape that depends on values."""
        student, teacher = pair()
        with Watch() as watch:
            gradient(student, teacher, value=kind, rho=rho)
        waits = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select"}
        assert not waits & set(watch.largest)


def states(rows: int = 7, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestHiddenStates:
    """``hidden_sinkhorn``: the same solver on other costs. Against POT and geomloss: ``tests/oracles/relations.py``."""

    BOTH = pytest.mark.parametrize("cost", ["cosine", "squared"])

    @BOTH
    @pytest.mark.parametrize("position", [0.0, 0.1])
    def test_equal_sets_give_exactly_nothing(self, cost: str, position: float) -> None:
        teacher = states()
        student = teacher.clone().requires_grad_()
        rows = hidden_sinkhorn(student, teacher, cost=cost, position=position, iterations=3)
        assert rows.eq(0).all()
        rows.mean().backward()
        assert student.grad.abs().max() < 1e-12

    @BOTH
    def test_another_order_counts_only_with_positions(self, cost: str) -> None:
        teacher = states()
        student = teacher.roll(1, 0)
        chosen = {"cost": cost, "epsilon": 0.05, **CONVERGED}
        assert abs(hidden_sinkhorn(student, teacher, **chosen).mean()) < 1e-9
        assert hidden_sinkhorn(student, teacher, position=0.1, **chosen).mean() > 0.01

    @BOTH
    def test_small_epsilon_is_the_best_assignment(self, cost: str) -> None:
        student, teacher = states(), states(seed=1)
        if cost == "cosine":
            costs = 1 - torch.nn.functional.cosine_similarity(student[:, None], teacher[None], dim=-1)
        else:
            costs = (student[:, None] - teacher[None]).square().mean(-1)
        positions = torch.arange(7)
        costs = costs + 0.3 * (positions[:, None] - positions).abs() / 7
        expected = costs.numpy()[linear_sum_assignment(costs)].mean()
        got = hidden_sinkhorn(student, teacher, cost=cost, position=0.3, epsilon=2e-3, value="plan_cost", **CONVERGED).mean()
        assert got.item() == pytest.approx(expected, abs=2e-3 * costs.median().item() * math.log(7))

    def test_the_blur_follows_the_size_of_the_states(self) -> None:
        """So the value of squared costs has their unit, and that of cosines none."""
        student, teacher = states(), states(seed=1)
        for cost, factor in (("squared", 100.0), ("cosine", 1.0)):
            small, large = (hidden_sinkhorn(size * student, size * teacher, cost=cost) for size in (1, 10))
            torch.testing.assert_close(large, factor * small)

    @BOTH
    def test_the_gradient_is_that_of_the_mean_with_the_unit_held(self, cost: str) -> None:
        """Differences move the median; epsilon moves against it, so that the blur in units of the cost stays."""
        student, teacher = states(4, 3), states(4, 3, seed=1)
        chosen = {"cost": cost, "epsilon": 0.5, "iterations": 500, "tolerance": 1e-15}
        direction = states(4, 3, seed=2)

        def median(moved: torch.Tensor) -> float:
            angles = torch.nn.functional.cosine_similarity(moved[:, None], teacher[None], dim=-1)
            return (1 - angles if cost == "cosine" else (moved[:, None] - teacher[None]).square().mean(-1)).median().item()

        def at(step: float) -> float:
            moved = student + step * direction
            held = {**chosen, "epsilon": chosen["epsilon"] * median(student) / median(moved)}
            return hidden_sinkhorn(moved, teacher, **held).mean().item()

        leaf = student.clone().requires_grad_()
        hidden_sinkhorn(leaf, teacher, **chosen).mean().backward()
        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        assert (leaf.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6)

    @BOTH
    @pytest.mark.parametrize("value", ["divergence", "dual", "plan_cost"])
    def test_rows_without_any_distance(self, cost: str, value: str) -> None:
        """One row, rows that are all the same, rows of zeros: values and gradients stay finite."""
        for teacher in (states(1), torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)):
            student = teacher.clone().requires_grad_()
            rows = hidden_sinkhorn(student, teacher, cost=cost, value=value)
            rows.mean().backward()
            assert rows.isfinite().all()
            assert student.grad.isfinite().all()

    def test_squares_do_not_cancel_in_float32(self) -> None:
        """A dimension of 1000 in every state, as decoders have it, would leave nothing of |a|² + |b|² − 2ab."""
        student, teacher = (
            torch.cat([side, torch.full((7, 1), 1000.0, dtype=torch.float64)], 1) for side in (states(), states(seed=1))
        )
        expected = hidden_sinkhorn(student, teacher, cost="squared")
        torch.testing.assert_close(
            hidden_sinkhorn(student.float(), teacher.float(), cost="squared").double(), expected, rtol=1e-3, atol=1e-5
        )

    @pytest.mark.usefixtures("own_sweeps")
    @BOTH
    def test_memory_is_that_of_the_states_and_of_the_costs(self, cost: str) -> None:
        student, teacher = states(12, 300).requires_grad_(), states(12, 300, seed=1)
        with Watch() as watch:
            hidden_sinkhorn(student, teacher, cost=cost, position=0.1, iterations=2).mean().backward()
        assert max(watch.largest.values()) <= max(3 * 12 * 12, 12 * 300)
        assert not {"_local_scalar_dense", "nonzero", "equal"} & set(watch.largest)

    def test_the_docstrings_example(self) -> None:
        assert doctest.testmod(distily_sinkhorn.hidden) == (0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.fixture
    def never_waiting(self) -> Iterator[None]:
        """CUDA itself raises where the host would wait for the device."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.usefixtures("never_waiting")
    @pytest.mark.parametrize("kind", ["divergence", "dual", "plan_cost"])
    @pytest.mark.parametrize("rho", [None, 1.0])
    def test_the_host_never_waits(self, kind: str, rho: float | None) -> None:
        student = torch.randn(8, 50, device="cuda", requires_grad=True)
        teacher = torch.randn(8, 50, device="cuda")
        sinkhorn(student, teacher, value=kind, rho=rho).mean().backward()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_gpu_agrees_with_the_cpu(self, dtype: torch.dtype) -> None:
        student, teacher = (side.to(dtype) for side in pair(rows=32, vocabulary=1000))
        chosen = {"tolerance": 0.0}
        got = sinkhorn(student.cuda(), teacher.cuda(), **chosen).cpu()
        torch.testing.assert_close(got, sinkhorn(student, teacher, **chosen), rtol=0, atol=1e-5)
        slope = gradient(student.cuda(), teacher.cuda(), **chosen).cpu().float()
        expected = gradient(student, teacher, **chosen).float()
        assert (slope - expected).norm() < max(1e-3, torch.finfo(dtype).eps) * expected.norm()

    def test_memory_grows_with_rows_times_vocabulary(self) -> None:
        """256 x 50257 in bf16: under ten float32 copies of it; n * n * V would be 256 of them."""
        student = torch.randn(256, 50_257, device="cuda", dtype=torch.bfloat16)
        teacher = torch.randn(256, 50_257, device="cuda", dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient(student, teacher)
        assert torch.cuda.max_memory_allocated() - before < 10 * 4 * student.numel()


class TestContract:
    def test_hook_and_description(self) -> None:
        assert distily_sinkhorn.distily_objectives()["sinkhorn"] is sinkhorn
        described = sinkhorn.description
        assert (described.granularity, described.on) == ("row_set", ("logits", "logit_lens"))
        assert described.temperature_scale == "t"
        assert described.zero_at_equality

    def test_first_order_in_the_temperature(self) -> None:
        """T times the divergence tends to a constant, as its temperature_scale says."""
        student, teacher = pair()
        scaled = [t * value(student / t, teacher / t, epsilon=0.5) for t in (200, 400)]
        assert scaled[0] > 0.01
        assert scaled[1] == pytest.approx(scaled[0], rel=0.02)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"epsilon": 0},
            {"epsilon": 1e9},
            {"rho": 0},
            {"value": "primal"},
            {"iterations": 0},
            {"tolerance": -1.0},
            {"temperature": 2.0},
        ],
    )
    def test_wrong_options_are_named(self, wrong: dict[str, object]) -> None:
        lines = mistakes("sinkhorn", wrong, options(sinkhorn))
        assert len(lines) == 1
        assert next(iter(wrong)) in lines[0]

    def test_the_defaults_and_null_are_allowed(self) -> None:
        known = options(sinkhorn)
        assert not mistakes("sinkhorn", {name: known[name].default for name in known}, known)

    def test_the_docstrings_example(self) -> None:
        assert doctest.testmod(distily_sinkhorn.logits) == (0, 3)
