"""Likeness of two sets of features by their moments: products of channels, kernel means, correlations of channels.

Blind to which token is which (but for ``neuron_selectivity``): add these to an objective that is not. Both sides need one width,
so a projector stands between, if they differ (again but for ``neuron_selectivity``).

Letters: n rows of a set (one document's tokens), P mapped pairs of layers, H width, Hs and Ht the widths of student and teacher,
k dimensions that are compared; a and b are the rows of student and teacher.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.geometry import SMALLEST, centered, reduced, unit
from distily.objectives import FEATURES, row_set_objective
from distily.schema import Between

MaxRows = Annotated[int, Between(1)]
Dimensions = Annotated[int, Between(1)]


@row_set_objective(
    on=FEATURES,
    aliases=("fsp",),
    stacked=True,
    formula="mean over layers l of ‖a_l' a_{l+1} − b_l' b_{l+1}‖_F² / (n k)²",
    source="Yim, Joo, Bae, Kim 2017, CVPR",
)
def flow(student: Tensor, teacher: Tensor, *, dimensions: Dimensions = 256, max_rows: MaxRows = 1024) -> Tensor:
    """The flow of solution (FSP): how the channels of one mapped layer go with those of the next.

    It needs two mapped layers or more, such as with ``mapper=uniform``. Massive channels rule it: standardise them first.

    Shapes: ``(n, P, H), (n, P, H) -> (n,)``, each entry the set's value. Range [0, ∞); zero where the sides are equal. It does not
    see the order of the tokens. Features c times as large on both sides have c⁴ times the value.

    Options: ``dimensions``: k; wider features pass through a fixed random matrix with orthonormal columns first, since memory
    grows as k². ``max_rows``: rows in a set, drawn by the driver.

    Source: Yim, Joo, Bae, Kim 2017, CVPR ("A Gift from Knowledge Distillation").

    >>> layers = torch.ones(2, 2, 1)
    >>> flow(2 * layers, layers).mean()
    tensor(9.)
    """
    del max_rows  # the driver reads it before it draws the rows
    if student.shape[1] < 2:
        raise ValueError("flow needs two mapped layers or more, such as with mapper=uniform")
    a, b = (_flows(reduced(layers, dimensions)) for layers in (student, teacher))
    return (a - b).square().mean().expand(len(student))


def _flows(layers: Tensor) -> Tensor:
    """``(n, P, k) -> (P − 1, k, k)``: the mean product of each channel of a layer with each of the next."""
    layers = layers.transpose(0, 1)
    return layers[:-1].mT @ layers[1:] / layers.shape[1]


@row_set_objective(
    on=FEATURES,
    aliases=("maximum_mean_discrepancy",),
    formula="mean k(a, a') + mean k(b, b') − 2 mean k(a, b), rows of length 1",
    source="Gretton et al. 2012, JMLR 13",
)
def mmd(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["linear", "polynomial", "gaussian"] = "gaussian",
    max_rows: MaxRows = 512,
) -> Tensor:
    """Squared maximum mean discrepancy: are the directions of both sides drawn from one distribution?

    The biased (V-statistic) estimate, over all pairs, so that it is never below 0.

    Shapes: ``(n, H), (n, H) -> (n,)``, each row's share. Range [0, 4]; zero where the sides are equal, in any order and with rows
    of any length: this is all that ``gaussian`` forgets. ``linear`` compares mean directions alone, ``polynomial`` second moments.

    Options: ``kernel``: ``linear`` ⟨x, y⟩, ``polynomial`` ⟨x, y⟩², ``gaussian`` exp(−‖x − y‖² / 2m²) with m the median distance
    between two of the teacher's rows. ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    Source: Gretton, Borgwardt, Rasch, Schölkopf, Smola 2012, JMLR 13.

    >>> mmd(torch.eye(2), torch.eye(2).flip(0), kernel="linear").mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (unit(rows) for rows in (student, teacher))
    products = [a @ a.T, b @ b.T, a @ b.T]
    if kernel == "polynomial":
        products = [each.square() for each in products]
    if kernel == "gaussian":
        width = _median_off_diagonal(2.0 - 2.0 * products[1]).clamp(min=SMALLEST)
        products = [torch.exp((each - 1.0) / width) for each in products]
    within, target, across = products
    return (within + target - across - across.T).mean(-1)


def _median_off_diagonal(matrix: Tensor) -> Tensor:
    """The median entry beside the diagonal, and 1 where there is none."""
    first, second = torch.triu_indices(len(matrix), len(matrix), offset=1, device=matrix.device)
    return matrix[first, second].median() if len(matrix) > 1 else matrix.new_ones(())


@row_set_objective(
    on=FEATURES,
    aliases=("nst", "neuron_selectivity_transfer"),
    equal_widths=False,
    formula="‖â â'/Hs − b̂ b̂'/Ht‖_F², each channel of length 1 over the tokens",
    source="Huang, Wang 2017, arXiv:1707.01219",
)
def neuron_selectivity(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 512) -> Tensor:
    """Do the channels (neurons) respond to the same tokens? The maximum mean discrepancy of channels, with kernel ⟨x, y⟩².

    Here the samples are the channels, each a vector over the tokens. So the sides may have different widths, and the order of
    the tokens counts, but not that of the channels.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, n times each row's share. Range [0, 2]; zero where both sides have the same channels up
    to order and scale, and for one row alone, as long as no channel is 0 there.

    Options: ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    Source: Huang, Wang 2017 (NST), arXiv:1707.01219.

    >>> neuron_selectivity(torch.eye(2), 3 * torch.eye(2).flip(1)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (unit(rows, dim=0) for rows in (student, teacher))
    return len(a) * (a @ a.T / a.shape[1] - b @ b.T / b.shape[1]).square().sum(-1)


@row_set_objective(
    on=FEATURES,
    aliases=("cov", "correlation"),
    formula="‖R_s − R_t‖_F² / k²,  R the correlations of the channels",
    source="after Sun, Saenko 2016, arXiv:1607.01719",
)
def covariance(
    student: Tensor, teacher: Tensor, *, correlation: bool = True, dimensions: Dimensions = 256, max_rows: MaxRows = 1024
) -> Tensor:
    """Mean squared difference of the channels' correlations, or of their covariances: do the same channels vary together?

    Shapes: ``(n, H), (n, H) -> (n,)``, each entry the set's value. Range [0, 4) (covariances: [0, ∞)); zero where the sides are
    equal up to shift and positive scale of each channel (covariances: up to shift), in any order of the tokens. One row alone has
    value 0. A channel that never changes correlates with none.

    Options: ``correlation``: divide by the standard deviations; without it, massive channels rule. A quarter of that is CORAL.
    ``dimensions``: k; wider features pass through a fixed random matrix with orthonormal columns first, since memory grows as k²:
    then mixtures of channels are compared. ``max_rows``: rows in a set, drawn by the driver.

    Source: after Sun, Saenko 2016 (CORAL, covariances), arXiv:1607.01719.

    >>> covariance(torch.eye(2), 1 + 3 * torch.eye(2)).mean() < 1e-12
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (_second_moments(centered(reduced(rows, dimensions)), correlation) for rows in (student, teacher))
    return (a - b).square().mean().expand(len(student))


def _second_moments(rows: Tensor, correlation: bool) -> Tensor:
    if correlation:
        channels = unit(rows, dim=0)
        return channels.T @ channels
    return rows.T @ rows / max(1, len(rows) - 1)


@row_set_objective(
    on=FEATURES,
    aliases=("ickd", "inter_channel_correlation"),
    formula="‖norm(a' a) − norm(b' b)‖_F² / k, rows of length 1",
    source="Liu et al. 2021, ICCV, arXiv:2202.03680",
)
def channel_correlation(student: Tensor, teacher: Tensor, *, dimensions: Dimensions = 256, max_rows: MaxRows = 1024) -> Tensor:
    """Similarities of each channel with all others, as directions (ICKD): which channels go together in this document?

    Unlike ``covariance`` it does not centre: the mean activation is part of the similarity.

    Shapes: ``(n, H), (n, H) -> (n,)``, each entry the set's value. Range [0, 4]; zero where the sides are equal up to one scale,
    in any order of the tokens.

    Options: ``dimensions``: k; wider features pass through a fixed random matrix with orthonormal columns first, since memory
    grows as k². ``max_rows``: rows in a set, drawn by the driver.

    Source: Liu, Huang, Lin, Xia, Liu, Wang, Zhang 2021 (ICKD), ICCV, arXiv:2202.03680.

    >>> channel_correlation(torch.eye(2), 3 * torch.eye(2)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (unit(rows.T @ rows) for rows in (reduced(student, dimensions), reduced(teacher, dimensions)))
    return (a - b).square().sum(-1).mean().expand(len(student))


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "flow": flow,
        "mmd": mmd,
        "neuron_selectivity": neuron_selectivity,
        "covariance": covariance,
        "channel_correlation": channel_correlation,
    }
