"""Multiplies a gradient by the number that the backward hands down, which is nearly always 1: then nothing is done that need not be."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distily.kernels.products import processors

BLOCK = 4096


@triton.jit
def _scale(values_ptr, out_ptr, factor_ptr, count, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, IN_PLACE: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    wide = tl.full((), BLOCK, tl.int64)
    if (factor != 1.0) | (not IN_PLACE):
        for block in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), PROGRAMS):
            at = block * wide + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + at, mask=at < count, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, (values * factor).to(out_ptr.dtype.element_ty), mask=at < count)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` times the scalar ``factor`` in ``dtype``, in place where that is theirs already; the host does not wait."""
    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    programs = 8 * processors(values.device)
    _scale[(programs,)](values, out, factor, values.numel(), BLOCK=BLOCK, PROGRAMS=programs, IN_PLACE=out is values, num_warps=8)
    return out
