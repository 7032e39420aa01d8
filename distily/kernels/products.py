"""The product that makes logits, with all that follows it in one kernel; and the logit of the label, which it counts from.

Letters: N rows, H hidden width, V vocabulary, W the width of a row of the buffer (V and its padding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distily.products import FLOAT8, LEAST_LARGEST, Float8Rows, Product, width_of

BLOCK_VOCABULARY, BLOCK_BYTES = 128, 128
"""Tokens over which the softmax is summed at a time, and bytes of a row that are multiplied at a time."""
HALF_LIMIT = tl.constexpr(65504.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiling:
    """Rows and tokens of a tile, and how a program makes one: warps, stages of its loads, and programs that share a processor."""

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int


LONG, UNEVEN, SHORT = Tiling(128, 256, 8, 4, 1), Tiling(256, 128, 8, 4, 1), Tiling(128, 128, 4, 3, 2)
"""For long rows of hidden states, with a vocabulary that is a multiple of 256 and with another; and for short ones, where a tile's end
takes so long that another program had better multiply meanwhile."""
SHORTEST = 1024
"""The width from which on rows are long."""


def tiling(width: int, vocabulary: int) -> Tiling:
    """How the product of rows of ``width`` numbers with a head is cut."""
    if width < SHORTEST:
        return SHORT
    return UNEVEN if vocabulary % LONG.tokens else LONG


@triton.jit
def _finish(raw, scale, cap, HAS_CAP: tl.constexpr):
    """What the model's class does to the head's output: scale, then soft-capping."""
    logits = raw * scale
    if HAS_CAP:
        logits = cap - 2.0 * cap / (tl.exp2(logits * (2.0 * LOG2_E / cap)) + 1.0)  # cap · tanh(logits / cap)
    return logits


@triton.jit(do_not_specialize=["rows"])
def _logits(
    hidden, weight, out, row_scale_ptr, token_scale_ptr, bias_ptr, reference_ptr, parts_ptr,
    rows, vocabulary, width, scale, cap, inverse,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr, HARD: tl.constexpr, FLOAT8: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles, blocks = row_blocks * tl.cdiv(vocabulary, BLOCK_TOKENS), tl.cdiv(vocabulary, BLOCK)
    half: tl.constexpr = BLOCK_TOKENS // 2
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):  # rows first: neighbours share a block of the head
        row = (tile % row_blocks) * BLOCK_ROWS
        token = (tile // row_blocks) * BLOCK_TOKENS
        logits = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            logits = tl.dot(hidden.load([row, start]), weight.load([token, start]).T, logits)
        at, tokens = row + tl.arange(0, BLOCK_ROWS), token + tl.arange(0, BLOCK_TOKENS)
        if FLOAT8:
            logits *= tl.load(row_scale_ptr + at, mask=at < rows, other=0.0)[:, None]
            logits *= tl.load(token_scale_ptr + tokens, mask=tokens < vocabulary, other=0.0)[None, :]
        if HAS_BIAS:
            logits += tl.load(bias_ptr + tokens, mask=tokens < vocabulary, other=0.0).to(tl.float32)[None, :]
        if HAS_SCALE or HAS_CAP:
            logits = _finish(logits, scale, cap, HAS_CAP)
        logits -= tl.load(reference_ptr + at, mask=at < rows, other=0.0)[:, None]
        if RAGGED:
            logits = tl.where((tokens < vocabulary)[None, :], logits, -float("inf"))
        stored = logits.to(tl.float16)
        logits = stored.to(tl.float32)  # what is summed is what will be read
        logits = tl.reshape(logits, (BLOCK_ROWS, BLOCK_TOKENS // BLOCK, BLOCK))
        top = tl.maximum(tl.max(logits, 2), -HALF_LIMIT)  # of a block without mass: a number, since -inf − -inf is none
        block = token // BLOCK + tl.arange(0, BLOCK_TOKENS // BLOCK)
        part = parts_ptr + (at[:, None] * blocks + block[None, :]) * PARTS
        there = (at < rows)[:, None] & (block < blocks)[None, :]
        tl.store(part, top, mask=there)
        tl.store(part + 1, tl.sum(tl.exp2(logits * inverse - (top * inverse)[:, :, None]), 2), mask=there)
        if HARD:
            tl.store(part + 2, tl.sum(tl.exp2(logits * LOG2_E - (top * LOG2_E)[:, :, None]), 2), mask=there)
        left, right = tl.split(tl.permute(tl.reshape(stored, (BLOCK_ROWS, 2, half)), (0, 2, 1)))
        out.store([row, token], left)
        out.store([row, token + half], right)


@triton.jit
def _label_logits(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, out_ptr, width, scale, cap,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(hidden_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + label * width + at, mask=at < width, other=0.0).to(tl.float32)
    raw = tl.sum(total, 0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + label).to(tl.float32)
    logit = _finish(raw, scale, cap, HAS_CAP)
    tl.store(out_ptr + row, tl.where(tl.abs(logit) < float("inf"), logit, 0.0))


@triton.jit
def _float8_rows(rows_ptr, values_ptr, scale_ptr, width, LEAST: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(rows_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), LEAST) * INVERSE  # as PyTorch divides by a number on a GPU
    tl.store(scale_ptr + row, scale)
    tl.store(values_ptr + row * width + at, tl.div_rn(values, scale).to(tl.float8e4nv), mask=at < width)


def float8_rows(rows: Tensor) -> Float8Rows:
    """``Float8Rows.of(rows)``, rows ``(n, H)`` without gaps, by one kernel, which needs no copy of them in float32."""
    values, scale = torch.empty_like(rows, dtype=FLOAT8), torch.empty((len(rows), 1), dtype=torch.float32, device=rows.device)
    if len(rows):
        _float8_rows[(len(rows),)](
            rows, values, scale, rows.shape[1], LEAST=LEAST_LARGEST, INVERSE=1.0 / torch.finfo(FLOAT8).max,
            BLOCK=triton.next_power_of_2(rows.shape[1]), num_warps=4,
        )  # fmt: skip
    return Float8Rows(values, scale)


def label_logits(product: Product, labels: Tensor) -> Tensor:
    """The logit of each row's label in float32, 0 where it is not finite: ``(N,) -> (N,)``."""
    hidden, weight, bias = product.hidden, product.weight, product.bias
    out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if len(hidden):
        _label_logits[(len(hidden),)](
            hidden, weight, weight if bias is None else bias, labels, out, hidden.shape[1], product.scale, product.softcap or 0.0,
            BLOCK=1024, HAS_BIAS=bias is not None, HAS_CAP=product.softcap is not None, num_warps=4,
        )  # fmt: skip
    return out


def relative_logits(product: Product, reference: Tensor, out: Tensor, temperature: float, hard: bool = False) -> Tensor:
    """Writes the logits of ``product`` minus ``reference`` (N,) to ``out`` ``(N, W)`` in half precision, -inf beyond V.

    Counted from a likely token, the logits that matter are near 0, where half precision is finest; it keeps eight times the digits of
    bfloat16. Gives ``(N, B, 2)`` for B blocks of the vocabulary: the highest logit, and Σ exp of the others less that over the temperature;
    with ``hard`` ``(N, B, 3)``: the same sum without temperature. ``product`` is in bfloat16 or float16, see ``Product.unsuited``; one that
    has its weight in fp8 too is formed in it, both operands scaled by row.
    """
    hidden, weight, bias = product.hidden, product.weight, product.bias
    row_scale = token_scale = reference
    low = product.float8 if isinstance(product.float8, Float8Rows) else None
    if low is not None:
        rows_low = float8_rows(hidden)
        hidden, row_scale, weight, token_scale = rows_low.values, rows_low.scale, low.values, low.scale
    cut, block_width = tiling(hidden.shape[1], len(weight)), BLOCK_BYTES // hidden.itemsize
    hidden_blocks = TensorDescriptor.from_tensor(hidden, [cut.rows, block_width])
    weight_blocks = TensorDescriptor.from_tensor(weight, [cut.tokens, block_width])
    out_blocks = TensorDescriptor.from_tensor(out, [cut.rows, cut.tokens // 2])
    rows, vocabulary = len(hidden), len(weight)
    blocks = triton.cdiv(vocabulary, BLOCK_VOCABULARY)
    parts = torch.empty((rows, blocks, 3 if hard else 2), dtype=torch.float32, device=hidden.device)
    programs = cut.programs * processors(hidden.device)  # however few the rows: no constant may follow the batch
    _logits[(programs,)](
        hidden_blocks, weight_blocks, out_blocks, row_scale, token_scale, reference if bias is None else bias, reference, parts,
        rows, vocabulary, hidden.shape[1], product.scale, product.softcap or 0.0, LOG2_E.value / temperature,
        BLOCK_ROWS=cut.rows, BLOCK_TOKENS=cut.tokens, BLOCK_WIDTH=block_width, PROGRAMS=programs, BLOCK=BLOCK_VOCABULARY,
        PARTS=parts.shape[2], RAGGED=vocabulary % cut.tokens != 0, HARD=hard, FLOAT8=low is not None,
        HAS_BIAS=bias is not None, HAS_SCALE=product.scale != 1.0, HAS_CAP=product.softcap is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return parts


def divergence_in_float8(product: Product, float8: Float8Rows) -> Tensor:
    """KL divergence in nats, from the softmax of a product to the same formed in fp8: the mean over its rows, ``()``."""
    reference = label_logits(product, product.formed().argmax(-1))
    vocabulary, logs = len(product.weight), []
    for each in (replace(product, float8=None), replace(product, float8=float8)):
        out = torch.empty((len(reference), width_of(vocabulary)), dtype=torch.float16, device=reference.device)
        relative_logits(each, reference, out, 1.0)
        logs.append(out[:, :vocabulary].float().log_softmax(-1))
    exact, low = logs
    return (exact.exp() * (exact - low)).sum(-1).mean()


def waves(rows: int, width: int, vocabulary: int, device: torch.device) -> int:
    """How often every processor gets a tile of a product with so many rows: its time, in units of a tile's."""
    cut = tiling(width, vocabulary)
    return int(triton.cdiv(_tiles(cut, rows, vocabulary), cut.programs * processors(device)))


def _tiles(cut: Tiling, rows: int, vocabulary: int) -> int:
    return int(triton.cdiv(rows, cut.rows) * triton.cdiv(vocabulary, cut.tokens))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 where the kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
