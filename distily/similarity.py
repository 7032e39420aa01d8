"""How alike two representations of the same tokens are: the Hilbert-Schmidt independence criterion (HSIC) of the linear kernel, and CKA.

Letters: n rows, H widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plugin's import stays instant
    from torch import Tensor

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
    says nothing: too few rows, all of them equal, or (``unbiased``) all at one distance from each other.
    """
    import torch

    rows = first.shape[0]
    if rows < (SMALLEST_SET if unbiased else 2):
        return (first.sum() + second.sum()) * 0.0
    first, second = _unit_scale(first), _unit_scale(second)
    own = torch.stack([linear_hsic(side, side, unbiased=unbiased) for side in (first, second)])
    measurable = (own > 64.0 * torch.finfo(own.dtype).eps).all()  # rows have a mean squared length of 1: less is rounding
    ratio = linear_hsic(first, second, unbiased=unbiased) / torch.where(measurable, own, 1.0).prod().sqrt()
    return torch.where(measurable, ratio, 0.0)


def _alignment(first: Tensor, second: Tensor) -> Tensor:
    """‖first' second‖², the inner product of the two kernels, in the cheaper of its two forms."""
    if first.shape[0] < min(first.shape[1], second.shape[1]):
        return ((first @ first.T) * (second @ second.T)).sum()
    return (first.T @ second).square().sum()


def _unit_scale(rows: Tensor) -> Tensor:
    """The rows around 0 with a mean squared length of 1: products of products of large activations stay in range."""
    centred = rows - rows.mean(0)
    scale = centred.detach().square().sum(-1).mean().sqrt()
    return centred / scale.where(scale > 0, 1.0)
