"""One pass over the logits of student and teacher: the value of every term of a family, and the gradient at the student's logits.

A term is Σ_v f(log s_v, log t_v). With φ = ∂f/∂log s its gradient at logit v is φ_v − s_v Σ_u φ_u. The log-sum-exps come from the
product that made the logits; where Σφ is known beforehand, as for forward KL and the cross-entropies, one sweep over a row writes
values and gradient. All other forms, the late ones, have one sweep for their Σφ before that. Sparse forms come with what
``distily.kernels.targets`` found: the bounds of the chosen tokens, which the sweep tells by their logits, or drawn tokens, where the
gradient is written once more.
Letters: N rows, V vocabulary, W the width of a row of the buffers, F forms; s and t are the student's and the teacher's distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distily.kernels.forms import (
    ALPHA_BETA,
    CROSS_ENTROPY,
    FORWARD_KL,
    LN_2,
    NUMBERS,
    RENYI,
    SAMPLED,
    SOFT_CROSS_ENTROPY,
    TOP_BUCKET,
    form_at,
    unit_of,
)  # fmt: skip
from distily.kernels.products import LOG2_E, processors

BLOCK, WARPS, REGISTERS = 4096, 16, 64
"""Tokens that a program holds at a time, its warps, and the registers of a thread: as many as let two programs run on a processor."""
LOWEST, HUGE = tl.constexpr(-1e38), tl.constexpr(1e12)
"""The logarithm of no probability, a number too; and from where on a value of logarithms is infinite, as it counted such a one."""

SUPPORT = 5
"""Numbers that describe the support of a row and form, see ``distily.kernels.targets.supports``."""


@triton.jit
def _log(pointer, at, width, inverse, log_mass):
    """Stored logits and their log-probabilities to base 2, which are finite: where there is no mass, very low."""
    raw = tl.load(pointer + at, mask=at < width, other=-float("inf")).to(tl.float32)
    return raw, tl.maximum(raw * inverse - log_mass, LOWEST)


@triton.jit
def _within(values):
    """Sums within each thread, which holds eight numbers that lie together: ``(BLOCK,) -> (BLOCK / 8,)``."""
    return tl.sum(tl.reshape(values, (values.shape[0] // 8, 8)), 1)


@triton.jit
def log_mass(parts_ptr, blocks, inverse, place, PARTS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """The log-sum-exp of a row to base 2, from the tops and sums of its blocks."""
    at = tl.arange(0, SLOTS)
    tops = tl.load(parts_ptr + at * PARTS, mask=at < blocks, other=-float("inf"))
    sums = tl.load(parts_ptr + at * PARTS + place, mask=at < blocks, other=0.0)
    top = tl.max(tops, 0)
    return top * inverse + tl.log2(tl.sum(sums * tl.exp2((tops - top) * inverse), 0))


@triton.jit
def _late_sums(
    student, teacher, coefficients_ptr, parameters_ptr, width, teacher_width, inverse, log_mass_s, log_mass_t,
    FORMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sweep over a row: Σ f of every late form (others 0), and Σ over them of coefficient · Σφ, without that of ``renyi``."""
    nothing = tl.zeros((BLOCK // 8,), tl.float32)
    slopes, sums = nothing, ()
    for place in tl.static_range(COUNT):  # noqa: B007
        sums = sums + (nothing,)  # noqa: RUF005
    blocks = tl.cdiv(width, BLOCK)
    for step in range(blocks):
        at = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)  # from the end: the next sweep finds the beginning in the cache
        _, log_s = _log(student, at, width, inverse, log_mass_s)
        _, log_t = _log(teacher, at, teacher_width, inverse, log_mass_t)
        s, t = tl.exp2(log_s), tl.exp2(log_t)
        moved = ()
        for place in tl.static_range(COUNT):
            total = sums[place]
            if FORMS[place] > SOFT_CROSS_ENTROPY and FORMS[place] < SAMPLED:
                p, q = tl.load(parameters_ptr + 2 * place), tl.load(parameters_ptr + 2 * place + 1)
                f, phi = form_at(FORMS[place], p, q, s, t, log_s, log_t)
                total += _within(f)
                if FORMS[place] != RENYI:
                    slopes += (tl.load(coefficients_ptr + place) * unit_of(FORMS[place])[1]) * _within(phi)
            moved = moved + (total,)  # noqa: RUF005
        sums = moved
    return sums, tl.sum(slopes, 0)


@triton.jit
def _slopes(
    student, teacher, values_ptr, coefficients_ptr, parameters_ptr, width, teacher_width, values_width, inverse, log_mass_s, log_mass_t,
    FORMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WARM: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Σ over the forms of coefficient · Σφ, and Σ t^α s^(1−α) where a form needs it; values of the late forms are stored."""
    slopes, power = 0.0, 1.0
    if LATE:
        sums, slopes = _late_sums(
            student, teacher, coefficients_ptr, parameters_ptr, width, teacher_width, inverse, log_mass_s, log_mass_t, FORMS, COUNT, BLOCK,
        )  # fmt: skip
    for place in tl.static_range(COUNT):
        if FORMS[place] > SOFT_CROSS_ENTROPY and FORMS[place] < SAMPLED:
            value = tl.sum(sums[place], 0) * unit_of(FORMS[place])[0]
            if FORMS[place] == RENYI:
                power = value
                value = tl.log2(value) * LN_2 / (tl.load(parameters_ptr + 2 * place) - 1.0)
                slopes -= tl.load(coefficients_ptr + place)  # Σφ ÷ power
            elif FORMS[place] != ALPHA_BETA:
                value = tl.where(value > HUGE, float("inf"), value)
            tl.store(values_ptr + place * values_width, value)
        elif FORMS[place] <= SAMPLED and not (FORMS[place] == CROSS_ENTROPY and WARM):
            slopes -= tl.load(coefficients_ptr + place)
    return slopes, power


@triton.jit
def _gradient(
    raw, raw_t, s, t, log_s, log_t, at, gradient, coefficients_ptr, parameters_ptr, support_ptr, supports_step, cap, log_mass_hard,
    label, reference, slopes, power,
    FORMS: tl.constexpr, COUNT: tl.constexpr, WARM: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The gradient at the head's output for the tokens ``at``; ``gradient``: what is to be added at their logits besides."""
    gradient -= slopes * s
    for place in tl.static_range(COUNT):
        coefficient = tl.load(coefficients_ptr + place)  # supports have theirs within
        if FORMS[place] == CROSS_ENTROPY:
            gradient -= tl.where(at == label, coefficient, 0.0)
            if WARM:
                gradient += coefficient * tl.exp2(raw * LOG2_E - log_mass_hard)
        elif FORMS[place] >= TOP_BUCKET:
            support = support_ptr + place * supports_step
            bound, last = tl.load(support), tl.load(support + 1).to(tl.int32)
            inside = (raw_t > bound) | ((raw_t == bound) & (at <= last))
            gradient += tl.where(inside, tl.load(support + 2) * s - tl.load(support + 3) * t, tl.load(support + 4) * s)
        elif FORMS[place] != SAMPLED:
            p, q = tl.load(parameters_ptr + 2 * place), tl.load(parameters_ptr + 2 * place + 1)
            _, phi = form_at(FORMS[place], p, q, s, t, log_s, log_t)
            unit = unit_of(FORMS[place])[1] / power if FORMS[place] == RENYI else unit_of(FORMS[place])[1]
            gradient += (coefficient * unit) * phi
    if HAS_CAP:
        capped = (raw + reference) / cap
        gradient *= tl.where(raw > -float("inf"), 1.0 - capped * capped, 0.0)
    return gradient


@triton.jit
def _sweep(
    student, teacher, gradient_ptr, coefficients_ptr, parameters_ptr, support_ptr, supports_step, width, teacher_width, inverse, cap,
    log_mass_s, log_mass_t, log_mass_hard, label, reference, slopes, power,
    FORMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, HAS_TEACHER: tl.constexpr, FORWARD: tl.constexpr,
    SOFT: tl.constexpr, WARM: tl.constexpr, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a row; gives the values of ``forward_kl`` and ``soft_cross_entropy``, where they are wanted."""
    forward = tl.zeros((BLOCK // 8,), tl.float32)
    soft = forward
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw, log_s = _log(student, at, width, inverse, log_mass_s)
        s, t, log_t, raw_t = tl.exp2(log_s), log_s, log_s, raw
        if HAS_TEACHER:
            raw_t, log_t = _log(teacher, at, teacher_width, inverse, log_mass_t)
            t = tl.exp2(log_t)
        if FORWARD:
            forward += _within(form_at(FORWARD_KL, 0.0, 0.0, s, t, log_s, log_t)[0])
        if SOFT:
            soft += _within(form_at(SOFT_CROSS_ENTROPY, 0.0, 0.0, s, t, log_s, log_t)[0])
        if GRADIENT:
            gradient = _gradient(
                raw, raw_t, s, t, log_s, log_t, at, 0.0, coefficients_ptr, parameters_ptr, support_ptr, supports_step, cap,
                log_mass_hard, label, reference, slopes, power, FORMS, COUNT, WARM, HAS_CAP,
            )  # fmt: skip
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=at < width)
    return tl.sum(forward, 0) * LN_2, tl.sum(soft, 0) * LN_2


@triton.jit
def _at_drawn(
    drawn_ptr, at_drawn_ptr, draws, teacher, gradient_ptr, coefficients_ptr, parameters_ptr, support_ptr, supports_step, inverse,
    cap, log_mass_s, log_mass_t, log_mass_hard, label, reference, slopes, power,
    FORMS: tl.constexpr, COUNT: tl.constexpr, DRAWS: tl.constexpr, WARM: tl.constexpr, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient at drawn tokens anew, with what the draws add; gives the value of ``sampled``."""
    draw = tl.arange(0, DRAWS)
    drawn = tl.load(drawn_ptr + draw, mask=draw < draws, other=-1)
    raw = tl.load(at_drawn_ptr + draw, mask=draw < draws, other=0.0)  # from before the sweep wrote over it
    log_s = raw * inverse - log_mass_s
    if GRADIENT:
        raw_t = tl.load(teacher + drawn, mask=drawn >= 0, other=0.0).to(tl.float32)
        log_t = raw_t * inverse - log_mass_t
        pull = tl.sum((drawn[:, None] == drawn[None, :]).to(tl.float32), 1)  # a token that is drawn twice is written twice, alike
        for place in tl.static_range(COUNT):
            if FORMS[place] == SAMPLED:
                pull *= -tl.load(coefficients_ptr + place) / draws
        gradient = _gradient(
            raw, raw_t, tl.exp2(log_s), tl.exp2(log_t), tl.maximum(log_s, LOWEST), tl.maximum(log_t, LOWEST), drawn,
            pull, coefficients_ptr, parameters_ptr, support_ptr,
            supports_step, cap, log_mass_hard, label, reference, slopes, power, FORMS, COUNT, WARM, HAS_CAP,
        )  # fmt: skip
        tl.debug_barrier()  # the sweep wrote there
        tl.store(gradient_ptr + drawn, gradient.to(gradient_ptr.dtype.element_ty), mask=drawn >= 0)
    return tl.sum(tl.where(drawn >= 0, -log_s, 0.0), 0) / draws * LN_2


@triton.jit(do_not_specialize=["rows", "values_width", "supports_step"])
def _rows(
    student_ptr, teacher_ptr, gradient_ptr, labels_ptr, reference_ptr, student_parts_ptr, teacher_parts_ptr, values_ptr,
    coefficients_ptr, parameters_ptr, supports_ptr, drawn_ptr, at_drawn_ptr, rows, width, teacher_width, teacher_step, values_width,
    supports_step, draws, student_blocks, teacher_blocks, inverse, cap,
    FORMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr,
    STUDENT_PARTS: tl.constexpr, TEACHER_PARTS: tl.constexpr, SUPPORT: tl.constexpr, DRAWS: tl.constexpr, FORWARD: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, WARM: tl.constexpr, LATE: tl.constexpr, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    wide, teacher_wide = width.to(tl.int64), teacher_step.to(tl.int64)
    for row in tl.range(tl.program_id(0), rows, PROGRAMS):
        student, teacher, values = student_ptr + row * wide, teacher_ptr + row * teacher_wide, values_ptr + row
        gradient, support = gradient_ptr + row * wide, supports_ptr + row * SUPPORT
        parts = student_parts_ptr + row * student_blocks * STUDENT_PARTS
        log_mass_s = log_mass(parts, student_blocks, inverse, 1, STUDENT_PARTS, SLOTS)
        log_mass_t, log_mass_hard, label, sampled = 0.0, 0.0, 0, 0.0
        if TEACHER_PARTS:
            parts_t = teacher_parts_ptr + row * teacher_blocks * TEACHER_PARTS
            log_mass_t = log_mass(parts_t, teacher_blocks, inverse, 1, TEACHER_PARTS, SLOTS)
        if HARD:
            label = tl.load(labels_ptr + row).to(tl.int32)
            log_mass_hard = log_mass(parts, student_blocks, LOG2_E, 2, STUDENT_PARTS, SLOTS) if WARM else log_mass_s
            at_label = tl.load(student + label).to(tl.float32)
            for place in tl.static_range(COUNT):
                if FORMS[place] == CROSS_ENTROPY:
                    tl.store(values + place * values_width, log_mass_hard * LN_2 - at_label)
            tl.debug_barrier()  # it is read before it is overwritten
        reference = tl.load(reference_ptr + row) if HAS_CAP else 0.0
        slopes, power = _slopes(
            student, teacher, values, coefficients_ptr, parameters_ptr, width, teacher_width, values_width, inverse, log_mass_s, log_mass_t,
            FORMS, COUNT, BLOCK, WARM, LATE,
        )  # fmt: skip
        forward, soft = _sweep(
            student, teacher, gradient, coefficients_ptr, parameters_ptr, support, supports_step, width, teacher_width,
            inverse, cap, log_mass_s, log_mass_t, log_mass_hard, label, reference, slopes, power,
            FORMS, COUNT, BLOCK, TEACHER_PARTS != 0, FORWARD, SOFT, WARM, HAS_CAP, GRADIENT,
        )  # fmt: skip
        if DRAWS:
            sampled = _at_drawn(
                drawn_ptr + row * draws, at_drawn_ptr + row * draws, draws, teacher, gradient, coefficients_ptr, parameters_ptr, support,
                supports_step, inverse, cap, log_mass_s, log_mass_t, log_mass_hard, label, reference, slopes, power,
                FORMS, COUNT, DRAWS, WARM, HAS_CAP, GRADIENT,
            )  # fmt: skip
        for place in tl.static_range(COUNT):
            if FORMS[place] == FORWARD_KL:
                tl.store(values + place * values_width, tl.where(forward > HUGE, float("inf"), forward))
            elif FORMS[place] == SOFT_CROSS_ENTROPY:
                tl.store(values + place * values_width, tl.where(soft > HUGE, float("inf"), soft))
            elif FORMS[place] == SAMPLED:
                tl.store(values + place * values_width, sampled)


def rows_pass(
    student: Tensor,
    teacher: Tensor | None,
    gradient: Tensor | None,
    student_parts: Tensor,
    teacher_parts: Tensor | None,
    forms: Sequence[str],
    coefficients: Tensor,
    parameters: Tensor,
    labels: Tensor,
    reference: Tensor,
    values: Tensor,
    *,
    temperature: float,
    cap: float | None = None,
    supports: Tensor | None = None,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Values of every form and row to ``values`` (F, n), in nats; Σ coefficient · gradient at the head's output to ``gradient``.

    ``student`` and ``teacher`` (n, W): logits up to an offset in each row, in any floating dtype and -inf beyond V, or the teacher's
    (n, V), with the ``parts`` that ``relative_logits`` gives, ``hard`` where ``cross_entropy`` stands beside a temperature;
    ``gradient`` (n, W) may lie over ``student``, and is 0 beyond V. ``coefficients`` (F,) and ``parameters`` (F, 2) in float32; the
    temperature divides all logits but those of ``cross_entropy``; coefficients of the others include 1/T, and all of them the scale of
    the student's class. ``reference`` (n,): what was taken off ``student``, for soft-capping at ``cap`` alone. ``forms``: names, at most
    one ``renyi`` and one ``sampled``. The ``top`` forms need the ``supports`` (F, n, 5) of ``distily.kernels.targets``, which has their
    values; ``sampled`` the tokens and logits ``drawn`` there, (n, draws) each.
    """
    numbers = tuple(NUMBERS[form] for form in forms)
    draws = 0 if drawn is None else drawn[0].shape[1]
    programs = 2 * processors(student.device)  # however few the rows: no constant may follow the batch
    blocks = [0 if parts is None else parts.shape[1] for parts in (student_parts, teacher_parts)]
    _rows[(programs,)](
        student, student if teacher is None else teacher, student if gradient is None else gradient, labels, reference,
        student_parts, student_parts if teacher_parts is None else teacher_parts, values, coefficients, parameters,
        values if supports is None else supports, *(drawn or (labels, values)),
        len(student), student.stride(0), (student if teacher is None else teacher).shape[1],
        (student if teacher is None else teacher).stride(0), values.stride(0),
        0 if supports is None else supports.stride(0), draws, *blocks, LOG2_E.value / temperature, cap or 1.0,
        FORMS=numbers, COUNT=len(numbers), BLOCK=BLOCK, PROGRAMS=programs, SLOTS=triton.next_power_of_2(max(blocks)),
        STUDENT_PARTS=student_parts.shape[2], TEACHER_PARTS=0 if teacher_parts is None else teacher_parts.shape[2],
        SUPPORT=SUPPORT, DRAWS=triton.next_power_of_2(draws), FORWARD="forward_kl" in forms, SOFT="soft_cross_entropy" in forms,
        HARD="cross_entropy" in forms, WARM=temperature != 1.0,
        LATE=any(SOFT_CROSS_ENTROPY.value < number < SAMPLED.value for number in numbers),
        HAS_CAP=cap is not None, GRADIENT=gradient is not None,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
