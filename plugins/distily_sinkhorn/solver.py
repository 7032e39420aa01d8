"""Entropic optimal transport between two sets of n points with equal masses, from the costs between them.

Everything stays in the log domain: the kernel exp(-C/epsilon) of the textbook iterations is 0 in float32 once C/epsilon passes 103.
The sweeps leave no graph behind; the gradient in the costs comes from the converged plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Value = Literal["divergence", "dual", "plan_cost"]
Cost = Callable[[Tensor, Tensor], Tensor]
"""The costs between all points of two sets, ``(n, H), (n, H) -> (n, n)``; their gradient is asked for in the first set alone."""


@dataclass(frozen=True)
class Problem:
    """What is solved and how far."""

    value: Value
    epsilon: float
    rho: float | None
    iterations: int
    tolerance: float

    @property
    def damping(self) -> float:
        """The factor of each update: 1 for fixed marginals, less if they cost ``rho``."""
        return 1.0 if self.rho is None else self.rho / (self.rho + self.epsilon)


def transport(cost: Cost, student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """Row values ``(n,)`` of the transport from the student's points to the teacher's, with the student's gradient.

    The envelope theorem: d OT/dC is the plan P, so the gradient is that of sum_ij P_ij C_ij with P held. For the divergence the same
    with the plan between the student's points is subtracted; the factor 1/2 cancels as both arguments move, so that one of them may
    stay.
    """
    teacher = teacher.detach()
    pairs = [(student, teacher)]
    if problem.value == "divergence":
        pairs += [(student, student.detach()), (teacher, teacher)]
    return _Rows.apply(torch.stack([cost(left, right) for left, right in pairs]), problem)


class _Rows(torch.autograd.Function):
    """Row values from the costs of one problem, or of the divergence's three."""

    @staticmethod
    def forward(ctx: Any, costs: Tensor, problem: Problem) -> Tensor:
        first, second = _potentials(costs, problem)
        plans = _row_plan(costs, first, second, problem.epsilon)
        if problem.value == "plan_cost":
            rows = (plans[0] * costs[0]).sum(-1)
            weights = _plan_cost_gradient(costs[0], first[0], second[0], problem)[None]
        else:
            rows = _dual_rows(first, second, problem)
            # Séjourné's mass term epsilon/2 (m_s - m_t)^2 is absent: both sets have mass 1.
            rows = rows[0] - rows[1:].sum(0) / 2
            weights = torch.cat([plans[:1], -plans[1:]])
        ctx.save_for_backward(weights)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return weights * upstream[:, None], None


# --- solvers: costs (problems, n, n) to the potentials f and g (problems, n) ---


def _soft_minimum(values: Tensor, epsilon: float, dim: int) -> Tensor:
    """-epsilon log mean exp(-values / epsilon) over ``dim``."""
    return epsilon * (math.log(values.shape[dim]) - torch.logsumexp(-values / epsilon, dim))


def _sweeps(costs: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Our own log-domain sweeps, all problems at once.

    Always ``iterations`` of them: asking whether they have converged would make the host wait for the GPU.
    """
    first = costs.new_zeros(costs.shape[:-1])
    second = first
    for _ in range(problem.iterations):
        second = problem.damping * _soft_minimum(costs - first[..., :, None], problem.epsilon, -2)
        first = problem.damping * _soft_minimum(costs - second[..., None, :], problem.epsilon, -1)
    return first, second


def _pot(costs: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """POT's log-domain solver, which does the same sweeps and stops at ``tolerance``."""
    import ot  # costs seconds

    rows = costs.shape[-1]
    uniform = costs.new_full((rows,), 1.0 / rows)
    potentials = []
    for cost in costs:
        _, log = ot.bregman.sinkhorn_log(
            uniform,
            uniform,
            cost,
            problem.epsilon,
            numItermax=problem.iterations,
            stopThr=problem.tolerance,
            log=True,
            warn=False,  # to stop at `iterations` is what the option asks for
        )
        potentials.append(torch.stack((log["log_u"], log["log_v"])))
    # POT's plan is exp(log_u + log_v - C/epsilon); ours has each marginal's factor 1/n outside.
    scaled = problem.epsilon * (torch.stack(potentials, 1) + math.log(rows))
    return scaled[0], scaled[1]


def _pot_solves(costs: Tensor, problem: Problem) -> bool:
    """POT is the CPU solver of balanced problems; it has no unbalanced one in the log domain."""
    return costs.device.type == "cpu" and problem.rho is None


def _potentials(costs: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return (_pot if _pot_solves(costs, problem) else _sweeps)(costs, problem)


# --- values and plans ---


def _dual_rows(first: Tensor, second: Tensor, problem: Problem) -> Tensor:
    """The dual objective at the potentials, as rows (..., n) whose mean it is.

    Exact, since f was updated last. Balanced: the plan's mass is then 1, and f_i + g_i is left. Unbalanced: row i of the plan has the
    mass exp(-f_i/rho)/n, so that the entropy's mass term epsilon (1 - mass) joins f's own rho (1 - exp(-f_i/rho)).
    """
    if problem.rho is None:
        return first + second
    rho = problem.rho
    shares = (rho + problem.epsilon) * torch.expm1(-first / rho) + rho * torch.expm1(-second / rho)
    return -shares


def _row_plan(cost: Tensor, first: Tensor, second: Tensor, epsilon: float) -> Tensor:
    """The plan, n times: row i weighs the costs of row i, whose share of the mean is 1/n."""
    exponent = (first[..., :, None] + second[..., None, :] - cost) / epsilon
    return torch.exp(exponent) / cost.shape[-1]


def _plan_cost_gradient(cost: Tensor, first: Tensor, second: Tensor, problem: Problem) -> Tensor:
    """The gradient of <P, C> in C, n times, with the plan's own change: n P_ij (1 + (x_i + y_j - C_ij) / epsilon).

    <P, C> is not what P minimises, so the envelope theorem does not apply; (x, y) solve the linear system that comes from
    differentiating the marginals. Its Gauss-Seidel sweeps are Sinkhorn's sweeps, linearised: the same number of them converges alike,
    with no factorisation (which would make the host wait) and no division by tiny masses.
    """
    epsilon = problem.epsilon
    along_rows = torch.softmax((second[None, :] - cost) / epsilon, dim=1)
    along_columns = torch.softmax((first[:, None] - cost) / epsilon, dim=0)
    row_shift, column_shift = torch.zeros_like(first), torch.zeros_like(second)
    for _ in range(problem.iterations):
        row_shift = problem.damping * (along_rows * (cost - column_shift[None, :])).sum(1)
        column_shift = problem.damping * (along_columns * (cost - row_shift[:, None])).sum(0)
    change = (row_shift[:, None] + column_shift[None, :] - cost) / epsilon
    return _row_plan(cost, first, second, epsilon) * (1 + change)
