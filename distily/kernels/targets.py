"""What sparse forms need before the pass over the rows: the bounds of the teacher's likeliest tokens, or tokens drawn from it.

Both find their tokens through the blocks of the vocabulary whose highest logit and mass the product wrote down: the k likeliest tokens lie
in the k blocks with the highest tops, and a draw is one of a block by its mass, then one of a token in it. So little is read.
Letters: n rows, V vocabulary, W the width of a row of the buffers, B blocks, F forms, S the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from distily.forms import Form
from distily.kernels.forms import LN_2, NUMBERS, TOP_BUCKET, TOP_RENORMALIZE, TOP_ZERO
from distily.kernels.products import BLOCK_VOCABULARY, LOG2_E
from distily.kernels.rows import SUPPORT, log_mass

GROUP, WARPS = 8, 8
"""Blocks, or draws, that a program holds at a time, and its warps."""
UNITS = tl.constexpr(2.0**40)
"""How many units the likeliest token has in sums that must not depend on their order."""
LIMIT = tl.constexpr(126.0)
"""The largest power of two that ratios of masses are cut to."""


@triton.jit
def _key(logits):
    """Whole numbers in the order of the logits: as many bits as they have."""
    positive: tl.constexpr = 0x7FFF if logits.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
    whole: tl.constexpr = tl.int16 if logits.dtype.primitive_bitwidth == 16 else tl.int32
    bits = (logits + 0.0).to(whole, bitcast=True).to(tl.int32)  # −0 becomes 0
    return bits ^ ((bits >> 31) & positive)


@triton.jit
def _tokens(listed_ptr, listed, start, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """The tokens of some listed blocks, below 0 where the list is over: ``(GROUP, SIZE)``."""
    place = start + tl.arange(0, GROUP)
    block = tl.load(listed_ptr + place, mask=place < listed, other=-1)
    return block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _listed(teacher, at, vocabulary, width, LOWEST: tl.constexpr):
    """Logits and keys of listed tokens; what is no token has the lowest key of all."""
    stored = tl.load(teacher + at, mask=(at >= 0) & (at < width), other=0.0)
    return stored.to(tl.float32), tl.where((at >= 0) & (at < vocabulary), _key(stored), LOWEST)


@triton.jit
def _above(
    teacher, listed_ptr, listed, limit, vocabulary, width, inverse, log_mass_t,
    LOWEST: tl.constexpr, NUCLEUS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """How many listed tokens have keys above ``limit``, and with ``NUCLEUS`` their mass."""
    count = tl.zeros((GROUP, SIZE), tl.int32)
    mass = tl.zeros((GROUP, SIZE), tl.float32)
    for start in range(0, listed, GROUP):
        raw, key = _listed(teacher, _tokens(listed_ptr, listed, start, GROUP, SIZE), vocabulary, width, LOWEST)
        count += (key > limit).to(tl.int32)
        if NUCLEUS:
            mass += tl.where(key > limit, tl.exp2(raw * inverse - log_mass_t), 0.0)
    return tl.sum(tl.sum(count, 1), 0), tl.sum(tl.sum(mass, 1), 0) if NUCLEUS else 0.0


@triton.jit
def _tied(
    teacher, listed_ptr, listed, bound, last, vocabulary, width,
    LOWEST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """How many listed tokens up to ``last`` have the key ``bound``, and their logit."""
    count = tl.zeros((GROUP, SIZE), tl.int32)
    logit = tl.full((GROUP, SIZE), -float("inf"), tl.float32)
    for start in range(0, listed, GROUP):
        at = _tokens(listed_ptr, listed, start, GROUP, SIZE)
        raw, key = _listed(teacher, at, vocabulary, width, LOWEST)
        count += ((key == bound) & (at <= last)).to(tl.int32)
        logit = tl.where(key == bound, raw, logit)
    return tl.sum(tl.sum(count, 1), 0), tl.max(tl.max(logit, 1), 0)


@triton.jit
def _middle(low, high):
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _list_blocks(
    parts_ptr, listed_ptr, k, blocks, dtype: tl.constexpr, LOWEST: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr
):
    """Writes which blocks can hold one of the k likeliest tokens: the k with the highest tops and their equals. Gives which, how many."""
    slot = tl.arange(0, SLOTS)
    key = _key(tl.load(parts_ptr + slot * PARTS, mask=slot < blocks, other=0.0).to(dtype))
    key = tl.where(slot < blocks, key, LOWEST)
    needed = tl.minimum(k, blocks)
    low, high = tl.full((), LOWEST, tl.int32), tl.max(key, 0) + 1
    while low + 1 < high:
        middle = _middle(low, high)
        enough = tl.sum((key >= middle).to(tl.int32), 0) >= needed
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    chosen = (key >= low) & (slot < blocks)
    tl.store(listed_ptr + tl.cumsum(chosen.to(tl.int32), 0) - 1, slot, mask=chosen)
    tl.debug_barrier()  # all of them read it
    return chosen, tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _bounds(
    teacher, listed_ptr, listed, k, p, vocabulary, width, inverse, log_mass_t,
    LOWEST: tl.constexpr, NUCLEUS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """S as key, logit and last token: what is above the key, and of its equals those up to the last."""
    low, high = tl.full((), LOWEST, tl.int32), tl.full((), -(LOWEST + 1), tl.int32)
    while low + 1 < high:  # the highest key that enough tokens reach
        middle = _middle(low, high)
        count, mass = _above(
            teacher, listed_ptr, listed, middle - 1, vocabulary, width, inverse, log_mass_t, LOWEST, NUCLEUS, GROUP, SIZE
        )
        enough = (count >= k) | (mass >= p)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    bound = low
    count, mass = _above(teacher, listed_ptr, listed, bound, vocabulary, width, inverse, log_mass_t, LOWEST, NUCLEUS, GROUP, SIZE)
    ties, logit = _tied(teacher, listed_ptr, listed, bound, vocabulary, vocabulary, width, LOWEST, GROUP, SIZE)
    needed = k - count
    if NUCLEUS:
        missing = tl.ceil((p - mass) / tl.exp2(logit * inverse - log_mass_t))
        needed = tl.minimum(needed.to(tl.float32), missing).to(tl.int32)
    last, low = vocabulary - 1, tl.where(needed < ties, -1, vocabulary - 2)
    while low + 1 < last:  # the first token up to which there are enough of the equals
        middle = _middle(low, last)
        enough = _tied(teacher, listed_ptr, listed, bound, middle, vocabulary, width, LOWEST, GROUP, SIZE)[0] >= needed
        low, last = tl.where(enough, low, middle), tl.where(enough, middle, last)
    return bound, logit, last


@triton.jit
def _tops(
    student, teacher, listed_ptr, listed, bound, last, others, vocabulary, width, teacher_width,
    LOWEST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The student's highest logit in S, and outside, where blocks that are not listed have ``others``."""
    top_in = tl.full((GROUP, SIZE), -65504.0, tl.float32)
    top_out = tl.full((GROUP, SIZE), -65504.0, tl.float32)
    for start in range(0, listed, GROUP):
        at = _tokens(listed_ptr, listed, start, GROUP, SIZE)
        _, key = _listed(teacher, at, vocabulary, teacher_width, LOWEST)
        own = tl.load(student + at, mask=(at >= 0) & (at < width), other=0.0).to(tl.float32)
        inside = (key > bound) | ((key == bound) & (at <= last))
        top_in = tl.where(inside, tl.maximum(top_in, own), top_in)
        top_out = tl.where(inside | (key == LOWEST), top_out, tl.maximum(top_out, own))
    return tl.max(tl.max(top_in, 1), 0), tl.maximum(tl.max(tl.max(top_out, 1), 0), others)


@triton.jit
def _masses(
    student, teacher, listed_ptr, listed, bound, last, top_in, top_out, vocabulary, width, teacher_width, inverse, log_mass_s, log_mass_t,
    LOWEST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Over the listed tokens: Σ_S t log(t/s) to base 2, t's mass in S and outside, s's in units of 2^top."""
    value = tl.zeros((GROUP, SIZE), tl.float32)
    t_in, t_out, s_in, s_out = value, value, value, value
    for start in range(0, listed, GROUP):
        at = _tokens(listed_ptr, listed, start, GROUP, SIZE)
        raw, key = _listed(teacher, at, vocabulary, teacher_width, LOWEST)
        own = tl.load(student + at, mask=(at >= 0) & (at < width), other=0.0).to(tl.float32)
        inside = (key > bound) | ((key == bound) & (at <= last))
        outside = (key > LOWEST) & (inside == 0)
        log_t = raw * inverse - log_mass_t
        t = tl.exp2(log_t)
        value += tl.where(inside & (t > 0), t * (log_t - own * inverse + log_mass_s), 0.0)
        t_in += tl.where(inside, t, 0.0)
        t_out += tl.where(outside, t, 0.0)
        s_in += tl.where(inside, tl.exp2((own - top_in) * inverse), 0.0)
        s_out += tl.where(outside, tl.exp2((own - top_out) * inverse), 0.0)
    return (
        tl.sum(tl.sum(value, 1), 0), tl.sum(tl.sum(t_in, 1), 0), tl.sum(tl.sum(t_out, 1), 0),
        tl.sum(tl.sum(s_in, 1), 0), tl.sum(tl.sum(s_out, 1), 0),
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["supports_ptr", "values_ptr"])  # it follows the number of rows
def _supports(
    student_ptr, teacher_ptr, student_parts_ptr, teacher_parts_ptr, listed_ptr, supports_ptr, values_ptr, coefficient_ptr,
    k, p, vocabulary, width, teacher_width, blocks, inverse,
    FORM: tl.constexpr, NUCLEUS: tl.constexpr, LOWEST: tl.constexpr, SLOTS: tl.constexpr, STUDENT_PARTS: tl.constexpr,
    TEACHER_PARTS: tl.constexpr, SUPPORT: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student, teacher, listed_ptr = student_ptr + row * width, teacher_ptr + row * teacher_width, listed_ptr + row * blocks
    parts_s, parts_t = student_parts_ptr + row * blocks * STUDENT_PARTS, teacher_parts_ptr + row * blocks * TEACHER_PARTS
    log_mass_s = log_mass(parts_s, blocks, inverse, 1, STUDENT_PARTS, SLOTS)
    log_mass_t = log_mass(parts_t, blocks, inverse, 1, TEACHER_PARTS, SLOTS)
    dtype: tl.constexpr = teacher_ptr.dtype.element_ty
    chosen, listed = _list_blocks(parts_t, listed_ptr, k, blocks, dtype, LOWEST, TEACHER_PARTS, SLOTS)
    bound, logit, last = _bounds(
        teacher, listed_ptr, listed, k, p, vocabulary, teacher_width, inverse, log_mass_t, LOWEST, NUCLEUS, GROUP, SIZE
    )
    slot = tl.arange(0, SLOTS)
    rest = (slot < blocks) & (chosen == 0)
    tops_s = tl.load(parts_s + slot * STUDENT_PARTS, mask=rest, other=-65504.0)
    tops_t = tl.load(parts_t + slot * TEACHER_PARTS, mask=rest, other=-65504.0)
    top_in, top_out = _tops(
        student, teacher, listed_ptr, listed, bound, last, tl.max(tops_s, 0), vocabulary, width, teacher_width, LOWEST, GROUP, SIZE
    )  # fmt: skip
    value, t_in, t_out, s_in, s_out = _masses(
        student, teacher, listed_ptr, listed, bound, last, top_in, top_out, vocabulary, width, teacher_width, inverse, log_mass_s,
        log_mass_t, LOWEST, GROUP, SIZE,
    )  # fmt: skip
    sums_s = tl.load(parts_s + slot * STUDENT_PARTS + 1, mask=rest, other=0.0)
    sums_t = tl.load(parts_t + slot * TEACHER_PARTS + 1, mask=rest, other=0.0)
    t_out += tl.sum(sums_t * tl.exp2(tops_t * inverse - log_mass_t), 0)
    log_s_in = top_in * inverse - log_mass_s + tl.log2(s_in)
    log_s_out = top_out * inverse - log_mass_s + tl.log2(s_out + tl.sum(sums_s * tl.exp2((tops_s - top_out) * inverse), 0))
    in_s, out_s, in_t = 1.0, 1.0, 1.0  # gradient: in_s · s − in_t · t inside, out_s · s outside
    if FORM == TOP_BUCKET:
        apart = tl.log2(t_out) - log_s_out
        value += tl.where(t_out > 0, t_out * apart, 0.0)
        out_s = 1.0 - tl.where(t_out > 0, tl.exp2(tl.minimum(apart, LIMIT)), 0.0)
    if FORM == TOP_RENORMALIZE:
        value = tl.where(s_in > 0, value / t_in + log_s_in - tl.log2(t_in), float("inf"))
        in_s, out_s, in_t = tl.exp2(tl.minimum(-log_s_in, LIMIT)), 0.0, 1.0 / t_in
    if FORM == TOP_ZERO:
        in_s, out_s = t_in, t_in
    support, coefficient = supports_ptr + row * SUPPORT, tl.load(coefficient_ptr)
    tl.store(support, logit)
    tl.store(support + 1, last.to(tl.float32))
    tl.store(support + 2, coefficient * in_s)
    tl.store(support + 3, coefficient * in_t)
    tl.store(support + 4, coefficient * out_s)
    tl.store(values_ptr + row, value * LN_2)


def supports(
    student: Tensor,
    teacher: Tensor,
    student_parts: Tensor,
    teacher_parts: Tensor,
    forms: Sequence[Form],
    coefficients: Tensor,
    values: Tensor,
    *,
    temperature: float,
    vocabulary: int,
) -> Tensor:
    """What the pass needs to know of S for each row and ``top`` form: ``(F, n, 5)``. The forms' values go to ``values`` (F, n), in nats.

    The lowest logit in S and the last token that has it; then, times the form's entry in ``coefficients`` (F,), the factors of s and t in S
    and of s outside, whose difference is the gradient. Logits and parts are those of ``rows_pass``; the parts are of blocks of 128 tokens.
    """
    count, blocks = student_parts.shape[:2]
    result = torch.empty((len(forms), count, SUPPORT), dtype=torch.float32, device=student.device)
    listed = torch.empty((count, blocks), dtype=torch.int32, device=student.device)
    for place, form in enumerate(forms):
        if NUMBERS[form.name] < TOP_BUCKET.value:
            continue
        k, p = form.parameters
        _supports[(count,)](
            student, teacher, student_parts, teacher_parts, listed, result[place], values[place], coefficients[place],
            min(int(k), vocabulary), float(p), vocabulary, student.stride(0), teacher.stride(0), blocks, LOG2_E.value / temperature,
            FORM=NUMBERS[form.name], NUCLEUS=p < 1.0, LOWEST=-(2 ** (8 * teacher.element_size() - 1)),
            SLOTS=triton.next_power_of_2(blocks), STUDENT_PARTS=student_parts.shape[2], TEACHER_PARTS=teacher_parts.shape[2],
            SUPPORT=SUPPORT, GROUP=GROUP, SIZE=BLOCK_VOCABULARY, num_warps=WARPS,
        )  # fmt: skip
    return result


@triton.jit
def _draws(
    student_ptr, teacher_ptr, parts_ptr, numbers_ptr, drawn_ptr, at_drawn_ptr, count, vocabulary, width, teacher_width, blocks, inverse,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    parts = parts_ptr + row * blocks * PARTS + slot * PARTS
    tops = tl.load(parts, mask=slot < blocks, other=-float("inf"))
    sums = tl.load(parts + 1, mask=slot < blocks, other=0.0)
    mass = (sums * tl.exp2((tops - tl.max(tops, 0)) * inverse) * UNITS).to(tl.int64)
    reached, total = tl.cumsum(mass, 0), tl.sum(mass, 0)
    for start in range(0, count, GROUP):
        draw = start + tl.arange(0, GROUP)
        number = tl.load(numbers_ptr + row * count + draw, mask=draw < count, other=0.0)
        goal = tl.minimum((number * total).to(tl.int64), total - 1)
        block = tl.sum((reached[None, :] <= goal[:, None]).to(tl.int32), 1)
        goal -= tl.sum(tl.where(slot[None, :] < block[:, None], mass[None, :], 0), 1)
        within = tl.sum(tl.where(slot[None, :] == block[:, None], mass[None, :], 0), 1)
        at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        raw = tl.load(teacher_ptr + row * teacher_width + at, mask=at < teacher_width, other=0.0).to(tl.float32)
        raw = tl.where(at < vocabulary, raw, -float("inf"))
        own = (tl.exp2((raw - tl.max(raw, 1)[:, None]) * inverse) * UNITS).to(tl.int64)
        own_total = tl.sum(own, 1)
        share = (goal.to(tl.float64) + 0.5) / within.to(tl.float64)
        goal = tl.minimum((share * own_total.to(tl.float64)).to(tl.int64), own_total - 1)
        token = block * SIZE + tl.sum((tl.cumsum(own, 1) <= goal[:, None]).to(tl.int32), 1)
        token = tl.minimum(token, vocabulary - 1)  # also where logits are NaN
        tl.store(drawn_ptr + row * count + draw, token, mask=draw < count)
        student = tl.load(student_ptr + row * width + token).to(tl.float32)
        tl.store(at_drawn_ptr + row * count + draw, student, mask=draw < count)


def draws(
    student: Tensor, teacher: Tensor, teacher_parts: Tensor, numbers: Tensor, *, temperature: float, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the teacher by the inverse of its distribution function at ``numbers`` (n, K) in (0, 1), and the student's logits
    there: ``(n, K)`` each.

    Whole numbers are added up, so that a row draws the same wherever it stands. Logits and parts are those of ``supports``.
    """
    blocks, count = teacher_parts.shape[1], numbers.shape[1]
    tokens = torch.empty(numbers.shape, dtype=torch.int32, device=student.device)
    logits = torch.empty(numbers.shape, dtype=torch.float32, device=student.device)
    _draws[(len(numbers),)](
        student, teacher, teacher_parts, numbers, tokens, logits, count, vocabulary, student.stride(0), teacher.stride(0), blocks,
        LOG2_E.value / temperature,
        SLOTS=triton.next_power_of_2(blocks), PARTS=teacher_parts.shape[2], GROUP=GROUP, SIZE=BLOCK_VOCABULARY, num_warps=WARPS,
    )  # fmt: skip
    return tokens, logits
