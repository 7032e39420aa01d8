"""Rows of hidden states in fp8, in one pass over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distily.products import FLOAT8, LEAST_LARGEST, Float8Rows


@triton.jit
def _float8_rows(
    rows_ptr, values_ptr, scale_ptr, width, LEAST: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(rows_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), LEAST) * INVERSE  # as PyTorch divides by a number on a GPU
    tl.store(scale_ptr + row, scale)
    tl.store(values_ptr + row * width + at, tl.div_rn(values, scale).to(tl.float8e4nv), mask=at < width)


def float8_rows(rows: Tensor) -> Float8Rows:
    """``Float8Rows.of(rows)``, rows ``(n, H)`` without gaps, by one kernel."""
    values, scale = torch.empty_like(rows, dtype=FLOAT8), torch.empty((len(rows), 1), dtype=torch.float32, device=rows.device)
    if len(rows):
        _float8_rows[(len(rows),)](
            rows, values, scale, rows.shape[1], LEAST=LEAST_LARGEST, INVERSE=1.0 / torch.finfo(FLOAT8).max,
            BLOCK=triton.next_power_of_2(rows.shape[1]), num_warps=4,
        )  # fmt: skip
    return Float8Rows(values, scale)
