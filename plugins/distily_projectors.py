"""Projectors from the student's width to the teacher's. They train with the student and are left out of the export.

A free projector can absorb the difference that the student should learn, and the student then hardly moves; ``orthogonal``, ``truncate``
and a frozen ``least_squares`` cannot, or less. One projector for all pairs of layers is the term's ``projector_for: all``.

Letters: Hs, Ht the widths of student and teacher, n rows.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from distily import hookimpl
from distily.schema import Between
from distily.state import Calibrated, Moments

NEAR = 0.9
"""Widths at least this close to each other are taken for the same channels."""

Count = Annotated[int, Between(1)]


def identity(student_width: int, teacher_width: int) -> nn.Module:
    """No projection: for equal widths.

    >>> identity(4, 4)(torch.ones(1, 4))
    tensor([[1., 1., 1., 1.]])
    """
    if student_width != teacher_width:
        raise ValueError(f"it needs equal widths, not {student_width} and {teacher_width}")
    return nn.Identity()


def linear(student_width: int, teacher_width: int, *, bias: bool = False) -> nn.Module:
    """A trained linear map; the default where widths differ.

    Starts as the identity, truncated or filled up with zeros, where the widths are within a tenth of each other, otherwise Xavier.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``bias``.

    Source: Romero et al. 2014 (FitNets), arXiv:1412.6550.

    >>> linear(4, 4)(torch.ones(1, 4))
    tensor([[1., 1., 1., 1.]], grad_fn=<MmBackward0>)
    """
    layer = nn.Linear(student_width, teacher_width, bias=bias)
    is_near = min(student_width, teacher_width) >= NEAR * max(student_width, teacher_width)
    nn.init.eye_(layer.weight) if is_near else nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(student_width: int, teacher_width: int, *, expansion: Count = 4) -> nn.Module:
    """A trained map with one hidden layer and GELU. It can absorb still more than ``linear``.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``expansion``, the hidden layer's width in units of Ht; narrow ones lose features.

    >>> mlp(2, 3)(torch.ones(1, 2)).shape
    torch.Size([1, 3])
    """
    hidden = expansion * teacher_width
    return nn.Sequential(nn.Linear(student_width, hidden), nn.GELU(), nn.Linear(hidden, teacher_width))


def orthogonal(student_width: int, teacher_width: int) -> nn.Module:
    """A trained linear map with orthonormal columns (Hs ≤ Ht) or rows (Hs > Ht): it turns the student's features and keeps their
    lengths and angles when Hs ≤ Ht, so that it cannot absorb the difference that the student should learn.

    It stays so by Cayley's map of a skew matrix of the larger width H: one linear system of O(H³) in every forward.

    Shapes: ``(…, Hs) -> (…, Ht)``.

    Source: Miles, Elezi, Deng 2024 (VkD), arXiv:2403.06213.

    >>> weight = orthogonal(2, 4).weight
    >>> torch.allclose(weight.T @ weight, torch.eye(2), atol=1e-6)
    True
    """
    layer = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley")


class Truncate(nn.Module):
    """Student channels and teacher channels by number, without a parameter: for a student made by leaving channels out.

    The narrower side's (of equal ones: the student's) channel i is the other's channel ``keep[i]``. Where the student is the narrower
    one, its projection is 0 in the other channels: under ``mse`` they add a constant, under ``cosine`` a factor for each row, to value
    and gradient.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``keep``, channels of the wider side counted from 0; null: the first ones, which only means
    something if the student was made so.

    >>> Truncate(2, 4, keep=[3, 1])(torch.tensor([[5.0, 7.0]]))
    tensor([[0., 7., 0., 5.]])
    """

    aliases = ("select",)
    kept: Tensor

    def __init__(self, student_width: int, teacher_width: int, *, keep: list[Annotated[int, Between(0)]] | None = None) -> None:
        super().__init__()
        narrow, wide = sorted((student_width, teacher_width))
        chosen = list(range(narrow)) if keep is None else keep
        if len(chosen) != narrow or len(set(chosen)) != narrow or max(chosen) >= wide:
            raise ValueError(f"keep must be {narrow} different channels from 0 to {wide - 1}")
        self.teacher_width = teacher_width
        self.register_buffer("kept", torch.tensor(chosen), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] > self.teacher_width:
            return features.index_select(-1, self.kept)
        return features.new_zeros(*features.shape[:-1], self.teacher_width).index_copy(-1, self.kept, features)


class _Mean(nn.Module):
    """The mean of several projectors."""

    def __init__(self, projectors: list[nn.Module]) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projectors)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([projector(features) for projector in self.projectors]).mean(0)


def ensemble(student_width: int, teacher_width: int, *, k: Count = 3) -> nn.Module:
    """The mean of k linear maps with different beginnings. As a function it is one linear map; only how it trains differs.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``k``, maps.

    Source: Chen et al. 2022, arXiv:2210.15274.

    >>> ensemble(2, 3)(torch.ones(1, 2)).shape
    torch.Size([1, 3])
    """
    maps = [nn.Linear(student_width, teacher_width, bias=False) for _ in range(k)]
    for each in maps:
        nn.init.xavier_uniform_(each.weight)
    return _Mean(list(maps))


class _Fitted(Calibrated):
    """An affine map whose beginning is computed from calibration rows; ``frozen`` keeps it so."""

    def __init__(self, student_width: int, teacher_width: int, frozen: bool) -> None:
        super().__init__()
        self.map = nn.Linear(student_width, teacher_width).requires_grad_(not frozen)
        self.calibration_rows = max(Calibrated.calibration_rows, 8 * max(student_width, teacher_width))
        self.moments = Moments()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.map(features)
        return result

    @torch.no_grad()
    def _begin(self, weight: Tensor, bias: Tensor) -> None:
        self.map.weight.copy_(weight)
        self.map.bias.copy_(bias)
        self.moments = Moments()


class PCA(_Fitted):
    """A trained affine map that begins with the teacher's principal directions: student channel i is the i-th of them.

    y = V x + μ with the first min(Hs, Ht) principal directions V and the mean μ of the teacher's calibration rows; channels of the student
    beyond them begin at 0. No map of this width gives back more of the teacher's variance. For a student that starts
    at random: one copied from the teacher has the teacher's channels already. Massive activations own the first directions.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``frozen``: it does not train.

    Source: Eckart, Young 1936, Psychometrika 1.

    >>> projector = PCA(1, 2)
    >>> teacher = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> projector.observe(torch.zeros(2, 1), teacher)
    >>> projector.conclude()
    >>> projector(torch.tensor([[5.0]])).detach().round()
    tensor([[3., 4.]])
    """

    aliases = ("svd",)

    def __init__(self, student_width: int, teacher_width: int, *, frozen: bool = False) -> None:
        super().__init__(student_width, teacher_width, frozen)

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        self.moments.add(teacher, teacher)

    def conclude(self) -> None:
        directions = torch.linalg.eigh(self.moments.covariance()).eigenvectors.flip(-1)  # the largest first
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * largest.sign()  # the same on every machine
        weight = torch.zeros_like(self.map.weight, dtype=torch.float64)
        count = min(weight.shape)
        weight[:, :count] = directions[:, :count]
        self._begin(weight, self.moments.means[1])


class LeastSquares(_Fitted):
    """An affine map that begins where it explains the teacher best: ridge regression of the teacher's on the student's features.

    W = argmin Σ ‖y − W x − b‖² / n + λ ‖W‖², with λ = ``ridge`` · the mean variance of the student's channels; the gradient of that is
    0 at the beginning. Frozen, it leaves all further progress to the student.

    Shapes: ``(…, Hs) -> (…, Ht)``. Options: ``ridge``, without unit. ``frozen``: it does not train.

    Source: Hoerl, Kennard 1970, Technometrics 12.

    >>> projector = LeastSquares(1, 1, ridge=0.0)
    >>> student = torch.tensor([[0.0], [1.0], [2.0]])
    >>> projector.observe(student, 3 * student + 1)
    >>> projector.conclude()
    >>> projector(torch.tensor([[5.0]])).detach().round()
    tensor([[16.]])
    """

    aliases = ("ols", "ridge")

    def __init__(
        self, student_width: int, teacher_width: int, *, ridge: Annotated[float, Between(0)] = 1e-4, frozen: bool = False
    ) -> None:
        super().__init__(student_width, teacher_width, frozen)
        self.ridge = ridge
        self.own = Moments()

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        self.own.add(student, student)
        self.moments.add(student, teacher)

    def conclude(self) -> None:
        variance = self.own.covariance()
        penalty = self.ridge * variance.diagonal().mean() * torch.eye(len(variance), dtype=variance.dtype, device=variance.device)
        factor, failed = torch.linalg.cholesky_ex(variance + penalty)
        if failed.item():
            raise ValueError("the student's features do not vary in every direction; allowed: more rows, or a ridge above 0")
        weight = torch.cholesky_solve(self.moments.covariance(), factor).T
        student_mean, teacher_mean = self.moments.means
        self._begin(weight, teacher_mean - weight @ student_mean)
        self.own = Moments()


@hookimpl
def distily_projectors() -> dict[str, object]:
    return {
        "identity": identity,
        "linear": linear,
        "mlp": mlp,
        "orthogonal": orthogonal,
        "truncate": Truncate,
        "ensemble": ensemble,
        "pca": PCA,
        "least_squares": LeastSquares,
    }
