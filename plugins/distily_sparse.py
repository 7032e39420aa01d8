"""Divergences on a part of the vocabulary, and targets sampled from the teacher.

Letters: N supervised tokens, V vocabulary, S the support: the tokens that are compared one by one; s and t are the student's and the
teacher's distributions.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from distily import hookimpl
from distily.distributions import jensen_shannon, log_conditional, log_distributions, log_mass, relative_entropy
from distily.forms import Form
from distily.objectives import token_objective, uniform
from distily.schema import Between

Support = Literal["teacher", "student", "union"]
Tail = Literal["bucket", "renormalize", "zero"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Size = Annotated[int, Between(1)]

UNITS = 2**52
"""How many units a probability of 1 has in sums that must not depend on their order."""


def _cumulative(log_p: Tensor) -> Tensor:
    """Σ of the probabilities up to each token, in ``UNITS``: integers add up to the same in whatever order a device takes."""
    return (log_p.double().exp() * UNITS).long().cumsum(-1)


def _likeliest(log_p: Tensor, k: int, p: float | None) -> Tensor:
    """The k likeliest tokens or, with ``p``, as many of them as it takes to reach that mass: ``(N, V) -> (N, V)``, true or false."""
    top, tokens = log_p.detach().topk(min(k, log_p.shape[-1]), -1)
    before = pad(_cumulative(top)[:, :-1], (1, 0))
    kept = before < (math.inf if p is None else p * UNITS)
    return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, tokens, kept)


def _restricted(
    student_logits: Tensor, teacher_logits: Tensor, k: int, p: float | None, tail: Tail, support: Support, divergence: Divergence
) -> Tensor:
    """The divergence of both distributions, each cut to the support."""
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    sides = {"teacher": (log_t,), "student": (log_s,), "union": (log_t, log_s)}[support]
    inside = torch.stack([_likeliest(side, k, p) for side in sides]).any(0)
    log_s, log_t = (_cut(log_p, inside, tail) for log_p in (log_s, log_t))
    if divergence == "jsd":
        return jensen_shannon(log_t, log_s, 0.5)
    return relative_entropy(log_t, log_s) if divergence == "forward_kl" else relative_entropy(log_s, log_t)


def _cut(log_p: Tensor, inside: Tensor, tail: Tail) -> Tensor:
    """``(N, V) -> (N, V)``, or ``(N, V + 1)`` with the bucket last; -inf outside of the support."""
    if tail == "renormalize":
        return log_conditional(log_p, inside)
    kept = log_p.masked_fill(~inside, -math.inf)
    return torch.cat([kept, log_mass(log_p, ~inside)], -1) if tail == "bucket" else kept


def _forms(k: int, p: float, tail: Tail, support: Support, divergence: Divergence) -> tuple[Form, ...]:
    """One form on the teacher's support, by what becomes of the tail; none for the other supports and divergences."""
    return (Form(f"top_{tail}", (k, p)),) if (support, divergence) == ("teacher", "forward_kl") else ()


@token_objective(
    aliases=("topk", "top_k_kl"),
    forms=lambda k, tail, support, divergence: _forms(k, 1.0, tail, support, divergence),
    formula="KL(t'‖s'),  p' = (p_v for v ∈ S, 1 − p_S),  S = the k likeliest tokens",
    source="Peng et al. 2024, arXiv:2410.16215; tail bucket as in TRL and DistillKit",
)
def top_k(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: Size = 64,
    tail: Tail = "bucket",
    support: Support = "teacher",
    divergence: Divergence = "forward_kl",
) -> Tensor:
    """A divergence on the k likeliest tokens: what training on a teacher's stored top-k predictions sees.

    Here the teacher's logits are whole, so nothing is saved; use it to learn what a cut costs before predictions are stored.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range, with the defaults, [0, KL over all tokens], in nats; it never falls as k grows and is
    all of it at k = V. Zero where the distributions are equal. Gradient of forward KL by what becomes of the tokens outside of S:

    - ``bucket``: s − t in S, s (1 − t_out / s_out) outside.
    - ``renormalize``: ŝ − t̂ in S, none outside: mass that the student has there stays.
    - ``zero``: t_S s − t in S, t_S s outside. Least, with t_S ln t_S < 0, where all of the student's mass is in S and it is too sure
      by 1 / t_S (t_S: the teacher's mass of S): biased, as training on stored entries alone is.

    Options: ``k``, tokens in S. ``tail``: ``bucket`` counts the tokens outside of S together as one, ``renormalize`` makes both
    sides sum to 1 on S, ``zero`` leaves the others out and the probabilities as they are. ``support``: whose likeliest tokens;
    ``union`` has up to 2 k. ``divergence``: ``forward_kl``, ``reverse_kl`` or ``jsd`` with β = ½. Reverse KL weighs tokens by the
    student, so take the student's support; it is infinite where the student has mass that the teacher rules out (-inf).

    Source: Peng et al. 2024 (pre-training distillation), arXiv:2410.16215; the bucket as in TRL and DistillKit.

    >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    >>> top_k(student, teacher, k=1)  # 0.7 ln(0.7 / 0.25) + 0.3 ln(0.3 / 0.75)
    tensor([0.4458])
    >>> top_k(student, teacher, k=1, tail="zero")  # 0.7 ln(0.7 / 0.25)
    tensor([0.7207])
    """
    return _restricted(student_logits, teacher_logits, k, None, tail, support, divergence)


@token_objective(
    aliases=("topp", "nucleus", "top_p_k"),
    forms=lambda k, p, tail, support, divergence: _forms(k, p, tail, support, divergence),
    formula="KL(t'‖s'),  p' = (p_v for v ∈ S, 1 − p_S),  S = the fewest tokens of mass ≥ p, at most k",
    source="Peng et al. 2024, arXiv:2410.16215",
)
def top_p(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    p: Annotated[float, Between(0, 1, excluding=(0,))] = 0.95,
    k: Size = 100,
    tail: Tail = "bucket",
    support: Support = "teacher",
    divergence: Divergence = "forward_kl",
) -> Tensor:
    """``top_k`` on as many tokens as it takes: few where the teacher is sure, up to k where it is not.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range and gradient as those of ``top_k``. A temperature changes which tokens are chosen.

    Options: ``p``, the mass that the likeliest tokens must reach. ``k``, tokens at most. ``tail``, ``support`` and ``divergence``:
    those of ``top_k``.

    Source: Peng et al. 2024 (pre-training distillation, top 0.95 then top 50 or 100), arXiv:2410.16215.

    >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    >>> top_p(student, teacher, p=0.6) == top_k(student, teacher, k=1)
    tensor([True])
    """
    return _restricted(student_logits, teacher_logits, k, p, tail, support, divergence)


def _draw(log_q: Tensor, row_seeds: Tensor, count: int) -> Tensor:
    """``count`` tokens for each row, with replacement, by the inverse of the distribution function: ``(N, V) -> (N, count)``."""
    reached = _cumulative(log_q)
    total = reached[:, -1:]
    thresholds = (uniform(row_seeds, count) * total).long()
    return torch.searchsorted(reached, torch.minimum(thresholds, total - 1), right=True)


@token_objective(
    aliases=("rs_kd", "random_sampling_kd", "sampled"),
    forms=lambda samples, rho: (Form("sampled", (samples,)),) if rho == 1.0 else (),
    zero_at_equality=False,
    formula="−Σ_i w_i log s_{v_i},  v_1 … v_K ~ q ∝ t^ρ,  w_i = t_{v_i} / (K q_{v_i})",
    source="Anshumann et al. 2025, arXiv:2503.16870",
)
def sampled_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    row_seeds: Tensor,
    samples: Size = 50,
    rho: Annotated[float, Between(0, 4, excluding=(0,))] = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Soft cross-entropy with tokens drawn from the teacher as the target: right on average, where ``top_k`` is biased.

    About a dozen distinct tokens were enough in the paper. Here they are drawn anew in every step from the teacher's whole logits,
    at 16 bytes of memory for each logit of a chunk.

    Shapes: ``(N, V), (N, V), row_seeds (N,) -> (N,)``. Range [0, ∞), in nats; at equality about H(t), above 0. With ρ = 1 value
    and gradient (s − w) are unbiased for those of ``soft_cross_entropy``; entry v of w has variance t_v (1 − t_v) / K.

    Options: ``samples``, K, with replacement. ``rho``, ρ: 1 draws from the teacher, smaller ones draw rare tokens more often.
    ``normalize``: divide the weights by their sum; without effect at ρ = 1, elsewhere less variance for a bias of order 1/K.

    Source: Anshumann et al. 2025, arXiv:2503.16870.

    >>> sure = torch.tensor([[0.0, -float("inf")]])  # every draw is token 0
    >>> sampled_targets(torch.zeros(1, 2), sure, row_seeds=torch.tensor([7]))
    tensor([0.6931])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits.detach())
    log_q = log_t if rho == 1.0 else (rho * log_t).log_softmax(-1)
    tokens = _draw(log_q, row_seeds, samples)
    log_weights = (log_t - log_q).gather(-1, tokens)
    weights = log_weights.softmax(-1) if normalize else log_weights.exp() / samples
    return -(weights * log_s.gather(-1, tokens)).sum(-1)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"top_k": top_k, "top_p": top_p, "sampled_targets": sampled_targets}
