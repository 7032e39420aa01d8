"""How many rows of logits the kernels hold at a time: from shapes and free memory.

Letters: N supervised tokens, H hidden width, V vocabulary, W the width of a row of the buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distily import memory
from distily.products import wide, width_of

MOST_BYTES, LEAST_BYTES = 1900 * 2**20, 256 * 2**20
"""What the buffers and the head's gradient may take together, if a quarter of the free memory is not less; what a block gets anyway."""
PART_BYTES = 320 * 2**20
"""What a part may take: more of it would save nothing but launches."""
FEW = 8
"""Pieces that may add up in bfloat16: each rounds the sum, which leaves its error below 3.5e-3, where that of one piece is 2.4e-3."""
ROW_MULTIPLE = 256


@dataclass(frozen=True)
class Blocks:
    """``rows`` of the student's logits at a time, as the head's gradient likes many; ``part``: of the teacher's, a part of a block."""

    rows: int
    part: int
    few: bool
    """Whether the head's gradient comes in so few pieces that they may add up in its own dtype."""


def cut(
    count: int, weight: Tensor, teacher_width: int | None, dtype: torch.dtype | None, rows: int | None = None, narrow: bool = True
) -> Blocks:
    """Blocks for N = ``count`` rows before a head ``weight`` (V, H) whose gradient is wanted in ``dtype``, or not at all.

    Equal ones, as large as memory allows beside that gradient; ``rows``: of that size instead. ``teacher_width``: of its hidden states,
    if it has any. ``narrow``: whether the gradient may add up in ``dtype`` at all.
    """
    row, largest, available = 2 * width_of(len(weight)), largest_part(len(weight)), _available(weight.device)
    blocks = math.ceil(count / rows) if rows else 1
    if rows is None:
        for few in (True, False) if narrow else (False,):
            gradient = 0 if dtype is None else weight.numel() * (dtype if few else wide(dtype)).itemsize
            most = max(LEAST_BYTES, available - gradient - largest * row) // row // ROW_MULTIPLE * ROW_MULTIPLE
            blocks = math.ceil(count / max(ROW_MULTIPLE, most))
            if blocks <= FEW:
                break
        rows = math.ceil(count / max(1, blocks) / ROW_MULTIPLE) * ROW_MULTIPLE
    rows = max(1, min(rows, count))
    part = min(rows, largest) if teacher_width is None else _part(rows, largest, teacher_width, len(weight), weight.device)
    return Blocks(rows, part, narrow and blocks <= FEW)


def largest_part(vocabulary: int) -> int:
    """Rows that a part has at most."""
    return max(ROW_MULTIPLE, PART_BYTES // (2 * width_of(vocabulary)) // ROW_MULTIPLE * ROW_MULTIPLE)


def bytes_held(rows: Tensor, weight: Tensor, dtype: torch.dtype, given: int | None = None) -> int:
    """What the kernels hold at most for hidden ``rows`` (N, H) before a head ``weight`` (V, H), computed in ``dtype``.

    Logits of a block and of the largest part, the head's gradient, and the copies that autocast makes of hidden states and head.
    """
    blocks = cut(len(rows), weight, None, weight.dtype, given)
    held = blocks.rows + min(blocks.rows, largest_part(len(weight)))
    gradient = (weight.dtype if blocks.few else wide(weight.dtype)).itemsize * weight.numel()
    copies = sum(each.numel() * dtype.itemsize for each in (rows, weight) if each.dtype != dtype)
    return 2 * width_of(len(weight)) * held + gradient + copies


def _available(device: torch.device) -> int:
    return min(MOST_BYTES, memory.free(device) // 4) if device.type == "cuda" else MOST_BYTES


@lru_cache(256)
def _part(rows: int, largest: int, width: int, vocabulary: int, device: torch.device) -> int:
    """The part of a block that leaves fewest processors idle at the ends of the teacher's products; of equals the largest."""
    from distily.kernels.products import waves

    def cost(part: int) -> tuple[int, int]:
        whole, rest = divmod(rows, part)
        return whole * waves(part, width, vocabulary, device) + waves(rest, width, vocabulary, device), -part

    parts = range(min(2 * ROW_MULTIPLE, largest), largest + 1, ROW_MULTIPLE)
    return min((part for part in parts if part <= rows), key=cost, default=rows)
