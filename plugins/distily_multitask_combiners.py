"""Combiners of multi-task learning, which treat all terms alike, from the Gram matrix of their gradients where they meet.

Letters: K terms of a meeting, G their Gram matrix, g_k their gradients, u = Σ_k a_k g_k the combined gradient, c a cosine.
Everything is on the scale of a sum: equal gradients give their sum, a_k = 1. So a published mean is multiplied by K here.
Nothing here asks the GPU whether it has converged, which would make the host wait: solvers try every set of terms at once, or take a
fixed number of steps. Where digits cancel they work in float64; there is no matrix product, which autocast and TF32 would round.
Careful comparisons find tuned fixed weights as good: Kurin et al. 2022 (arXiv:2201.04122), Xin et al. 2022 (arXiv:2209.11379).
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from distily.combiners import Combiner, cosines, divide, norms
from distily.hookspecs import aliased, hookimpl
from distily.schema import Between

MOST_TERMS = 8
"""Of solvers that try every set of terms."""
RIDGE = 1e-14
"""Added to Gram matrices of trace 1 where parallel gradients would make them singular."""
ROTATION_SWEEPS = 8
"""Of Jacobi's method, which converges quadratically; for two terms the first rotation is exact."""
NEWTON_STEPS = 30
LARGEST_SHARE = 1 / math.sqrt(1e-3)
"""Of a unit gradient in the bargain."""


def _relative(gram: Tensor) -> Tensor:
    """The Gram matrix over its trace, in float64."""
    gram = gram.double()
    return divide(gram, gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])


def _own_directions(gram: Tensor) -> Tensor:
    """Row i holds the weights that make the i-th gradient: the identity for every matrix, ``(…, K, K)``."""
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand(gram.shape).clone()


def _inner(rows: Tensor, gram: Tensor, other: int) -> Tensor:
    """The products of the gradients in ``rows`` with gradient ``other``: ``(…, K)``."""
    return (rows * gram[..., other, None, :]).sum(-1)


def _square(weights: Tensor, gram: Tensor) -> Tensor:
    """‖Σ w_k g_k‖²: ``(…, K), (…, K, K) -> (…)``."""
    return (weights[..., :, None] * weights[..., None, :] * gram).sum((-2, -1)).clamp(min=0)


def _sets(gram: Tensor) -> Tensor:
    """Every set of terms, the empty one first: 1 where a term is in it, ``(2^K, K)``."""
    terms = torch.arange(gram.shape[-1], device=gram.device)
    return (torch.arange(2 ** gram.shape[-1], device=gram.device)[:, None] >> terms & 1).to(gram.dtype)


def _solved_on(sets: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    """The solution of G x = right among the terms of each set, 0 for the others: ``(…, K, R) -> (…, sets, K, R)``."""
    inside = gram[..., None, :, :] * sets[:, :, None] * sets[:, None, :]
    matrix = inside + torch.diag_embed(1 - sets + RIDGE)
    return torch.linalg.solve_ex(matrix, right[..., None, :, :] * sets[:, :, None]).result


def _least(candidates: Tensor, objective: Tensor) -> Tensor:
    """The candidates ``(…, sets, K)`` whose objective ``(…, sets)`` is least: ``(…, K)``."""
    return torch.take_along_dim(candidates, objective.argmin(-1)[..., None, None], -2).squeeze(-2)


def _least_on_simplex(gram: Tensor, linear: Tensor, radius: Tensor) -> Tensor:
    """Weights w ≥ 0, Σ w = 1 that minimise ⟨linear, w⟩ + radius · √(wᵀ G w): ``(…, K)``.

    Were the terms with w > 0 known, w would be proportional to G⁻¹ (μ 1 − linear) on them, with μ the larger root of
    (μ 1 − linear)ᵀ G⁻¹ (μ 1 − linear) = radius². So every set of terms is tried, and the best kept.
    """
    sets = _sets(gram)[1:].flip(0)  # all terms first, so that equal gradients share alike
    ones, shifts = _solved_on(sets, gram, torch.stack([torch.ones_like(linear), linear], -1)).unbind(-1)
    linear, radius = linear[..., None, :], radius[..., None]
    first, middle, last = ones.sum(-1), shifts.sum(-1), (shifts * linear).sum(-1)
    root = divide(middle + (middle.square() - first * (last - radius.square())).clamp(min=0).sqrt(), first)
    weights = (root[..., None] * ones - shifts).clamp(min=0)
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, sets)
    weights = weights / weights.sum(-1, keepdim=True)
    return _least(weights, (weights * linear).sum(-1) + radius * _square(weights, gram[..., None, :, :]).sqrt())


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(…, K)`` and eigenvectors in columns, by Jacobi's rotations: ``torch.linalg.eigh`` makes the host wait."""
    matrix, vectors = gram.clone(), _own_directions(gram)
    for _ in range(ROTATION_SWEEPS if gram.shape[-1] > 2 else 1):
        for p, q in combinations(range(gram.shape[-1]), 2):
            difference, coupling = matrix[..., q, q] - matrix[..., p, p], 2 * matrix[..., p, q]
            sign = torch.where(difference < 0, -1.0, 1.0)
            tangent = divide(sign * coupling, difference.abs() + torch.hypot(difference, coupling))
            cosine = torch.rsqrt(1 + tangent.square())
            sine = tangent * cosine
            for turned in (matrix, matrix.mT, vectors):  # columns, rows
                first, second = turned[..., p].clone(), turned[..., q].clone()
                turned[..., p] = cosine[..., None] * first - sine[..., None] * second
                turned[..., q] = sine[..., None] * first + cosine[..., None] * second
    return matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0), vectors


class _BySets(Combiner):
    """A combiner that tries every set of terms."""

    def __init__(self, terms: int) -> None:
        if terms > MOST_TERMS:
            raise ValueError(f"it combines at most {MOST_TERMS} terms, not {terms}")
        super().__init__(terms)


@aliased("gradient_surgery")
class PCGrad(Combiner):
    """Each gradient without what opposes another one, then their sum.

    Shapes: ``(…, K, K) -> (…, K)``. For every i: g ← g_i; for the others j in the terms' order, if ⟨g, g_j⟩ < 0,
    g ← g − ⟨g, g_j⟩ / ‖g_j‖² · g_j; u is the sum. The paper draws the order of j; with two terms there is only one.
    Two terms: ⟨u, g_k⟩ = ‖g_k‖² sin²φ where they conflict, so it takes from the primary term too and ends at 0 as c → −1.

    Source: Yu et al. 2020, arXiv:2001.06782.

    >>> PCGrad(2).coefficients(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        gram = _relative(measured)
        own = _own_directions(gram)
        rows = own.clone()
        for j in range(self.terms):
            opposed = divide(_inner(rows, gram, j), gram[..., j, j, None]).clamp(max=0)
            rows[..., j] -= opposed * (1 - own[..., j])
        return rows.sum(-2).to(measured.dtype)


@aliased("gradient_vaccine")
class GradVac(Combiner):
    """Turns gradients towards each other until their cosine is what it has been on average, then sums them.

    Shapes: ``(…, K, K) -> (…, K)``. For every i: g ← g_i; for the others j in the terms' order, with φ the cosine of g and g_j, if
    φ < ρ_ij: g ← g + ‖g‖ (ρ √(1−φ²) − φ √(1−ρ²)) / (‖g_j‖ √(1−ρ²)) · g_j, which makes the cosine ρ_ij; u is the sum. ρ = 0 is ``pcgrad``.
    ρ starts at 0 and is a running mean of the terms' cosines, kept within ±0.999. It takes in a step's cosine before it is used, not
    after: that moves ρ towards φ and never past it, so the same pairs are turned. With three or more terms the cosines are those
    of the gradients as measured, not as already turned.

    Options: ``ema_decay``, of the running mean (the paper's β is 1 − ema_decay).

    Source: Wang, Tsvetkov, Firat, Cao 2021, arXiv:2010.05874.

    >>> GradVac(2).coefficients(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])
    """

    goal: Tensor

    def __init__(self, terms: int, *, ema_decay: Annotated[float, Between(0, 1)] = 0.99) -> None:
        super().__init__(terms)
        self.ema_decay = ema_decay
        self.register_buffer("goal", torch.zeros(terms, terms, dtype=torch.float64))

    def coefficients(self, measured: Tensor) -> Tensor:
        gram, goals = _relative(measured), self.goal.double()
        own, lengths = _own_directions(gram), norms(gram)
        rows = own.clone()
        for j in range(self.terms):
            goal = goals[:, j]
            length = _square(rows, gram[..., None, :, :]).sqrt()
            found = divide(divide(_inner(rows, gram, j), length), lengths[..., j, None]).clamp(-1, 1)
            tangent = goal / (1 - goal.square()).sqrt()
            turn = divide(length * (tangent * (1 - found.square()).sqrt() - found), lengths[..., j, None])
            rows[..., j] += torch.where(found < goal, turn, 0.0) * (1 - own[..., j])
        return rows.sum(-2).to(measured.dtype)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        self.goal.lerp_(cosines(measured).clamp(-0.999, 0.999).to(self.goal), 1.0 - self.ema_decay)

    def report(self) -> dict[str, Tensor]:
        return {f"goal_{k}": self.goal[0, k] for k in range(1, self.terms)}


@aliased("multiple_gradient_descent", "min_norm")
class MGDA(_BySets):
    """The shortest gradient of the convex hull of all terms' gradients: the common descent direction with the best worst case.

    Shapes: ``(…, K, K) -> (…, K)``. a = K w with w = argmin ‖Σ w_k g_k‖², w ≥ 0, Σ w = 1. Two terms:
    w_L = clip((‖g_F‖² − ⟨g_L, g_F⟩) / ‖g_L − g_F‖², 0, 1). ⟨u, g_k⟩ ≥ ‖u‖² / K for all k; u = 0 where no direction helps all.
    It favours the shorter gradient, and stops with it: a term near its minimum, or a gradient of 0, ends the training of all.

    Source: Désidéri 2012; Sener, Koltun 2018, arXiv:1810.04650.

    >>> MGDA(2).coefficients(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([1.5000, 0.5000])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        gram = _relative(measured)
        nothing = torch.zeros_like(gram[..., 0])
        return (self.terms * _least_on_simplex(gram, nothing, torch.ones_like(nothing[..., 0]))).to(measured.dtype)


@aliased("conflict_averse")
class CAGrad(_BySets):
    """The update near the mean gradient that helps the worst-off term most.

    Shapes: ``(…, K, K) -> (…, K)``. With g_0 the mean: u = K (g_0 + radius ‖g_0‖ / ‖g_w‖ · g_w) / (1 + radius), g_w = Σ w_k g_k,
    w = argmin ⟨g_w, g_0⟩ + radius ‖g_0‖ ‖g_w‖ over w ≥ 0, Σ w = 1. Before K / (1 + radius), which makes equal gradients give their sum,
    ‖u − g_0‖ = radius ‖g_0‖. At radius 0 it is ``sum``. Where g_w is 0 to rounding, u is the multiple of g_0.

    Options: ``radius``, the paper's c: how far the update may go from the mean gradient, as a share of its length.

    Source: Liu, Liu, Jin, Stone, Liu 2021, arXiv:2110.14048.

    >>> CAGrad(2, radius=0.5).coefficients(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    tensor([1., 1.])
    """

    def __init__(self, terms: int, *, radius: Annotated[float, Between(0, 1, excluding=(1,))] = 0.5) -> None:
        super().__init__(terms)
        self.radius = radius

    def coefficients(self, measured: Tensor) -> Tensor:
        gram = _relative(measured)
        with_mean = gram.mean(-1)
        radius = self.radius * with_mean.mean(-1).clamp(min=0).sqrt()
        weights = _least_on_simplex(gram, with_mean, radius)
        square = _square(weights, gram)
        visible = square > self.terms * torch.finfo(measured.dtype).eps
        helping = divide(radius, torch.where(visible, square, 0.0).sqrt())[..., None] * weights
        return ((1 + self.terms * helping) / (1 + self.radius)).to(measured.dtype)


@aliased("independent_component_alignment")
class AlignedMTL(Combiner):
    """Gradients made orthogonal and equally long, as short as the weakest of their independent components; then their sum.

    Shapes: ``(…, K, K) -> (…, K)``. G = V Λ Vᵀ, a = √λ_min · V Λ^(−½) Vᵀ 1 over the eigenvalues above K · eps · λ_max.
    Gradients that are almost parallel give an update of almost 0, since their difference is the weakest component, until rounding takes
    them for one direction and they give their sum: two of equal length below an angle of 4e-8, or of 1e-3 for a Gram matrix in float32.

    Source: Senushkin, Patakin, Kuznetsov, Konushin 2023, arXiv:2305.19000.

    >>> AlignedMTL(2).coefficients(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 1.0000])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        gram = _relative(measured)
        values, vectors = _eigen(gram)
        largest = values.amax(-1, keepdim=True)
        visible = values > self.terms * torch.finfo(measured.dtype).eps * largest
        smallest = torch.where(visible, values, torch.inf).amin(-1, keepdim=True)
        scales = torch.where(visible, divide(smallest, values).sqrt(), 0.0)
        coefficients = (vectors * (scales * vectors.sum(-2))[..., None, :]).sum(-1)
        return torch.where(largest == 0, 1.0, coefficients).to(measured.dtype)


@aliased("nash_mtl")
class Nash(Combiner):
    """The bargain of all terms: every gradient counts by its direction alone, so no loss gains by its scale.

    Shapes: ``(…, K, K) -> (…, K)``. The solution of G a = 1 / a, a > 0, times √K ‖g_L‖. Two terms: the bisector of the unit gradients,
    a_k = √2 ‖g_L‖ / (‖g_k‖ √(1 + c)). The solution itself has the fixed length √K, whatever is left to learn; the factor, ours, makes the
    update K ‖g_L‖ long, equal gradients give their sum, and a rescaled auxiliary loss change nothing. ⟨u, g_k⟩ > 0 for all k.
    Terms without gradient take no part. Where gradients almost cancel, so that a unit gradient would count more than 31.6 (1 / √0.001;
    for two terms, where 1 + c < 0.001), the primary gradient is returned alone.

    Source: Navon et al. 2022, arXiv:2202.01017.

    >>> Nash(2).coefficients(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    tensor([1.4142, 0.7071])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        measured, dtype = measured.double(), measured.dtype
        lengths, own = norms(measured), _own_directions(measured)
        present = (lengths > 0).to(lengths.dtype).sum(-1, keepdim=True)
        angles = torch.where(own == 1, 1.0, cosines(measured))
        shares = _bisector(angles) if self.terms == 2 else _bargain(angles)
        agreed = shares * present.sqrt() * divide(lengths[..., :1], lengths)
        return torch.where(shares.amax(-1, keepdim=True) > LARGEST_SHARE, own[..., 0], agreed).to(dtype)


def _bisector(angles: Tensor) -> Tensor:
    """The solution b > 0 of C b = 1 / b for the cosines C of two gradients."""
    return torch.rsqrt((1 + angles[..., 0, 1]).clamp(min=1e-6))[..., None].expand(angles.shape[:-1])


def _bargain(angles: Tensor) -> Tensor:
    """The solution b > 0 of C b = 1 / b, by damped Newton steps on ½ bᵀ C b − Σ log b, which converge from any b > 0."""
    shares = torch.ones_like(angles[..., 0])
    for _ in range(NEWTON_STEPS):
        slope = (angles * shares[..., None, :]).sum(-1) - 1 / shares
        hessian = angles + torch.diag_embed(1 / shares.square())
        step = torch.linalg.solve_ex(hessian, slope[..., None]).result[..., 0]
        step = step / (1 + (slope * step).sum(-1, keepdim=True).clamp(min=0).sqrt())
        lost = shares.amax(-1, keepdim=True) > LARGEST_SHARE  # there is no solution, or none that is wanted
        shares = torch.where(lost, shares, shares - step)
    return shares


@aliased("unconflicting_projection")
class UPGrad(_BySets):
    """Each gradient moved as little as possible to where it opposes none, then their sum.

    Shapes: ``(…, K, K) -> (…, K)``. u = Σ_i argmin ‖x − g_i‖² over x with ⟨x, g_k⟩ ≥ 0 for all k, so ⟨u, g_k⟩ ≥ 0. With two terms it
    is ``pcgrad``, which for more is no such projection and depends on the terms' order.

    Source: Quinton, Rey 2024, arXiv:2406.16232.

    >>> UPGrad(2).coefficients(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        angles, lengths = cosines(measured.double()), norms(measured.double())  # the cone knows no lengths
        sets = _sets(angles)
        added = _solved_on(sets, angles, -angles).clamp(min=0).mT  # of each set, for each gradient: how much of the others
        moved = added.transpose(-3, -2)
        squares = _square(moved + _own_directions(angles)[..., :, None, :], angles[..., None, None, :, :])
        multipliers = _least(moved, squares)
        return (1 + divide((lengths[..., :, None] * multipliers).sum(-2), lengths)).to(measured.dtype)


@hookimpl
def distily_combiners() -> dict[str, type[Combiner]]:
    return {
        "pcgrad": PCGrad,
        "gradvac": GradVac,
        "mgda": MGDA,
        "cagrad": CAGrad,
        "aligned_mtl": AlignedMTL,
        "nash": Nash,
        "upgrad": UPGrad,
    }
