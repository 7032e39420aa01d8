"""Likeness of two sets of features by the relations of the tokens to each other: similarities, distances, angles.

None needs a projector: the sides may have different widths. The order of the tokens counts; rotations of a side do not.

Letters: n rows of a set (one document's tokens), Hs and Ht the widths of student and teacher; a and b are their rows, G = a a'.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.geometry import SMALLEST, unit
from distily.objectives import FEATURES, row_set_objective
from distily.schema import Between

MaxRows = Annotated[int, Between(1)]


@row_set_objective(
    on=FEATURES,
    aliases=("token_gram",),
    equal_widths=False,
    formula="mean_ij (G_s/Hs − G_t/Ht)²",
    source="TextBrewer's variant of Huang, Wang 2017, arXiv:1707.01219",
)
def gram_token(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 512) -> Tensor:
    """Mean squared difference of the plain similarities between tokens, each divided by its width. It sees the features' scale.

    TextBrewer calls it nst and mmd; the published losses of those names are ``neuron_selectivity`` and ``mmd``.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's mean. Range [0, ∞); zero where the sides are equal up to rotation (unequal
    widths: and up to the factor √(Hs/Ht)). One row alone compares the mean squares of the two.

    Options: ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    >>> gram_token(torch.eye(2), torch.eye(2).flip(1)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (rows @ rows.T / rows.shape[1] for rows in (student, teacher))
    return (a - b).square().mean(-1)


@row_set_objective(
    on=FEATURES,
    aliases=("sp", "spkd"),
    equal_widths=False,
    formula="‖norm(G_s) − norm(G_t)‖_F² / n², rows of length 1",
    source="Tung, Mori 2019, arXiv:1907.09682",
)
def similarity_preserving(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 512) -> Tensor:
    """Similarities of each token with all others, as directions: what is relatively close to it?

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's mean. Range [0, 4/n]; zero where the sides are equal up to rotation and scale,
    and for one row alone. It shrinks as documents grow, by the published 1/n².

    Options: ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    Source: Tung, Mori 2019, arXiv:1907.09682. The rows' norm is L2; torchdistill's loss of this name takes L1.

    >>> similarity_preserving(torch.eye(2), 3 * torch.eye(2).flip(1)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (unit(rows @ rows.T) for rows in (student, teacher))
    return (a - b).square().mean(-1)


@row_set_objective(
    on=FEATURES,
    aliases=("cc", "cckd"),
    equal_widths=False,
    formula="‖K_s − K_t‖_F² / n²;  K_ij = exp(−γ ‖u_i − u_j‖²) or ⟨u_i, u_j⟩, u of length 1",
    source="Peng et al. 2019, arXiv:1904.01802",
)
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["gaussian", "bilinear"] = "gaussian",
    gamma: Annotated[float, Between(0, 100, excluding=(0,))] = 0.4,
    max_rows: MaxRows = 512,
) -> Tensor:
    """Mean squared difference of the cosine similarities between tokens, seen through a kernel.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's mean. Range [0, 4] (``gaussian``: [0, 1]); zero where the sides are equal up
    to rotation and the length of each row, and for one row alone.

    Options: ``kernel``: ``bilinear`` is the cosine itself, ``gaussian`` stresses close tokens; the paper takes the first terms of
    its Taylor series, here it is whole. ``gamma``: γ of the Gaussian, per squared distance of rows of length 1. ``max_rows``: rows
    in a set, drawn by the driver; memory grows as n².

    Source: Peng et al. 2019, arXiv:1904.01802.

    >>> correlation_congruence(torch.eye(2), 3 * torch.eye(2).flip(1)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (unit(rows) for rows in (student, teacher))
    kernels = [rows @ rows.T for rows in (a, b)]
    if kernel == "gaussian":
        kernels = [torch.exp(2.0 * gamma * (cosines - 1.0)) for cosines in kernels]
    return (kernels[0] - kernels[1]).square().mean(-1)


@row_set_objective(
    on=FEATURES,
    aliases=("pkt",),
    equal_widths=False,
    formula="mean_i Σ_j q_ij log((q_ij + ε) / (p_ij + ε));  p, q ∝ (1 + cosine)/2 in each row",
    source="Passalis, Tefas 2018, arXiv:1803.10837",
)
def probabilistic_transfer(student: Tensor, teacher: Tensor, *, diagonal: bool = False, max_rows: MaxRows = 512) -> Tensor:
    """KL divergence between how teacher (q) and student (p) choose a neighbour of each token, by cosine.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's own. Range [0, ∞), in nats; zero where the sides are equal up to rotation
    and the length of each row, and for one or two rows. ε = 1e-7.

    Options: ``diagonal``: whether a token is its own neighbour, as in the reference code, which also divides by n² in place of n.
    ``max_rows``: rows in a set, drawn by the driver; memory grows as n².

    Source: Passalis, Tefas 2018 (PKT), arXiv:1803.10837.

    >>> probabilistic_transfer(torch.eye(3), 3 * torch.eye(3).flip(1)).mean()
    tensor(0.)
    """
    del max_rows  # the driver reads it before it draws the rows
    p, q = (_neighbors(unit(rows), diagonal) for rows in (student, teacher))
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).sum(-1)


def _neighbors(rows: Tensor, diagonal: bool) -> Tensor:
    """For each row of length 1 a distribution over the rows, by cosine."""
    nearness = (rows @ rows.T + 1.0) / 2.0
    if not diagonal:
        nearness = nearness * (1.0 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return nearness / nearness.sum(-1, keepdim=True).clamp(min=SMALLEST)


@row_set_objective(
    on=FEATURES,
    aliases=("rkd_d", "rkd_distance"),
    equal_widths=False,
    formula="mean_ij h(‖a_i − a_j‖/μ_a − ‖b_i − b_j‖/μ_b),  μ the mean distance that is not 0, h smooth L1",
    source="Park, Kim, Lu, Cho 2019, arXiv:1904.05068",
)
def relational_distance(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 128) -> Tensor:
    """Distances between tokens, in units of their mean (RKD).

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's mean over all n rows, itself included. Range [0, ∞); zero where the sides are
    equal up to rotation, shift and scale, and for one or two rows. The mean distance has its gradient, too.

    Options: ``max_rows``: rows in a set, drawn by the driver; time and the backward's memory grow as n² H.

    Source: Park, Kim, Lu, Cho 2019, arXiv:1904.05068; there with weight 25 beside the angles' 50, for images.

    >>> relational_distance(torch.eye(3), 3 * torch.eye(3).flip(1)).mean() < 1e-9
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (_relative_distances(rows) for rows in (student, teacher))
    return torch.nn.functional.smooth_l1_loss(a, b, reduction="none").mean(-1)


def _relative_distances(rows: Tensor) -> Tensor:
    """Distances by differences, since products cancel for close rows; at distance 0 the gradient is 0."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=SMALLEST)


@row_set_objective(
    on=FEATURES,
    aliases=("rkd_a", "rkd_angle"),
    equal_widths=False,
    formula="mean_ijk h(cos ∠_a(j, i, k) − cos ∠_b(j, i, k)),  h smooth L1",
    source="Park, Kim, Lu, Cho 2019, arXiv:1904.05068",
)
def relational_angle(student: Tensor, teacher: Tensor, *, max_rows: MaxRows = 64) -> Tensor:
    """The angles of all triangles of tokens (RKD).

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each row's mean over the triangles of which it is a corner. Range [0, 1.5]; zero where
    the sides are equal up to rotation, shift and scale, and for one or two rows.

    Options: ``max_rows``: rows in a set, drawn by the driver; memory grows as n² (n + H).

    Source: Park, Kim, Lu, Cho 2019, arXiv:1904.05068; there with weight 50 beside the distances' 25, for images.

    >>> relational_angle(torch.eye(3), 3 * torch.eye(3).flip(1)).mean() < 1e-9
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    sides = (unit(rows - rows[:, None]) for rows in (student, teacher))
    a, b = (towards @ towards.mT for towards in sides)
    return torch.nn.functional.smooth_l1_loss(a, b, reduction="none").mean((1, 2))


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "gram_token": gram_token,
        "similarity_preserving": similarity_preserving,
        "correlation_congruence": correlation_congruence,
        "probabilistic_transfer": probabilistic_transfer,
        "relational_distance": relational_distance,
        "relational_angle": relational_angle,
    }
