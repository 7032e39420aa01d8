"""Entropic optimal transport between the hidden states of a document's tokens in student and teacher.

Letters: n tokens of one document, H width after projection.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from distily.objectives import row_set_objective
from distily.schema import Between
from distily_sinkhorn.solver import Problem, Value, transport


@row_set_objective(
    on=("hidden_states", "attention_outputs", "queries", "keys", "values"),
    aliases=("sinkhorn_hidden", "ot_hidden"),
    surrogate_gradient=True,
    formula="OT(a,b) − OT(a,a)/2 − OT(b,b)/2; OT = min_P ⟨P,C⟩ + ε m KL(P|1/n²); C_ij = 1 − cos(a_i,b_j) + λ|i−j|/n, m its median",
    source="Feydy et al. 2019, arXiv:1810.08278",
)
def hidden_sinkhorn(
    student: Tensor,
    teacher: Tensor,
    *,
    cost: Literal["cosine", "squared"] = "cosine",
    position: Annotated[float, Between(0, 1e6)] = 0.0,
    epsilon: Annotated[float, Between(0, 100, excluding=(0,))] = 0.05,
    value: Value = "divergence",
    iterations: Annotated[int, Between(1, 100_000)] = 50,
    tolerance: Annotated[float, Between(0, 1)] = 1e-4,
    max_rows: Annotated[int, Between(1)] = 256,
) -> Tensor:
    """The cost of moving the set of the student's states onto the set of the teacher's.

    Never alone without ``position``: states are matched by what they are, not by where they stand, so a student whose states are the
    teacher's in another order scores 0.

    Shapes: ``(n, H), (n, H) -> (n,)``; the mean of the rows is the set's value, one row alone means nothing. Range [0, ∞), with cosines
    up to 2 + λ; zero where both sets are equal, and for λ > 0 in the same order. ``dual`` and ``plan_cost`` are above 0 there. The
    gradient is exact for the mean with m held constant. Cost n²H for the distances, n² for a sweep.

    Options:
        cost: between two states, ``cosine`` (1 − cos) or ``squared`` (‖a − b‖² / H).
        position: λ, adds λ |i − j| / n, the distance within the drawn rows; in units of the cost. Default 0; 0.1 keeps the order.
        epsilon: entropic blur, in units of m, the median of the costs between the two sets (at least a hundredth of their mean).
            Default 0.05.
        value: ``divergence``; ``dual``, which is OT(a, b); ``plan_cost``, which is its ⟨P, C⟩.
        iterations: sweeps at most. Default 50. On a GPU always as many.
        tolerance: L2 norm of the violation of the marginals at which POT, the solver on the CPU, stops. Default 1e-4.
        max_rows: tokens of a document, drawn by the driver. Default 256.

    Exploratory: no published gain for language models. A Gromov-Wasserstein cost, which needs no projector, is left out: O(n³) for
    each iteration.

    Source: divergence and gradient: Feydy et al. 2019, arXiv:1810.08278.

    >>> states = torch.eye(4)
    >>> f"{hidden_sinkhorn(states.flip(0), states).mean().abs():.3f}"  # the same set, in another order
    '0.000'
    >>> f"{hidden_sinkhorn(states.flip(0), states, position=0.1).mean():.3f}"  # now the order counts: 0.1 · (3 + 1 + 1 + 3) / 4²
    '0.050'
    """
    del max_rows  # the driver reads it before it draws the rows
    distances = _cosine if cost == "cosine" else _squared
    rows = torch.arange(len(student), device=student.device, dtype=student.dtype)
    apart = position / len(student) * (rows[:, None] - rows).abs()
    with torch.no_grad():
        costs = distances(student, teacher) + apart
        unit = torch.maximum(costs.median(), costs.mean() / 100).clamp(min=torch.finfo(costs.dtype).tiny)
    problem = Problem(value, epsilon, None, iterations, tolerance)
    return unit * transport(lambda left, right: (distances(left, right) + apart) / unit, student, teacher, problem)


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    left, right = (torch.nn.functional.normalize(states, dim=-1, eps=1e-6) for states in (left, right))
    return 1.0 - left @ right.T


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """Without ``(n, n, H)`` in memory; the common mean is taken off first, since the squares cancel."""
    centre = right.mean(0)
    left, right = left - centre, right - centre
    squares = left.square().sum(-1)[:, None] + right.square().sum(-1) - 2.0 * left @ right.T
    return squares.clamp(min=0.0) / left.shape[-1]
