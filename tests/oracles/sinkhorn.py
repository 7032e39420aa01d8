"""A18, transport between sets of predictions: POT's kernel form, Newton's method on the dual problem, and an assignment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracles.case import Case, Check
from oracles.installed import component

ROWS, VOCABULARY = 4, 4


def rows() -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, {}


def cost(left: Tensor, right: Tensor) -> np.ndarray:
    """L1 distances of all pairs of distributions."""
    left, right = left.numpy(), right.numpy()
    left, right = (np.exp(side - side.max(-1, keepdims=True)) for side in (left, right))
    left, right = (side / side.sum(-1, keepdims=True) for side in (left, right))
    return np.abs(left[:, None] - right[None]).sum(-1)


def newton(costs: np.ndarray, epsilon: float, rho: float | None) -> tuple[float, np.ndarray]:
    """The maximum of mean φ(f) + mean φ(g) + ε − ε mean exp((f + g − C) / ε), and the plan; φ is the identity, or for relaxed
    marginals ρ (1 − exp(−· / ρ))."""
    n = len(costs)
    potentials = np.zeros(2 * n)

    def parts(potentials: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        with np.errstate(over="ignore"):  # a step that goes too far is halved
            plan = np.exp((potentials[:n, None] + potentials[None, n:] - costs) / epsilon) / n**2
        pull = np.ones(2 * n) if rho is None else np.exp(-potentials / rho)
        earned = potentials if rho is None else rho * (1 - pull)
        slope = pull / n - np.concatenate([plan.sum(1), plan.sum(0)])
        return earned.sum() / n + epsilon * (1 - plan.sum()), slope, plan, pull

    value, slope, plan, pull = parts(potentials)
    while np.abs(slope).max() > 2e-16:
        curvature = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]]) / epsilon
        if rho is not None:
            curvature += np.diag(pull) / (n * rho)
        direction = np.linalg.lstsq(curvature, slope, rcond=1e-12)[0]
        steps = (potentials + 0.5**halvings * direction for halvings in range(40))
        better = next((step for step in steps if parts(step)[0] > value), None)
        if better is None:  # as far as float64 goes
            break
        potentials = better
        value, slope, plan, pull = parts(potentials)
    return value, plan


def kernel(costs: np.ndarray, epsilon: float, rho: float | None) -> tuple[float, np.ndarray]:
    """The same by POT, with the kernel exp(−C/ε), from the primal problem."""
    import ot

    n = len(costs)
    uniform, everywhere = np.full(n, 1 / n), np.full((n, n), 1 / n**2)
    if rho is None:
        plan = ot.sinkhorn(uniform, uniform, costs, epsilon, method="sinkhorn", numItermax=20_000, stopThr=1e-16, warn=False)
        return (plan * costs).sum() + epsilon * relative_entropy(plan, everywhere), plan
    plan = ot.unbalanced.sinkhorn_unbalanced(
        uniform, uniform, costs, epsilon, rho, reg_type="kl", numItermax=20_000, stopThr=1e-16
    )
    marginals = relative_entropy(plan.sum(1), uniform) + relative_entropy(plan.sum(0), uniform)
    return (plan * costs).sum() + epsilon * relative_entropy(plan, everywhere) + rho * marginals, plan


def relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q) - p + q).sum())


def by(solve: Any) -> Any:
    def oracle(
        student: Tensor, teacher: Tensor, value: str = "divergence", epsilon: float = 0.1, rho: float | None = None
    ) -> float:
        total, plan = solve(cost(student, teacher), epsilon, rho)
        if value == "plan_cost":
            return float((plan * cost(student, teacher)).sum())
        own = [solve(cost(side, side), epsilon, rho)[0] for side in (student, teacher)] if value == "divergence" else []
        return total - sum(own) / 2

    return oracle


BOTH = {"Newton on the dual": by(newton), "POT, kernel form": by(kernel)}
CONVERGED = {"epsilon": 0.2, "iterations": 1000, "tolerance": 1e-14}


def assignment() -> float:
    """With hardly any blur, the best assignment; every entropy is at most ε log n."""
    from scipy.optimize import linear_sum_assignment

    student, teacher, _ = rows()
    costs = cost(student, teacher)
    chosen = {"value": "plan_cost", "epsilon": 2e-3, "iterations": 3000, "tolerance": 1e-13}
    found = component("objectives", "sinkhorn", **chosen)(student, teacher).mean().item()
    return float(abs(found - costs[linear_sum_assignment(costs)].mean()))


CASES = [
    Case("A18", "sinkhorn", BOTH, options=CONVERGED, rows=rows),
    Case("A18", "sinkhorn", BOTH, options={"value": "dual", **CONVERGED}, rows=rows, floor=by(newton)),
    Case("A18", "sinkhorn", BOTH, options={"value": "plan_cost", **CONVERGED}, rows=rows, floor=by(newton)),
    Case("A18", "sinkhorn", BOTH, options={"epsilon": 0.2, "rho": 0.5, "iterations": 300}, rows=rows),
    Check("A18", "sinkhorn:epsilon=0.002", "scipy's best assignment", "value", assignment, 2e-3 * math.log(ROWS)),
]
