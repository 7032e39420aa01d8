"""Logits that are not formed yet: what an output embedding would make of hidden states.

Letters: N rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.utils._triton as triton
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
EIGHT_BIT_MULTIPLE = 16
"""What dimensions of matrices must be multiples of, for the 8-bit units."""
WIDTH_MULTIPLE = 128
"""What rows of logits are padded to."""
LEAST_LARGEST = 1e-12
"""What the largest value of a row counts as at least, so that a row of zeros has a scale."""


@dataclass(frozen=True)
class Float8Rows:
    """Rows of a matrix in fp8, each by a scale of its own: ``values`` (n, H), ``scale`` (n, 1) in float32."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Float8Rows:
        """Rows ``(n, H)``; the largest value of each comes to the end of fp8's range."""
        scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=LEAST_LARGEST) / torch.finfo(FLOAT8).max
        return cls((rows / scale).to(FLOAT8), scale)


@dataclass(frozen=True)
class Product:
    """Rows ``hidden`` (N, H), ``weight`` (V, H) and ``bias`` (V,); ``scale`` and ``softcap`` are what the model's class does afterwards."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    float8: Float8Rows | str | None = None
    """``weight`` once more, for kernels that shall form the product in fp8; or, in words that end a sentence, why they shall not."""

    def rows(self, at: slice | Tensor) -> Product:
        return replace(self, hidden=self.hidden[at])

    def formed(self) -> Tensor:
        """The product itself, ``(N, V)`` in float32 (float64 stays): on a GPU as the product adds it up, not rounded to the rows' dtype."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.dtype not in (torch.bfloat16, torch.float16) or not hidden.is_cuda:
            return upcast(torch.nn.functional.linear(hidden, weight, bias))
        even = -(-len(weight) // 8) * 8  # rows that start at multiples of 16 bytes; a GPU is five times slower without
        raw = torch.empty((len(hidden), even), dtype=torch.float32, device=hidden.device)[:, : len(weight)]
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=raw)
        return raw if bias is None else raw.add_(bias)

    def unsuited(self) -> str | None:
        return unsuited(self.hidden, self.weight, self.hidden.dtype)


def unsuited(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot form the product in ``dtype``, in words that end a sentence; None where they can."""
    width, reason = weight.shape[1], without_kernels(hidden.device)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the product is computed in {str(dtype).removeprefix('torch.')}, and the kernels compute in bfloat16"
    if width % 8 or not weight.is_contiguous() or not hidden.is_contiguous():
        return f"rows of {width} numbers do not start at multiples of 16 bytes"
    return None


def without_kernels(device: torch.device) -> str | None:
    """The same for a device on which they do not run at all."""
    if not triton.has_triton_package():
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Hopper, which the kernels are written for"
    return None


def width_of(vocabulary: int) -> int:
    """W: V and the padding without which products would have odd sizes."""
    return math.ceil(vocabulary / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 where it is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(values: Tensor) -> Tensor:
    """float32, or float64 where it was float64."""
    return values.to(wide(values.dtype))
