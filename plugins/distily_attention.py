"""Attention maps of student and teacher, query by query: what each head looks at.

Letters: N supervised tokens, A heads, K keys.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.distributions import relative_entropy
from distily.objectives import token_objective

Heads = Literal["match", "mean"]


@token_objective(
    on=("attentions",),
    aliases=("attn_kl", "minilm_at", "attention_transfer_kl"),
    formula="mean_a KL(P^t_a,i ‖ P^s_a,i);  P_a,i = softmax_k of the scores of query i in head a",
    source="Sun et al. 2020, arXiv:2004.02984",
)
def attention_kl(student: Tensor, teacher: Tensor, *, heads: Heads = "match", drop_first_key: bool = False) -> Tensor:
    """KL(teacher‖student) between attention distributions, head by head: the student looks where the teacher looks.

    Scores are formed from the queries and keys that the attention itself gets, after rotary embedding; SDPA stays.

    Shapes: ``(N, A_s, K), (N, A_t, K)`` scores, -inf where a query may not look, ``-> (N,)``. Range [0, ∞), in nats; zero where the
    distributions are equal. Infinite where the teacher looks at what the student may not (a shorter window). Gradient at the
    student's scores: (P^s − P^t) / A. A temperature divides the scores, its square multiplies the value.

    Options:
        heads: ``match`` compares head a with head a: equal numbers, and heads that correspond (a student made from the teacher's
            layers). ``mean`` compares the mean distributions of all heads, for any numbers of them.
        drop_first_key: leaves the document's first token out and renormalises the rest, since it often holds most of the mass and
            so rules the divergence. Exploratory. A query that sees no other key gives 0.

    Evidence: encoders (MobileBERT in every layer, MiniLM in the last one). Cost: N · K scores for each head and layer, in chunks.

    Source: Sun et al. 2020 (MobileBERT), arXiv:2004.02984; Wang et al. 2020 (MiniLM), arXiv:2002.10957.

    >>> scores = torch.tensor([[[0.0, 1.0, -torch.inf]]])  # one query, one head, the third key masked
    >>> attention_kl(scores + 5.0, scores)
    tensor([0.])
    """
    _compare_heads(student, teacher, heads)
    log_s, log_t = (_log_attention(scores, heads, drop_first_key) for scores in (student, teacher))
    return relative_entropy(log_t, log_s).mean(-1)


@token_objective(
    on=("attentions",),
    aliases=("attn_mse", "attention_transfer_mse"),
    formula="mean_a,k (z^s_a,ik − z^t_a,ik)², over the keys k that query i may look at",
    source="Jiao et al. 2020, arXiv:1909.10351",
)
def attention_mse(
    student: Tensor, teacher: Tensor, *, of: Literal["scores", "probabilities"] = "scores", heads: Heads = "match"
) -> Tensor:
    """Mean squared difference of attention scores (or probabilities), over heads and the keys that a query may look at.

    Scores before the softmax, as TinyBERT takes them, also count a constant that the softmax forgets: prefer ``attention_kl``, or
    ``of=probabilities``, whose value falls as 1/K² with the number of keys.

    Shapes: ``(N, A_s, K), (N, A_t, K)`` scores, -inf where a query may not look, ``-> (N,)``. Range [0, ∞), for probabilities [0, 1];
    zero where they are equal. Every query counts once, however many keys it has; masked keys count nowhere. Gradient at the scores:
    2 (z^s − z^t) / (A keys).

    Options:
        of: what is compared, ``scores`` or ``probabilities``.
        heads: ``match`` compares head a with head a: equal numbers, and heads that correspond. ``mean`` compares means over the heads.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351.

    >>> attention_mse(torch.tensor([[[0.0, 3.0, -torch.inf]]]), torch.tensor([[[0.0, 1.0, -torch.inf]]]))
    tensor([2.])
    """
    _compare_heads(student, teacher, heads)
    seen = [scores.isfinite() for scores in (student, teacher)]
    sides = [scores.softmax(-1) if of == "probabilities" else scores for scores in (student, teacher)]
    if heads == "mean":
        seen, sides = [each.all(-2, keepdim=True) for each in seen], [each.mean(-2, keepdim=True) for each in sides]
    both = seen[0] & seen[1]
    squares = (torch.where(both, sides[0], 0.0) - torch.where(both, sides[1], 0.0)).square()
    return (squares.sum(-1) / both.sum(-1).clamp(min=1)).mean(-1)


def _compare_heads(student: Tensor, teacher: Tensor, heads: Heads) -> None:
    if heads == "match" and student.shape[-2] != teacher.shape[-2]:
        raise ValueError(
            f"{student.shape[-2]} attention heads of the student do not match {teacher.shape[-2]} of the teacher; "
            "allowed: heads=mean, or self_relation, which needs no equal heads"
        )


def _log_attention(scores: Tensor, heads: Heads, drop_first_key: bool) -> Tensor:
    """Log-probabilities of the keys, ``(N, A, K)``, or ``(N, 1, K)`` of the mean over heads; -inf for masked keys."""
    seen = scores.isfinite()
    if drop_first_key:
        others = seen[..., 1:].any(-1, keepdim=True)
        seen = torch.cat([seen[..., :1] & ~others, seen[..., 1:]], -1)
        scores = scores.masked_fill(~seen, -torch.inf)
    log_p = scores.log_softmax(-1)
    if heads == "match":
        return log_p
    # exp of a masked key would have no gradient: where no head looks, the mean is put in afterwards
    seen = seen.any(-2, keepdim=True)
    return (torch.where(seen, log_p, 0.0).logsumexp(-2, keepdim=True) - math.log(scores.shape[-2])).masked_fill(~seen, -torch.inf)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"attention_kl": attention_kl, "attention_mse": attention_mse}
