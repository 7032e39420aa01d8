"""Distances between features of student and teacher, row by row.

Letters: N supervised tokens, H width after projection, Hs and Ht the widths of student and teacher; a and b are their rows.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from distily import hookimpl
from distily.geometry import unit
from distily.objectives import FEATURES, token_objective
from distily.schema import Between


@token_objective(
    on=FEATURES,
    aliases=("hidden_mse", "fitnets"),
    formula="‖a − b‖² / H",
    source="Romero et al. 2015, arXiv:1412.6550",
)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the width. In decoders a few massive dimensions rule it: prefer ``normalizer=layernorm``.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, ∞); zero where the rows are equal. Gradient: 2 (a − b) / H.
    After ``normalizer=layernorm`` it is 2 (1 − Pearson correlation).

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550.

    >>> mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    return (student - teacher).square().mean(-1)


@token_objective(
    on=FEATURES,
    aliases=("nmse", "pkd"),
    formula="‖a/‖a‖ − b/‖b‖‖²  or  ‖a − b‖² / ‖b‖²",
    source="Sun, Cheng, Gan, Liu 2019, arXiv:1908.09355",
)
def normalized_mse(student: Tensor, teacher: Tensor, *, variant: Literal["l2", "relative"] = "l2") -> Tensor:
    """Squared distance without the scale of the features: between directions, or as a share of the teacher's own length.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, 4] for ``l2``, [0, ∞) for ``relative``; zero where the rows are equal
    (``l2``: where they point the same way).

    Options: ``variant``: ``l2`` gives both rows length 1, so that the value is 2 (1 − cosine); ``relative`` divides by the
    teacher's squared length and sees the student's. A row of length 0 stays 0 in ``l2``; where the teacher's row has length 0,
    ``relative`` is 0.

    Source: Sun, Cheng, Gan, Liu 2019 (PKD, ``l2``), arXiv:1908.09355.

    >>> normalized_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([2.])
    >>> normalized_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]]), variant="relative")
    tensor([0.2500])
    """
    if variant == "l2":
        return (unit(student) - unit(teacher)).square().sum(-1)
    length = teacher.square().sum(-1)
    tiny = torch.finfo(length.dtype).tiny
    return torch.where(length > tiny, (student - teacher).square().sum(-1) / length.clamp(min=tiny), 0.0)


@token_objective(
    on=FEATURES,
    aliases=("cos", "cosine_distance"),
    formula="1 − ⟨a, b⟩ / (‖a‖ ‖b‖)",
    source="Sanh, Debut, Chaumond, Wolf 2019, arXiv:1910.01108",
)
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance: compares directions and ignores lengths, so massive activations do not rule it.

    The first choice among the losses on features of decoders.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, 2]; zero where the rows point the same way. The gradient stands at right angles
    to a. A zero row has distance 1 and gradient 0.

    Source: Sanh, Debut, Chaumond, Wolf 2019 (DistilBERT), arXiv:1910.01108.

    >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.])
    """
    return 1.0 - (unit(student) * unit(teacher)).sum(-1)


@token_objective(
    on=FEATURES,
    aliases=("mae", "hidden_l1"),
    formula="Σ |a − b| / H",
    source="mean absolute error",
)
def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference over the width: a massive dimension counts by its size, not by its square.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, ∞); zero where the rows are equal. Gradient: sign(a − b) / H, and 0 at equality.

    >>> l1(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([1.])
    """
    return (student - teacher).abs().mean(-1)


@token_objective(
    on=FEATURES,
    aliases=("huber",),
    formula="Σ h(a − b) / H,  h(d) = d² / 2δ where |d| < δ, else |d| − δ/2",
    source="Huber 1964; Girshick 2015, arXiv:1504.08083",
)
def smooth_l1(student: Tensor, teacher: Tensor, *, delta: Annotated[float, Between(0, 1e6, excluding=(0,))] = 1.0) -> Tensor:
    """Quadratic for small differences, absolute for large ones; the loss of the VKD recipe.

    VKD is made of parts: ``smooth_l1:projector=orthogonal,normalizer=layernorm,normalized=teacher``.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, ∞); zero where the rows are equal. Half of ``mse`` while every |a − b| < δ = 1.

    Options: ``delta``, above 0, in the features' own unit: where the parabola becomes a line. torch's ``smooth_l1_loss`` calls it
    beta; δ times the value is Huber's loss.

    Source: Huber 1964; Girshick 2015, arXiv:1504.08083. VKD: Miles, Elezi, Deng 2024, arXiv:2403.06213.

    >>> smooth_l1(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([1.3125])
    """
    return torch.nn.functional.smooth_l1_loss(student, teacher, beta=delta, reduction="none").mean(-1)


@token_objective(
    on=FEATURES,
    aliases=("logsum", "srd"),
    zero_at_equality=False,
    formula="log(ε + Σ |a − b|^α)",
    source="Miles, Mikolajczyk 2024, arXiv:2303.11098",
)
def log_sum(
    student: Tensor,
    teacher: Tensor,
    *,
    exponent: Annotated[float, Between(1, 16)] = 4.0,
    epsilon: Annotated[float, Between(0, 1, excluding=(0,))] = 1e-6,
) -> Tensor:
    """The logarithm of a power sum of the differences: each token pulls by its relative, not its absolute, error.

    The gradient grows as the fit improves, about α / ‖a − b‖, until the sum reaches ε: clip gradients, or let the weight fall.
    The official code puts a batch normalisation without gain on both sides first: see the normalizers.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [log ε, ∞); log ε with gradient 0 where the rows are equal. Differences c times as
    large add α log c.

    Options: ``exponent``: α, from 1 to 16; large ones look at the worst dimensions only. ``epsilon``: the sum below which a token
    counts as fitted. The published loss takes one logarithm of the sum over the whole batch; that does not add over
    micro-batches, so it is not offered: here each token has its own.

    Source: Miles, Mikolajczyk 2024, arXiv:2303.11098.

    >>> log_sum(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """
    difference = (student - teacher).abs()
    scale = difference.detach().amax(-1, keepdim=True).clamp(min=1.0)  # cancels out; powers cannot overflow
    total = (difference / scale).pow(exponent).sum(-1, keepdim=True) + epsilon * scale.pow(-exponent)
    return (total.log() + exponent * scale.log()).squeeze(-1)


@token_objective(
    on=FEATURES,
    aliases=("mi_vid", "vid", "variational_information_distillation"),
    zero_at_equality=False,
    equal_widths=False,
    formula="mean over Ht of ½ log σ² + (b − μ(a))² / 2σ²",
    source="Ahn et al. 2019, arXiv:1904.05835",
)
class VariationalInformation(nn.Module):
    """A bound on the mutual information of the features: how well a trained Gaussian predicts the teacher's row from the student's.

    A mean squared error whose weights, one for each dimension, are learned, so that massive and noisy dimensions cannot rule it.
    I(a; b) ≥ H(b) − Ht (value + ½ log 2π); the bound is tight where b is linear in a with Gaussian noise.

    Shapes: ``(N, Hs), (N, Ht) -> (N,)``; μ is a linear map with bias and does a projector's work. Range (½ log 1e-5, ∞), in nats
    per dimension. At the optimum σ² is the residual variance and the value the mean of ½ log σ² + ½. Nothing special happens at
    equal features, since the student's pass through μ.

    Options: ``initial_variance``: σ² before training, in the teacher's squared unit; the official code's default. μ and σ² train
    with the student and are left out of the export.

    Source: Ahn, Hu, Damianou, Lawrence, Dai 2019, arXiv:1904.05835.

    >>> objective = VariationalInformation(2, 3, initial_variance=1.0)
    >>> student = torch.ones(1, 2)
    >>> round(objective(student, objective.mean(student)).item(), 4)
    0.0
    """

    SMALLEST_VARIANCE = 1e-5

    def __init__(
        self, student_width: int, teacher_width: int, *, initial_variance: Annotated[float, Between(1e-4, 1e6)] = 5.0
    ) -> None:
        super().__init__()
        self.mean = nn.Linear(student_width, teacher_width)
        spread = initial_variance - self.SMALLEST_VARIANCE
        inverse_softplus = spread + math.log(-math.expm1(-spread))
        self.raw_variance = nn.Parameter(torch.full((teacher_width,), inverse_softplus))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        variance = nn.functional.softplus(self.raw_variance) + self.SMALLEST_VARIANCE
        residual = teacher - self.mean(student)
        return ((variance.log() + residual.square() / variance) / 2.0).mean(-1)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "mse": mse,
        "normalized_mse": normalized_mse,
        "cosine": cosine,
        "l1": l1,
        "smooth_l1": smooth_l1,
        "log_sum": log_sum,
        "variational_information": VariationalInformation,
    }
