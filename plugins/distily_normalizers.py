"""Normalizers of what is compared, after projection, each row by itself. The term's key ``normalized`` says which sides: ``both``, which
takes norms out of the comparison, or the ``teacher``'s alone, whose scale the projector then learns.

A decoder's hidden states have a few dimensions, and first positions, that are 10² to 10³ times the rest (massive activations, Sun et al.
2024, arXiv:2402.17762). A squared error of raw states is an error of those alone; ``standardize`` is the remedy that treats every
dimension by itself.

Letters: N and n rows, H width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.hookspecs import aliased
from distily.schema import Between
from distily.state import Adaptive, Calibrated, Moments

BATCHNORM_FLOOR = 1e-4
"""Added to a variance, as in the official code of Miles and Mikolajczyk 2024."""


def none(features: Tensor) -> Tensor:
    """The features as they are.

    >>> none(torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    return features


@aliased("layer_norm", "ln")
def layernorm(features: Tensor) -> Tensor:
    """Zero mean and unit variance over the width, without gain: the squared error becomes 2 (1 − Pearson).

    A massive dimension rules the variance: all others are shrunk until they hardly count.

    Shapes: ``(…, H) -> (…, H)``.

    >>> layernorm(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """
    return torch.nn.functional.layer_norm(features, features.shape[-1:])


@aliased("rmsnorm", "rms_norm")
def rms(features: Tensor) -> Tensor:
    """Unit mean square over the width: the squared error becomes 2 (1 − cosine), whatever the width.

    A massive dimension rules the length: all others are shrunk until they hardly count.

    Shapes: ``(…, H) -> (…, H)``.

    >>> rms(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """
    return torch.nn.functional.rms_norm(features, features.shape[-1:], eps=1e-6)


def l2(features: Tensor) -> Tensor:
    """Unit length over the width: ``rms`` divided by √H.

    Shapes: ``(…, H) -> (…, H)``.

    Source: Sun, Cheng, Gan, Liu 2019 (PKD), arXiv:1908.09355.

    >>> l2(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return torch.nn.functional.normalize(features, dim=-1, eps=1e-6)


def _sums(rows: Tensor) -> Tensor:
    """Sums of 1, x and x² for every dimension, ``(n, H) -> (3, H)``, in float64: they add up over batches."""
    rows = rows.detach().double()
    return torch.stack([torch.ones_like(rows).sum(0), rows.sum(0), rows.square().sum(0)])


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """``(3, H)`` to ``(H,), (H,)``."""
    counts, totals, squares = sums
    mean = totals / counts
    return mean, (squares / counts - mean.square()).clamp(min=0.0)


class Standardize(Calibrated):
    """(x − μ) / σ with mean and deviation of every dimension of the teacher, measured before training; the same for both sides.

    Every dimension counts alike, massive ones too. Equal rows stay equal.

    Shapes: ``(N, H), (N, H) -> (N, H), (N, H)``. Options: ``floor``: no σ is below this share of the median σ, so that dimensions that
    hardly vary are not blown up.

    >>> normalizer = Standardize(1)
    >>> normalizer.observe(torch.zeros(2, 1), torch.tensor([[1.0], [5.0]]))
    >>> normalizer.conclude()
    >>> normalizer(torch.tensor([[3.0]]), torch.tensor([[7.0]]))
    (tensor([[0.]]), tensor([[2.]]))
    """

    aliases = ("std", "zscore")
    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, *, floor: Annotated[float, Between(0, 1, excluding=(0,))] = 1e-3) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.sums: Tensor | None = None

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        self.sums = _sums(teacher) if self.sums is None else self.sums + _sums(teacher)

    def conclude(self) -> None:
        if self.sums is None:
            raise ValueError("it saw no row")
        mean, variance = _mean_and_variance(self.sums)
        deviation = variance.sqrt()
        lowest = self.floor * deviation.median()
        if not lowest > 0:
            raise ValueError("half of the teacher's dimensions do not vary; allowed: more rows")
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=lowest))
        self.sums = None

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return (student - self.mean) / self.deviation, (teacher - self.mean) / self.deviation


class Whiten(Calibrated):
    """(x − μ) W with W Wᵀ = Σ⁻¹, the teacher's covariance, measured before training; the same for both sides.

    The teacher's dimensions become uncorrelated, each of variance 1. Directions in which the teacher hardly varies are blown up:
    with a small ``shrinkage`` the error is mostly noise. Try 1e-3, 1e-2, 1e-1.

    Shapes: ``(N, H), (N, H) -> (N, H), (N, H)``. Options: ``method``: ``zca``, U Λ^-½ Uᵀ, which changes the features least, or
    ``cholesky``, L⁻ᵀ of Σ = L Lᵀ; they differ by a rotation, which squared errors and cosines do not see. ``shrinkage`` ρ:
    Σ becomes (1 − ρ) Σ + ρ · mean variance · I.

    Source: Kessy, Lewin, Strimmer 2018, arXiv:1512.00809.

    >>> normalizer = Whiten(1, shrinkage=0.0)
    >>> normalizer.observe(torch.zeros(2, 1), torch.tensor([[1.0], [5.0]]))
    >>> normalizer.conclude()
    >>> normalizer(torch.tensor([[3.0]]), torch.tensor([[7.0]]))
    (tensor([[0.]]), tensor([[2.]]))
    """

    aliases = ("zca", "whitening")
    mean: Tensor
    matrix: Tensor

    def __init__(
        self, width: int, *, method: Literal["zca", "cholesky"] = "zca", shrinkage: Annotated[float, Between(0, 1)] = 1e-3
    ) -> None:
        super().__init__()
        self.method, self.shrinkage = method, shrinkage
        self.calibration_rows = max(Calibrated.calibration_rows, 8 * width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))
        self.moments = Moments()

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        self.moments.add(teacher, teacher)

    def conclude(self) -> None:
        width = len(self.mean)
        if self.moments.rows <= width:
            raise ValueError(f"it saw {self.moments.rows} rows of width {width}; allowed: more rows than that")
        covariance = self.moments.covariance()
        identity = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
        covariance = (1.0 - self.shrinkage) * covariance + self.shrinkage * covariance.diagonal().mean() * identity
        values, vectors = torch.linalg.eigh(covariance)
        if not values[0] > values[-1] * torch.finfo(values.dtype).eps * width:
            raise ValueError("the teacher's features do not vary in every direction; allowed: more rows, or more shrinkage")
        if self.method == "zca":
            matrix = vectors / values.sqrt() @ vectors.T
        else:
            matrix = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False).T
        self.mean.copy_(self.moments.means[0])
        self.matrix.copy_(matrix)
        self.moments = Moments()

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return (student - self.mean) @ self.matrix, (teacher - self.mean) @ self.matrix


class BatchNorm(Adaptive):
    """(x − μ) / σ for every dimension and side, with running statistics of the supervised tokens of earlier steps.

    The batch at hand does not enter, unlike in a batch norm layer: rows stay independent, the loss does not depend on how the batch
    was divided, and no gradient goes through μ and σ. Before the first step nothing is known, and both sides are 0: a term that begins
    with the second step. Over the first 1 / momentum steps the statistics are plain averages.

    Shapes: ``(N, H), (N, H) -> (N, H), (N, H)``. Options: ``momentum``: share of the newest step in the running statistics.

    Source: Miles, Mikolajczyk 2024, arXiv:2303.11098; there with the batch's own statistics.

    >>> normalizer = BatchNorm(1)
    >>> rows = torch.tensor([[1.0], [5.0]])
    >>> normalizer(rows, 2 * rows)[0].flatten()
    tensor([0., 0.])
    >>> normalizer.advance(0.1)
    >>> normalizer(rows, 2 * rows)[1].flatten()
    tensor([-1.0000,  1.0000])
    """

    aliases = ("batch_norm", "bn")
    running: Tensor
    steps: Tensor
    pending: Tensor

    def __init__(self, width: int, *, momentum: Annotated[float, Between(0, 1, excluding=(0,))] = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running", torch.zeros(2, 3, width, dtype=torch.float64))  # student, teacher; means of 1, x, x²
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(2, 3, width, dtype=torch.float64), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self.pending += torch.stack([_sums(student), _sums(teacher)])
        return self._normalized(student, self.running[0]), self._normalized(teacher, self.running[1])

    def _normalized(self, rows: Tensor, running: Tensor) -> Tensor:
        mean, variance = _mean_and_variance(running.where(self.steps > 0, 1.0))
        scale = torch.where(self.steps > 0, (variance + BATCHNORM_FLOOR).rsqrt(), 0.0)
        return (rows - mean.to(rows.dtype)) * scale.to(rows.dtype)

    def advance(self, progress: float) -> None:
        seen = self.pending[0, 0, 0] > 0  # the term may have been idle
        share = torch.where(seen, torch.clamp(1.0 / (self.steps + 1.0), min=self.momentum), 0.0)
        self.running.lerp_(self.pending / self.pending[:, :1].clamp(min=1.0), share)
        self.steps += seen


@hookimpl
def distily_normalizers() -> dict[str, object]:
    return {
        "none": none,
        "layernorm": layernorm,
        "rms": rms,
        "l2": l2,
        "standardize": Standardize,
        "whiten": Whiten,
        "batchnorm": BatchNorm,
    }
