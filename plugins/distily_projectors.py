"""Projectors from the student's width to the teacher's, and normalizers of what is compared.

Letters: Hs, Ht the widths of student and teacher, H either. Projectors train with the student and are left out of the export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distily import hookimpl


def identity(student_width: int, teacher_width: int) -> nn.Module:
    """No projection: for equal widths."""
    if student_width != teacher_width:
        raise ValueError(f"it needs equal widths, not {student_width} and {teacher_width}")
    return nn.Identity()


def linear(student_width: int, teacher_width: int, *, bias: bool = False) -> nn.Module:
    """A trained linear map ``(…, Hs) -> (…, Ht)``, Xavier initialised (the identity for equal widths)."""
    layer = nn.Linear(student_width, teacher_width, bias=bias)
    nn.init.eye_(layer.weight) if student_width == teacher_width else nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def orthogonal(student_width: int, teacher_width: int) -> nn.Module:
    """A trained linear map with orthonormal columns (Hs ≤ Ht) or rows (Hs > Ht): it turns the student's features and keeps
    their lengths and angles when Hs ≤ Ht, so that it cannot absorb the difference that the student should learn.
    """
    layer = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return nn.utils.parametrizations.orthogonal(layer)


def none(features: Tensor) -> Tensor:
    """The features as they are."""
    return features


def layernorm(features: Tensor) -> Tensor:
    """Zero mean and unit variance over the width, ``(…, H)``, without gain: the squared error becomes 2 (1 − Pearson)."""
    return torch.nn.functional.layer_norm(features, features.shape[-1:])


def l2(features: Tensor) -> Tensor:
    """Unit length over the width, ``(…, H)``: the squared error becomes that of directions."""
    return torch.nn.functional.normalize(features, dim=-1, eps=1e-6)


@hookimpl
def distily_projectors() -> dict[str, object]:
    return {"identity": identity, "linear": linear, "orthogonal": orthogonal}


@hookimpl
def distily_normalizers() -> dict[str, object]:
    return {"none": none, "layernorm": layernorm, "l2": l2}
