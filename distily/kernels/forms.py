"""What each form is at one token, for kernels that sweep over a row.

Letters: s and t are the student's and the teacher's probability of the token, f the form's value there, φ = ∂f/∂log s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distily.forms import FORMS, SPARSE_FORMS

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
"""The interpreter knows no instructions of a GPU."""
LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(1.2e-38)
"""The smallest normal number: added to a mean of probabilities, it makes the logarithm of none a number."""

NUMBERS = {name: number for number, name in enumerate([*FORMS, *SPARSE_FORMS])}
"""A form's number in the kernel."""
CROSS_ENTROPY = tl.constexpr(NUMBERS["cross_entropy"])
FORWARD_KL = tl.constexpr(NUMBERS["forward_kl"])
SOFT_CROSS_ENTROPY = tl.constexpr(NUMBERS["soft_cross_entropy"])
REVERSE_KL = tl.constexpr(NUMBERS["reverse_kl"])
JSD = tl.constexpr(NUMBERS["jsd"])
SKEW_KL = tl.constexpr(NUMBERS["skew_kl"])
SKEW_REVERSE_KL = tl.constexpr(NUMBERS["skew_reverse_kl"])
SKEW_REVERSE_KL_DETACHED = tl.constexpr(NUMBERS["skew_reverse_kl_detached"])
TOTAL_VARIATION = tl.constexpr(NUMBERS["total_variation"])
ALPHA_BETA = tl.constexpr(NUMBERS["alpha_beta"])
RENYI = tl.constexpr(NUMBERS["renyi"])
SAMPLED = tl.constexpr(NUMBERS["sampled"])
TOP_BUCKET = tl.constexpr(NUMBERS["top_bucket"])
TOP_RENORMALIZE = tl.constexpr(NUMBERS["top_renormalize"])
TOP_ZERO = tl.constexpr(NUMBERS["top_zero"])


@triton.jit
def log2(x) -> tl.tensor:
    """One instruction, where Triton's has twenty: wrong by less than 2e-7, absolutely between 1/2 and 2 and relatively elsewhere."""
    if COMPILED:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def form_at(FORM: tl.constexpr, p, q, s, t, log_s, log_t) -> tl.tuple:
    """``(f, φ)`` of a form at a token, in the units of ``unit_of``. ``p``, ``q``: its parameters; logarithms to base 2."""
    if FORM == FORWARD_KL:
        return t * (log_t - log_s), -t
    if FORM == SOFT_CROSS_ENTROPY:
        return -t * log_s, -t
    if FORM == REVERSE_KL:
        value = s * (log_s - log_t)
        return value, value
    if FORM == JSD:
        log_m = log2(p * t + ((1.0 - p) * s + LEAST))
        from_s = (1.0 - p) * (s * (log_s - log_m))
        return p * (t * (log_t - log_m)) + from_s, from_s
    if FORM == SKEW_KL:
        m = p * t + ((1.0 - p) * s + LEAST)
        return t * (log_t - log2(m)), -(1.0 - p) * s * t / m
    if FORM == SKEW_REVERSE_KL or FORM == SKEW_REVERSE_KL_DETACHED:
        m = (1.0 - p) * t + (p * s + LEAST)
        value = s * (log_s - log2(m))
        if FORM == SKEW_REVERSE_KL_DETACHED:
            return value, value
        return value, value - (p / LN_2) * s * s / m
    if FORM == TOTAL_VARIATION:
        return 0.5 * tl.abs(t - s), 0.5 * (tl.where(s > t, s, 0.0) - tl.where(s < t, s, 0.0))
    if FORM == ALPHA_BETA:
        both = tl.exp2(p * log_t + q * log_s)
        own = tl.exp2((p + q) * log_s)
        value = (p * tl.exp2((p + q) * log_t) + q * own - (p + q) * both) / (p * q * (p + q))
        return value, (own - both) / p
    power = tl.exp2(p * log_t + (1.0 - p) * log_s)
    return power, -power


@triton.jit
def unit_of(FORM: tl.constexpr) -> tl.tuple:
    """How many nats f and φ count: a bit where they are made of logarithms, but φ of those that are linear in log s."""
    of_f = 1.0 if FORM == TOTAL_VARIATION or FORM == ALPHA_BETA or FORM == RENYI else LN_2
    linear = FORM == FORWARD_KL or FORM == SOFT_CROSS_ENTROPY or FORM == SKEW_KL
    return of_f, 1.0 if linear else of_f
