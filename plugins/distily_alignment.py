"""Likeness of two sets of features as spaces: centred, and blind to rotation, shift and scale.

None needs a projector: the sides may have different widths. The order of the tokens counts.

Letters: n rows of a set (one document's tokens), Hs and Ht the widths of student and teacher; a and b are their rows, â and b̂ the
same less their mean and divided by their Frobenius norm.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from distily import hookimpl
from distily.geometry import SMALLEST, centered, unit
from distily.objectives import FEATURES, row_set_objective
from distily.schema import Between
from distily.similarity import SMALLEST_SET, linear_cka

MaxRows = Annotated[int, Between(1)]


def _nothing(student: Tensor) -> Tensor:
    """The value 0, with gradient 0, of a set that is too small to say anything: ``(n, H) -> (n,)``."""
    return student.sum(-1) * 0.0


def _entire_unit(rows: Tensor) -> Tensor:
    """Centred, and of length 1 over all entries."""
    return unit(centered(rows), dim=(0, 1))


@row_set_objective(
    on=FEATURES,
    aliases=("linear_cka", "centered_kernel_alignment"),
    equal_widths=False,
    formula="1 − HSIC(a, b) / √(HSIC(a, a) HSIC(b, b))",
    source="Kornblith, Norouzi, Lee, Hinton 2019, arXiv:1905.00414; Song et al. 2012, JMLR 13",
)
def cka(student: Tensor, teacher: Tensor, *, debiased: bool = True, max_rows: MaxRows = 1024) -> Tensor:
    """Linear centred kernel alignment: do the same pairs of tokens lie close together on both sides?

    It needs no projector for a narrower student. Directions of large variance rule it: standardise the channels first where a few
    are massive. CKA = 1 does not mean that single features correspond.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each entry the set's value. Range [0, 2] debiased, else [0, 1]; zero where the sides are
    equal up to rotation, shift and scale. Fewer than 4 rows (biased: 2) have value 0. Where a side's rows are all alike,
    or debiased all at one distance from each other, nothing can be aligned: value 1, gradient 0.

    Options: ``debiased``: the unbiased estimate of HSIC. Without it features that have nothing in common seem alike as soon as
    they are as wide as the document is long: Gaussian noise with n = H = 256 has 1 − 0.50. ``max_rows``: rows in a set, drawn by
    the driver; memory grows as n².

    Source: Kornblith, Norouzi, Lee, Hinton 2019, arXiv:1905.00414; unbiased HSIC: Song et al. 2012, JMLR 13. As a loss between
    unequal widths: Dasgupta, Cohn 2025 (ICLR).

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 5.0], [2.0, 2.0]])
    >>> cka(rows, 3 * rows.flip(1) + 1).mean().abs() < 1e-6  # rotated, scaled, shifted
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    if len(student) < (SMALLEST_SET if debiased else 2):
        return _nothing(student)
    return (1.0 - linear_cka(student, teacher, unbiased=debiased)).expand(len(student))


def _whitened(rows: Tensor, most: int, variance: float) -> tuple[Tensor, Tensor]:
    """The rows in their main directions, as orthonormal columns ``(n, k)``, and how many directions those are: at most ``most``.

    The directions, held constant, are the fewest that explain ``variance``; columns beyond them are 0. The whitening is not held
    constant, and its gradient is smooth, unlike that of the directions, which has poles where two of them are equally long.
    """
    _, lengths, directions = torch.linalg.svd(rows.detach(), full_matrices=False)
    squares = lengths.square()
    exist = squares > torch.finfo(rows.dtype).eps * squares[0]  # the others are rounding
    used = (exist & (squares.cumsum(0) - squares < variance * squares.sum()))[:most]
    turned = rows @ (directions[:most].T * (used / lengths[:most].clamp(min=SMALLEST)))
    gram = turned.T @ turned + torch.diag((~used).to(rows.dtype))
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, turned.T, upper=False).T, used.sum()


def _canonical(student: Tensor, teacher: Tensor, dimensions: int, variance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical correlations in falling order, the teacher's variates ``(n, k)`` and which of the k exist."""
    most = min(dimensions, len(student) // 4)
    (a, mine), (b, theirs) = (_whitened(centered(rows), most, variance) for rows in (student, teacher))
    cross = a.T @ b
    left, _, right = torch.linalg.svd(cross.detach(), full_matrices=False)
    exist = torch.arange(len(right), device=cross.device) < torch.minimum(mine, theirs)
    return (left * (cross @ right.T)).sum(0) * exist, b @ right.T, exist


@row_set_objective(
    on=FEATURES,
    aliases=("svcca", "canonical_correlation"),
    waits=True,
    equal_widths=False,
    surrogate_gradient=True,
    formula="1 − mean_k r_k,  r the singular values of Q_a' Q_b",
    source="Raghu, Gilmer, Yosinski, Sohl-Dickstein 2017, arXiv:1706.05806",
)
def cca(
    student: Tensor,
    teacher: Tensor,
    *,
    variance: Annotated[float, Between(0, 1, excluding=(0,))] = 0.99,
    dimensions: Annotated[int, Between(1)] = 64,
    max_rows: MaxRows = 1024,
) -> Tensor:
    """Canonical correlations of the features' main directions (SVCCA): do both sides span the same space? A diagnostic.

    Seldom a good loss: an invertible map of a side costs nothing. On a GPU its singular value decompositions make the host wait.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each entry the set's value. Range [0, 1]; zero where one side's directions are an
    invertible linear map of the other's. At most n/4 directions are compared, since n rows in n dimensions always correlate
    perfectly; fewer than 4 rows have value 0. The gradient holds the chosen directions constant; it is exact where none was
    left out.

    Options: ``variance``: the share of each side's variance that the directions have to explain. ``dimensions``: at most so many
    directions. ``max_rows``: rows in a set, drawn by the driver.

    Source: Raghu, Gilmer, Yosinski, Sohl-Dickstein 2017 (SVCCA), arXiv:1706.05806.

    >>> rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> invertible = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    >>> cca(rows, rows @ invertible, variance=1.0).mean().abs() < 1e-5
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    if len(student) < 4:
        return _nothing(student)
    correlations, _, exist = _canonical(student, teacher, dimensions, variance)
    return (1.0 - correlations.sum() / exist.sum().clamp(min=1)).expand(len(student))


@row_set_objective(
    on=FEATURES,
    aliases=("pwcca",),
    waits=True,
    equal_widths=False,
    surrogate_gradient=True,
    formula="1 − Σ_k w_k r_k,  w_k ∝ Σ_j |⟨v_k, b_j⟩|",
    source="Morcos, Raghu, Bengio 2018, arXiv:1806.05759",
)
def projection_weighted_cca(
    student: Tensor,
    teacher: Tensor,
    *,
    variance: Annotated[float, Between(0, 1, excluding=(0,))] = 0.99,
    dimensions: Annotated[int, Between(1)] = 64,
    max_rows: MaxRows = 1024,
) -> Tensor:
    """Canonical correlations weighted by how much of the teacher's features they carry (PWCCA). A diagnostic.

    As ``cca``, but noise directions count little: v_k is the teacher's k-th canonical variate, b_j its j-th channel.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each entry the set's value. Range [0, 1]; zero as ``cca``, and the same small sets. The
    gradient also holds the weights constant.

    Options: those of ``cca``.

    Source: Morcos, Raghu, Bengio 2018, arXiv:1806.05759.

    >>> rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> projection_weighted_cca(rows, rows.flip(1), variance=1.0).mean().abs() < 1e-5
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    if len(student) < 4:
        return _nothing(student)
    correlations, variates, exist = _canonical(student, teacher, dimensions, variance)
    weights = (variates.detach().T @ centered(teacher.detach())).abs().sum(1) * exist
    weights = weights / weights.sum().clamp(min=SMALLEST)
    return (1.0 - (weights * correlations).sum()).expand(len(student))


def _polar(matrix: Tensor) -> Tensor:
    """U V' of the singular value decomposition U S V', by matrix products and QR alone, for which the host need not wait.

    Dynamically weighted Halley iteration (Nakatsukasa, Bai, Gygi 2010) for singular values down to the type's precision.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return _polar(matrix.T).T
    factor = unit(matrix, dim=(0, 1))
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    smallest = torch.finfo(matrix.dtype).eps
    for _ in range(6):  # enough from 1e-16
        square = smallest**2
        root = math.sqrt(1.0 + (4.0 * (1.0 - square) / square**2) ** (1.0 / 3.0))
        x = root + math.sqrt(8.0 - 4.0 * (root**2 - 1.0) + 8.0 * (2.0 - square) / (square * root)) / 2.0
        y = (x - 1.0) ** 2 / 4.0
        z = x + y - 1.0
        orthonormal = torch.linalg.qr(torch.cat((math.sqrt(z) * factor, identity))).Q
        upper, lower = orthonormal.split([len(matrix), len(identity)])
        factor = y / z * factor + (x - y / z) / math.sqrt(z) * upper @ lower.T
        smallest = min(1.0, smallest * (x + y * square) / (1.0 + z * square))
    return factor


@row_set_objective(
    on=FEATURES,
    aliases=("orthogonal_procrustes",),
    equal_widths=False,
    formula="min ‖â Q − b̂‖_F² over Q'Q = 1;  â, b̂ centred, of Frobenius norm 1",
    source="Schönemann 1966; Williams, Kunz, Kornblith, Linderman 2021, arXiv:2110.14739",
)
def procrustes(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 512) -> Tensor:
    """The squared distance that is left after the best rotation: the same shape, in whatever basis?

    Unlike ``cka`` it sees directions of small variance, too. The narrower side counts as padded with zeros.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, n times each row's share. Range [0, 2]: 2 less twice the sum of the singular values of
    â' b̂; zero where the sides are equal up to rotation, shift and scale, and for one row alone. The gradient is exact: the best
    rotation is where its own derivative vanishes.

    Options: ``max_rows``: rows in a set, drawn by the driver; time grows as min(n, H)³.

    Source: Schönemann 1966; Williams, Kunz, Kornblith, Linderman 2021, arXiv:2110.14739.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> procrustes(rows, 3 * rows.flip(1) + 1).mean().abs() < 1e-6  # rotated, scaled, shifted
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (_entire_unit(rows) for rows in (student, teacher))
    spans = [torch.linalg.qr(rows.detach().T).Q for rows in (a, b)]
    first, second = (rows @ span for rows, span in zip((a, b), spans, strict=True))
    aligned = (first @ _polar(first.detach().T @ second.detach()) * second).sum(-1)
    return len(a) * (a.square().sum(-1) + b.square().sum(-1) - 2.0 * aligned)


@row_set_objective(
    on=FEATURES,
    aliases=("feature_gram",),
    equal_widths=False,
    formula="‖â â' − b̂ b̂'‖_F²;  â, b̂ centred, of Frobenius norm 1",
    source="the numerator of kernel alignment as a distance",
)
def gram(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 512) -> Tensor:
    """Squared difference of the centred similarities between tokens. Keeps what ``cka`` forgets: how the variance is spread.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, n times each row's share. Range [0, 2]; zero where the sides are equal up to rotation,
    shift and scale, and for one row alone.

    Options: ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> gram(rows, 3 * rows.flip(1) + 1).mean().abs() < 1e-6  # rotated, scaled, shifted
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (_entire_unit(rows) for rows in (student, teacher))
    return len(a) * (a @ a.T - b @ b.T).square().sum(-1)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "cka": cka,
        "cca": cca,
        "projection_weighted_cca": projection_weighted_cca,
        "procrustes": procrustes,
        "gram": gram,
    }
