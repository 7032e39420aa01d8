"""Self-relations of queries, keys or values: how much each token of a document is like every other, head by head.

Letters: n tokens of one document, H width, A relation heads, D = H / A width of a relation head.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.distributions import relative_entropy
from distily.objectives import row_set_objective
from distily.schema import Between

MOST_HEADS, NARROWEST_HEAD = 48, 8
"""What ``relation_heads=null`` may choose."""


@row_set_objective(
    on=("queries", "keys", "values"),
    equal_widths=False,
    aliases=("minilmv2", "minilm_v2", "minilm_vr", "bitdistill_ad", "relation_kl", "attention_relation"),
    formula="mean_a KL(R^t_a,i ‖ R^s_a,i);  R_a,i = softmax_j(⟨x_a,i, x_a,j⟩ / (√D τ))",
    source="Wang et al. 2021, arXiv:2012.15828",
)
def self_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    relation_heads: None | Annotated[int, Between(1)] = None,  # noqa: RUF036
    normalize: Literal["none", "l2"] = "none",
    temperature: Annotated[float, Between(0, 1e6, excluding=(0,))] = 1.0,
    causal: bool = False,
    max_rows: Annotated[int, Between(1)] = 256,
) -> Tensor:
    """KL(teacher‖student) between the relations of a document's tokens to each other; widths and heads of the two models may differ.

    The width is cut into relation heads, whatever the model's own heads are. In each, a token's relation is the softmax over the
    document's tokens of its scaled products with them. No projector is needed.

    Shapes: ``(n, H_s), (n, H_t) -> (n,)``: row i is the mean over relation heads of the KL of token i's relations. Range [0, ∞), in nats;
    zero where the relations are equal, hence also for states that differ by a rotation within each relation head. One token alone
    gives 0. Memory O(A n²).

    MiniLMv2: three terms at one pair of layers, the student's last with a late one of the teacher's::

        self_relation:on=queries,relation_heads=48,mapper=index(pairs=[[-1,-4]])
        self_relation:on=keys,relation_heads=48,mapper=index(pairs=[[-1,-4]])
        self_relation:on=values,relation_heads=48,mapper=index(pairs=[[-1,-4]])

    MiniLM: two terms at the last layers, with as many relation heads as the models have value heads::

        attention_kl:mapper=last_k
        self_relation:on=values,relation_heads=12,mapper=last_k

    BitDistill: three terms at one layer, late but not last. Relations over many tokens are nearly uniform, hence its large weights::

        self_relation:on=queries,normalize=l2,weight=1e3
        self_relation:on=keys,normalize=l2,weight=1e3
        self_relation:on=values,normalize=l2,weight=1e3

    Options:
        relation_heads: A, must divide both widths. null: the most that do, up to 48, with heads at least 8 wide. MiniLMv2 for base
            size: 48. Relations of wider heads are sharper.
        normalize: ``none`` divides the products by √D; ``l2`` takes cosines in their stead, so that lengths do not count (BitDistill).
        temperature: τ, divides them further; nothing multiplies the result. Default 1. Cosines need about 0.1 to say much.
        causal: a token relates to itself and those before it. Default false, as published: the states have seen only their past.
        max_rows: tokens of a document, drawn by the driver, in the order of the text; relations are among these. Default 256.

    Evidence: encoders; for decoders it is mixed (BitDistill gains, Minitron saw none).

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957; Wang et al. 2021 (MiniLMv2), arXiv:2012.15828; Wu et al. 2025 (BitDistill),
    arXiv:2510.13998.

    >>> states = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> self_relation(states, states @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # the same after a quarter turn
    tensor([0., 0.])
    """
    del max_rows  # the driver reads it before it draws the rows
    heads = _relation_heads(student.shape[-1], teacher.shape[-1], relation_heads)
    log_s, log_t = (_log_relations(states, heads, normalize, temperature, causal) for states in (student, teacher))
    return relative_entropy(log_t, log_s).mean(0)


def _log_relations(states: Tensor, heads: int, normalize: str, temperature: float, causal: bool) -> Tensor:
    """The logarithm of each token's relation to every other: ``(n, H) -> (A, n, n)``."""
    split = states.unflatten(-1, (heads, -1)).transpose(0, 1)
    if normalize == "l2":
        split, scale = torch.nn.functional.normalize(split, dim=-1), 1.0 / temperature
    else:
        scale = 1.0 / (math.sqrt(split.shape[-1]) * temperature)
    scores = split @ split.mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.log_softmax(-1)


def _relation_heads(student_width: int, teacher_width: int, wanted: int | None) -> int:
    common = math.gcd(student_width, teacher_width)
    if wanted is None:
        fitting = (heads for heads in range(1, MOST_HEADS + 1) if common % heads == 0)
        return max(heads for heads in fitting if heads == 1 or min(student_width, teacher_width) >= heads * NARROWEST_HEAD)
    if common % wanted:
        allowed = ", ".join(str(heads) for heads in range(1, common + 1) if common % heads == 0)
        raise ValueError(
            f"{wanted} relation heads do not divide the widths {student_width} and {teacher_width}; allowed: {allowed}"
        )
    return wanted


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"self_relation": self_relation}
