"""Divergences between teacher and student next-token distributions, and label cross-entropy.

Letters: N supervised tokens, V vocabulary; s and t are the student's and the teacher's distributions.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from distily import hookimpl
from distily.objectives import token_objective
from distily.schema import Between


def _log_softmax(*logits: Tensor) -> list[Tensor]:
    return [values.log_softmax(-1) for values in logits]


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) per row, with 0 · log 0 = 0 (vocabulary entries masked by -inf): ``(N, V), (N, V) -> (N,)``."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


@token_objective(
    aliases=("kl", "fkl", "kld"),
    formula="Σ_v t_v (log t_v − log s_v)",
    source="Hinton, Vinyals, Dean 2015, arXiv:1503.02531",
)
def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher‖student): how badly the student codes what the teacher would say; covers every mode of the teacher.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    Gradient at the student's logits: s − t. With temperature T the driver divides the logits by T and multiplies by T².
    Infinite where the student gives no mass to a token that the teacher can say.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531.

    >>> forward_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_s, log_t = _log_softmax(student_logits, teacher_logits)
    return _relative_entropy(log_t, log_s)


@token_objective(
    aliases=("rkl", "inverse_kl"),
    formula="Σ_v s_v (log s_v − log t_v)",
    source="Gu, Dong, Wei, Huang 2024, arXiv:2306.08543",
)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student‖teacher): how surprised the teacher is by what the student would say; seeks modes.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    Gradient at the student's logits: s (log s − log t − KL): it vanishes where the student gives no mass.

    Source: Gu, Dong, Wei, Huang 2024 (MiniLLM), arXiv:2306.08543.

    >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_s, log_t = _log_softmax(student_logits, teacher_logits)
    return _relative_entropy(log_s, log_t)


@token_objective(
    aliases=("jensen_shannon", "generalized_jsd"),
    formula="β KL(t‖m) + (1−β) KL(s‖m),  m = β t + (1−β) s",
    source="Agarwal et al. 2024, arXiv:2306.13649",
)
def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Annotated[float, Between(0, 1, excluding=(0, 1))] = 0.5,
    normalize: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence: both distributions against their mixture, so it is bounded.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, H(β)] with the binary entropy H, at most ln 2; zero where the distributions
    are equal. Towards β = 0 it becomes β · forward KL, towards β = 1 (1−β) · reverse KL.

    Options: ``beta``, in (0, 1): the teacher's share of the mixture. ``normalize``: divide by β(1−β), which keeps the size of the
    gradient as β moves and reaches the two KL divergences at the ends.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649.

    >>> jsd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), beta=0.3)
    tensor([0.])
    """
    log_s, log_t = _log_softmax(student_logits, teacher_logits)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    value = beta * _relative_entropy(log_t, log_m) + (1.0 - beta) * _relative_entropy(log_s, log_m)
    return value / (beta * (1.0 - beta)) if normalize else value


@token_objective(
    aliases=("ce", "hard", "sft"),
    temperature_scale=None,
    needs_teacher=False,
    zero_at_equality=False,
    formula="−log s_y",
    source="label loss of language modelling",
)
def cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, *, labels: Tensor) -> Tensor:
    """Cross-entropy with the next token of the text: learning without a teacher, or beside one.

    Shapes: ``(N, V), unused, labels (N,) -> (N,)``. Range [0, ∞), in nats. It takes no temperature.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), None, labels=torch.tensor([1]))
    tensor([0.6931])
    """
    return torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "cross_entropy": cross_entropy}
