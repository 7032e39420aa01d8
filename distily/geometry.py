"""Geometry of rows that objectives on features share.

Letters: n rows, H width, k dimensions kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Lengths below it count as 0."""


def unit(rows: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Length 1 along ``dim`` (several: of all their entries together); what has length 0 stays 0, with gradient 0."""
    lengths = torch.linalg.vector_norm(rows, dim=dim, keepdim=True)
    return torch.where(lengths > SMALLEST, rows / lengths.clamp(min=SMALLEST), 0.0)


def centered(rows: Tensor) -> Tensor:
    """The rows less their mean: ``(n, H) -> (n, H)``."""
    return rows - rows.mean(0)


def reduced(rows: Tensor, dimensions: int) -> Tensor:
    """At most k coordinates, ``(…, H) -> (…, min(H, k))``, by a fixed random matrix with orthonormal columns.

    It is the same for both sides, for every layer and in every run. Rows no wider than k stay as they are.
    """
    width = rows.shape[-1]
    return rows if width <= dimensions else rows @ _orthonormal(width, dimensions, rows.dtype, rows.device)


@lru_cache(maxsize=16)  # a copy to the device at every call would make the host wait
def _orthonormal(width: int, dimensions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(width, dimensions, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(drawn).Q.to(device, dtype)
