"""Entropic optimal transport between the predictions of a set of student and of teacher rows.

The cost and its gradient are the only places that touch the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distily.objectives import row_set_objective
from distily.schema import Between
from distily_sinkhorn.solver import Problem, Value, transport

SCRATCH_ELEMENTS = 2**22
"""Elements of the largest temporary of the sums over the vocabulary: in float32 16 MiB, which stays in a GPU's cache."""


def _column_blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Vocabulary slices so narrow that ``rows`` of them fit in the scratch."""
    width = max(1, SCRATCH_ELEMENTS // rows)
    return (slice(start, start + width) for start in range(0, vocabulary, width))


def _l1_cost(left: Tensor, right: Tensor) -> Tensor:
    """All L1 distances, (n, V) and (m, V) to (n, m).

    One row of ``left`` at a time. ``torch.cdist(p=1)`` would do it in one call, but has no bf16 or
    fp16 form and a backward of n*m*V elements.
    """
    cost = left.new_zeros(left.shape[0], right.shape[0])
    for columns in _column_blocks(*right.shape):
        for row, point in enumerate(left[:, columns]):
            cost[row] += (right[:, columns] - point).abs_().sum(-1)
    return cost


def _l1_gradient(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The gradient of sum_ij weights_ij |left_i - right_j| in ``left``.

    Its row i is sum_j weights_ij sign(left_i - right_j). No matrix product, though one would fit:
    autocast and TF32 would round the weights.
    """
    gradient = torch.empty_like(left)
    for columns in _column_blocks(*right.shape):
        for row, point in enumerate(left[:, columns]):
            signs = (point - right[:, columns]).sign_()
            gradient[row, columns] = signs.mul_(weights[row, :, None]).sum(0)
    return gradient


class _L1(torch.autograd.Function):
    """The L1 costs between two sets; the second gets no gradient."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _l1_cost(left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        return _l1_gradient(weights, *ctx.saved_tensors), None


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


@row_set_objective(
    aliases=("ot", "sinkd"),
    # First order: the cost is of degree one in the difference of two rows, which falls as 1/T.
    temperature_scale="t",
    zero_at_equality=True,
    formula="OT(s,t) - OT(s,s)/2 - OT(t,t)/2; OT = min_P <P,C> + epsilon KL(P|ab'); C_ij = 2 TVD",
    source="Cui et al. 2024, SinKD (2402.17110); Feydy et al. 2019 (1810.08278)",
)
def sinkhorn(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    epsilon: Annotated[float, Between(0, 100, excluding=(0,))] = 0.1,
    value: Value = "divergence",
    rho: None | Annotated[float, Between(0, 1e6, excluding=(0,))] = None,  # noqa: RUF036
    iterations: Annotated[int, Between(1, 100_000)] = 50,
    tolerance: Annotated[float, Between(0, 1)] = 1e-4,
    max_rows: Annotated[int, Between(1)] = 256,
) -> Tensor:
    """The cost of moving the set of the student's predictions onto the set of the teacher's.

    Never alone: rows are matched by what they predict, not by where they stand, so a student whose
    rows are the teacher's in another order scores 0. Add it with a small weight to a token
    objective such as ``forward_kl``.

    Formula::

        s_i, t_j = softmax of row i, of row j
        C_ij = sum_v |s_iv - t_jv| = 2 TVD, in [0, 2];  a = b = 1/n
        OT(s, t) = min_P <P, C> + epsilon KL(P | a b'),  P 1 = a,  P' 1 = b
        divergence = OT(s, t) - OT(s, s)/2 - OT(t, t)/2;  dual = OT(s, t);  plan_cost = <P, C>

    With ``rho`` both constraints become rho KL(P 1 | a) + rho KL(P' 1 | b) in OT.

    Shapes: ``(n, V)`` and ``(n, V)`` to ``(n,)``; bf16 and fp16 are computed in float32. The mean
    of the rows is the set's value; one row alone means nothing. Row i holds f_i + g_i, the
    potentials of the i-th student and the i-th teacher row, less half of the same of the two other
    problems (unbalanced: the two potentials' shares of the dual objective), or n sum_j P_ij C_ij
    for ``plan_cost``. Backward, row i brings the gradient of n times the mean in row i of the
    logits: exact for the mean; in a weighted mean each row's gradient gets its weight. The teacher
    gets no gradient.

    Range: the divergence lies in [0, 2] and is 0 exactly when both sets are equal, in any order.
    ``dual`` and ``plan_cost`` lie in [0, 2] and are above 0 at equality. Sweeps that stop early
    give a lower ``dual``, hence possibly a divergence slightly below 0.

    Options:
        epsilon: entropic blur, in units of the cost. Default 0.1. Small ones approach the exact
            assignment and need more sweeps; large ones compare only mean costs.
        value: which of the three numbers. Default ``divergence``. SinKD's is ``plan_cost``, times
            n. All have their exact gradients (``plan_cost``: the plan's own change included).
        rho: weight of the marginals' violation, in units of the cost; null: none is allowed.
            Default null.
        iterations: sweeps at most. Default 50. On a GPU, and with ``rho``, always as many.
        tolerance: L2 norm of the violation of the column marginals at which POT, the solver of
            balanced problems on the CPU, stops (it looks every 10 sweeps); not read elsewhere.
            Default 1e-4.
        max_rows: rows in a set, drawn by the driver. Default 256. Time grows as n*n*V, memory as
            n*V.

    Source: Cui et al. 2024, SinKD, 2402.17110. Divergence and gradient: Feydy et al. 2019,
    1810.08278; unbalanced: Séjourné et al. 2019, 1910.12958.

    >>> tokens = torch.tensor([[9.0, 0.0], [0.0, 9.0]])  # each row sure of another token
    >>> f"{sinkhorn(tokens, tokens.flip(0)).mean().abs():.3f}"  # the same set, in another order
    '0.000'
    >>> f"{sinkhorn(tokens, tokens[[0, 0]]).mean():.3f}"  # half of the mass has to move by 2
    '0.965'
    """
    del max_rows  # the driver reads it before it draws the rows
    problem = Problem(value, epsilon, rho, iterations, tolerance)
    return transport(_L1.apply, _probabilities(student_logits), _probabilities(teacher_logits.detach()), problem)
