"""How alike two representations of the same tokens are: the Hilbert-Schmidt independence criterion (HSIC) of the linear kernel, and CKA.

Letters: n rows, H widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distily.geometry import centered, unit

SMALLEST_SET = 4
"""Rows below which the unbiased estimator says nothing: with three rows, every kernel is 0 after centring."""


def linear_hsic(first: Tensor, second: Tensor, *, unbiased: bool = True) -> Tensor:
    """HSIC of two sets of rows under the linear kernel: ``(n, H1), (n, H2) -> ()``.

    ``unbiased``: the estimator without the kernels' diagonals, whose mean is 0 for independent rows (Song et al. 2012, JMLR 13;
    n ≥ 4). Otherwise ‖cov‖² of Gretton et al. 2005, which for independent rows grows with
    H / n. Either way the cost is the smaller of n·H1·H2 with H1·H2 of memory and n²·(H1 + H2) with n².
    """
    rows = first.shape[0]
    first, second = first - first.mean(0), second - second.mean(0)
    aligned = _alignment(first, second)
    if not unbiased:
        return aligned / (rows - 1) ** 2
    # Centred rows turn each row sum of a kernel without its diagonal into −|x|², so no kernel is needed for the other two sums.
    first_norms, second_norms = first.square().sum(-1), second.square().sum(-1)
    diagonal = first_norms @ second_norms * rows / (rows - 2)
    means = first_norms.sum() * second_norms.sum() / ((rows - 1) * (rows - 2))
    return (aligned - diagonal + means) / (rows * (rows - 3))


def linear_cka(first: Tensor, second: Tensor, *, unbiased: bool = True) -> Tensor:
    """Centred kernel alignment with the linear kernel: ``(n, H1), (n, H2) -> ()``.

    In [0, 1], with ``unbiased`` in [−1, 1]; 1 for rows that are equal up to rotation, scale and shift. 0, without gradient, where a side
    says nothing: too few rows, all of them equal, or (``unbiased``) all at one distance from each other. By kernels, n² of memory: in
    float32 a token of a thousand times the others' length leaves the value right, which the sums of ``linear_hsic`` would not.
    """
    if first.shape[0] < (SMALLEST_SET if unbiased else 2):
        return (first.sum() + second.sum()) * 0.0
    rounding = 16.0 * torch.finfo(first.dtype).eps
    kernels = []
    for rows in (first, second):
        rows = unit(centered(rows), dim=(0, 1))
        kernel = _hollow_centered(rows @ rows.T) if unbiased else rows @ rows.T
        kernels.append(unit(torch.where(torch.linalg.matrix_norm(kernel) > rounding, kernel, 0.0), dim=(0, 1)))
    return (kernels[0] * kernels[1]).sum()


def _hollow_centered(kernel: Tensor) -> Tensor:
    """The unbiased centring (U-centring) of a kernel whose diagonal is left out."""
    n = kernel.shape[0]
    others = 1.0 - torch.eye(n, dtype=kernel.dtype, device=kernel.device)
    hollow = kernel * others
    sums = hollow.sum(0)
    return (hollow - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))) * others


def _alignment(first: Tensor, second: Tensor) -> Tensor:
    """‖first' second‖², the inner product of the two kernels, in the cheaper of its two forms."""
    if first.shape[0] < min(first.shape[1], second.shape[1]):
        return ((first @ first.T) * (second @ second.T)).sum()
    return (first.T @ second).square().sum()
