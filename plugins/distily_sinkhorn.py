"""Entropic optimal transport between the predictions of a set of student and of teacher rows.

Everything stays in the log domain: the kernel exp(-C/epsilon) of the textbook iterations is 0 in
float32 once C/epsilon passes 103. The sweeps leave no graph behind; the gradient comes from the
converged plan, see ``_Transport``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distily.hookspecs import hookimpl
from distily.objectives import row_set_objective
from distily.schema import Between

SCRATCH_ELEMENTS = 2**22
"""Elements of the largest temporary of the sums over the vocabulary: in float32 16 MiB, which stays
in a GPU's cache."""

Value = Literal["divergence", "dual", "plan_cost"]


@dataclass(frozen=True)
class _Problem:
    """What is solved and how far: the options of ``sinkhorn`` that the solvers read."""

    value: Value
    epsilon: float
    rho: float | None
    iterations: int
    tolerance: float

    @property
    def damping(self) -> float:
        """The factor of each update: 1 for fixed marginals, less if they cost ``rho``."""
        return 1.0 if self.rho is None else self.rho / (self.rho + self.epsilon)


# --- cost and its gradient: the only places that touch the vocabulary ---


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


# --- solvers: costs (problems, n, n) to the potentials f and g (problems, n) ---


def _soft_minimum(values: Tensor, epsilon: float, dim: int) -> Tensor:
    """-epsilon log mean exp(-values / epsilon) over ``dim``."""
    return epsilon * (math.log(values.shape[dim]) - torch.logsumexp(-values / epsilon, dim))


def _sweeps(costs: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Our own log-domain sweeps, all problems at once.

    Always ``iterations`` of them: asking whether they have converged would make the host wait for
    the GPU.
    """
    first = costs.new_zeros(costs.shape[:-1])
    second = first
    for _ in range(problem.iterations):
        second = problem.damping * _soft_minimum(costs - first[..., :, None], problem.epsilon, -2)
        first = problem.damping * _soft_minimum(costs - second[..., None, :], problem.epsilon, -1)
    return first, second


def _pot(costs: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
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


def _pot_solves(costs: Tensor, problem: _Problem) -> bool:
    """POT is the CPU solver of balanced problems; it has no unbalanced one in the log domain."""
    return costs.device.type == "cpu" and problem.rho is None


def _potentials(costs: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    return (_pot if _pot_solves(costs, problem) else _sweeps)(costs, problem)


# --- values and plans ---


def _dual_rows(first: Tensor, second: Tensor, problem: _Problem) -> Tensor:
    """The dual objective at the potentials, as rows (..., n) whose mean it is.

    Exact, since f was updated last. Balanced: the plan's mass is then 1, and f_i + g_i is left.
    Unbalanced: row i of the plan has the mass exp(-f_i/rho)/n, so that the entropy's mass term
    epsilon (1 - mass) joins f's own rho (1 - exp(-f_i/rho)).
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


def _plan_cost_gradient(cost: Tensor, first: Tensor, second: Tensor, problem: _Problem) -> Tensor:
    """The gradient of <P, C> in C, n times, with the plan's own change.

    It is n P_ij (1 + (x_i + y_j - C_ij) / epsilon).
    <P, C> is not what P minimises, so the envelope theorem does not apply; (x, y) solve the linear
    system that comes from differentiating the marginals. Its Gauss-Seidel sweeps are Sinkhorn's
    sweeps, linearised: the same number of them converges alike, with no factorisation (which would
    make the host wait) and no division by tiny masses.
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


class _Transport(torch.autograd.Function):
    """Row values of the transport between probabilities, and their gradient in the student's.

    The envelope theorem: d OT/dC is the plan P, so row i of the gradient is
    sum_j P_ij sign(s_i - t_j). For the divergence the same with the plan between the student's rows
    is subtracted; the factor 1/2 cancels as both arguments move.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, problem: _Problem) -> Tensor:
        pairs = [(student, teacher)]
        if problem.value == "divergence":
            pairs += [(student, student), (teacher, teacher)]
        costs = torch.stack([_l1_cost(left, right) for left, right in pairs])
        first, second = _potentials(costs, problem)
        plans = _row_plan(costs, first, second, problem.epsilon)
        if problem.value == "plan_cost":
            weights = _plan_cost_gradient(costs[0], first[0], second[0], problem)
            rows = (plans[0] * costs[0]).sum(-1)
        else:
            weights = plans[0]
            rows = _dual_rows(first, second, problem)
            # Séjourné's mass term epsilon/2 (m_s - m_t)^2 is absent: both sets have mass 1.
            rows = rows[0] - rows[1:].sum(0) / 2
        ctx.save_for_backward(student, teacher, weights, plans[1] if len(pairs) > 1 else None)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, weights, self_plan = ctx.saved_tensors
        gradient = _l1_gradient(weights, student, teacher)
        if self_plan is not None:
            gradient -= _l1_gradient(self_plan, student, student)
        return gradient * upstream[:, None], None, None


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
    problem = _Problem(value, epsilon, rho, iterations, tolerance)
    teacher = _probabilities(teacher_logits.detach())
    return _Transport.apply(_probabilities(student_logits), teacher, problem)


@hookimpl
def distily_objectives() -> dict[str, Any]:
    return {"sinkhorn": sinkhorn}
