"""Mutual information between the features of student and teacher, from one document's tokens.

Letters: n rows of a set, Hs and Ht the widths of student and teacher, k dimensions that are compared; a and b are their rows.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from distily import hookimpl
from distily.geometry import centered, reduced, unit
from distily.objectives import FEATURES, row_set_objective
from distily.schema import Between


def contrast(scores: Tensor) -> Tensor:
    """InfoNCE: −log of the share of each row's own column, ``(n, n) -> (n,)``; log n less its mean bounds the information."""
    return scores.logsumexp(1) - scores.diagonal()


@row_set_objective(
    on=FEATURES,
    aliases=("mi", "infonce", "info_nce", "crd", "contrastive"),
    zero_at_equality=False,
    equal_widths=False,
    formula="−log exp(⟨u_i, v_i⟩/τ) / Σ_j exp(⟨u_i, v_j⟩/τ),  u = W_s a, v = W_t b of length 1",
    source="van den Oord, Li, Vinyals 2018, arXiv:1807.03748; Tian, Krishnan, Isola 2020, arXiv:1910.10699",
)
class MutualInformation(nn.Module):
    """A bound on the mutual information of the features (InfoNCE): can a token of the student find its own among the teacher's?

    The other tokens of the same document are the negatives. I(a; b) ≥ log n − value, so a document of n tokens shows at most
    log n nats; longer documents are harder and have larger values.

    Shapes: ``(n, Hs), (n, Ht), input_ids (n,) -> (n,)``. Range [0, 2/τ + log n), in nats; one row alone has value 0. With equal
    and orthonormal u = v the value is log(1 + (n−1) exp(−1/τ)), not 0. Memory grows as n².

    Options:
        dimensions: k, the width of the two linear heads.
        temperature: τ; the heads' rows have length 1, so it sets how sharp the choice is.
        symmetric: the mean of both directions, student to teacher and teacher to student.
        exclude_same_token: rows of the same input token are no negatives of each other; near the embedding they hardly differ.
        teacher_head: ``trained``, as published, or ``frozen`` as drawn, which cannot forget what is hard to match.
        max_rows: rows in a set, drawn by the driver.

    The published memory bank of negatives is not offered: it would tie the value to earlier batches. Source: van den Oord, Li,
    Vinyals 2018 (InfoNCE), arXiv:1807.03748; Tian, Krishnan, Isola 2020 (CRD), arXiv:1910.10699.

    >>> objective = MutualInformation(4, 4, dimensions=4)
    >>> _ = [nn.init.eye_(head.weight) for head in (objective.student_head, objective.teacher_head)]
    >>> tokens = torch.eye(4)
    >>> objective(tokens, tokens, input_ids=torch.arange(4)).mean()
    tensor(0.0001, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        dimensions: Annotated[int, Between(1)] = 256,
        temperature: Annotated[float, Between(0, 100, excluding=(0,))] = 0.1,
        symmetric: bool = True,
        exclude_same_token: bool = False,
        teacher_head: Literal["trained", "frozen"] = "trained",
        max_rows: Annotated[int, Between(1)] = 1024,
    ) -> None:
        super().__init__()
        self.student_head = nn.Linear(student_width, dimensions, bias=False)
        self.teacher_head = nn.Linear(teacher_width, dimensions, bias=False)
        self.teacher_head.requires_grad_(teacher_head == "trained")
        self.temperature = temperature
        self.symmetric = symmetric
        self.exclude_same_token = exclude_same_token

    def forward(self, student: Tensor, teacher: Tensor, *, input_ids: Tensor) -> Tensor:
        scores = unit(self.student_head(student)) @ unit(self.teacher_head(teacher)).T / self.temperature
        if self.exclude_same_token:
            same = input_ids[:, None] == input_ids
            itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
            scores = scores.masked_fill(same & ~itself, -torch.inf)
        return (contrast(scores) + contrast(scores.T)) / 2.0 if self.symmetric else contrast(scores)


def _log_determinant(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix; a failed factorisation would show as NaN, without the host waiting to ask."""
    return 2.0 * torch.linalg.cholesky_ex(matrix).L.diagonal().log().sum()


def _standard(rows: Tensor) -> Tensor:
    """Centred and scaled, so that ``rows.T @ rows`` is a covariance with mean variance 1."""
    return unit(centered(rows), dim=(0, 1)) * math.sqrt(rows.shape[1])


@row_set_objective(
    on=FEATURES,
    aliases=("mi_gauss",),
    zero_at_equality=False,
    equal_widths=False,
    formula="−Î = ½ Σ_k log(1 − r_k²),  r_k the canonical correlations",
    source="Gelfand, Yaglom 1957; Hotelling 1936",
)
def gaussian_information(
    student: Tensor,
    teacher: Tensor,
    *,
    dimensions: Annotated[int, Between(1)] = 16,
    ridge: Annotated[float, Between(0, 1, excluding=(0,))] = 1e-3,
    max_rows: Annotated[int, Between(1)] = 1024,
) -> Tensor:
    """Minus the mutual information that the features would have if they were jointly Gaussian. Exploratory.

    ½ (log det Σ_ab − log det Σ_a − log det Σ_b), from the covariances of one document. It needs several times 2k rows:
    with fewer, chance correlations look like information.

    Shapes: ``(n, Hs), (n, Ht) -> (n,)``, each entry the set's value. Range (−∞, 0], in nats; 0 where the sides are uncorrelated
    and for one row alone. At equal features of one dimension it is ½ log(1 − 1/(1 + ridge)²), the lowest value; nothing else
    happens there. Invariant to shift and scale and, up to the ridge, to every invertible linear map of a side.

    Options: ``dimensions``: k; wider features pass through a fixed random matrix with orthonormal columns first. ``ridge``: added
    to the covariances, as a share of their mean variance. ``max_rows``: rows in a set, drawn by the driver.

    Source: Gelfand, Yaglom 1957; the canonical correlations are Hotelling's, 1936.

    >>> sides = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    >>> gaussian_information(*sides).mean().abs() < 1e-6  # uncorrelated
    tensor(True)
    """
    del max_rows  # the driver reads it before it draws the rows
    a, b = (_standard(reduced(rows, dimensions)) for rows in (student, teacher))
    joint = torch.cat((a, b), dim=1)
    covariance = joint.T @ joint + ridge * torch.eye(joint.shape[1], dtype=joint.dtype, device=joint.device)
    k = a.shape[1]
    value = _log_determinant(covariance) - _log_determinant(covariance[:k, :k]) - _log_determinant(covariance[k:, k:])
    return (value / 2.0).expand(len(student))


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"mutual_information": MutualInformation, "gaussian_information": gaussian_information}
