"""Distances between features of student and teacher, row by row.

Letters: N supervised tokens, H width after projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distily import hookimpl
from distily.objectives import token_objective

FEATURES = ("hidden_states", "queries", "keys", "values")


@token_objective(
    on=FEATURES,
    aliases=("cos", "cosine_distance"),
    formula="1 − ⟨a, b⟩ / (‖a‖ ‖b‖)",
    source="Sanh, Debut, Chaumond, Wolf 2019, arXiv:1910.01108",
)
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance: compares directions and ignores lengths, so massive activations do not rule it.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, 2]; zero where the rows point the same way. A zero row has distance 1 and
    gradient 0.

    Source: Sanh, Debut, Chaumond, Wolf 2019 (DistilBERT), arXiv:1910.01108.

    >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.])
    """
    unit_student, unit_teacher = (torch.nn.functional.normalize(rows, dim=-1, eps=1e-6) for rows in (student, teacher))
    return 1.0 - (unit_student * unit_teacher).sum(-1)


@token_objective(
    on=FEATURES,
    aliases=("hidden_mse",),
    formula="‖a − b‖² / H",
    source="Romero et al. 2015, arXiv:1412.6550",
)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the width. In decoders a few massive dimensions rule it: prefer ``normalizer=layernorm``.

    Shapes: ``(N, H), (N, H) -> (N,)``. Range [0, ∞); zero where the rows are equal. Gradient: 2 (a − b) / H.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550.

    >>> mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    return (student - teacher).square().mean(-1)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"cosine": cosine, "mse": mse}
