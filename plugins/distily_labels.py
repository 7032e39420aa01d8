"""Objectives that read the next token of the text: label cross-entropy, and distillation that sets the label apart.

Letters: N supervised tokens, n rows of a set, V vocabulary; s and t are the student's and the teacher's distributions, y the label.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from distily import hookimpl
from distily.distributions import cross_entropy as soft_targets
from distily.distributions import log_conditional, log_distributions, log_mass, relative_entropy
from distily.forms import Form
from distily.objectives import row_set_objective, token_objective
from distily.schema import Between


def _not_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Where a token is not the label: ``(N, V)``."""
    return torch.ones_like(logits, dtype=torch.bool).scatter(-1, labels[:, None], False)


@token_objective(
    aliases=("ce", "hard", "sft", "label_cross_entropy"),
    temperature_scale=None,
    needs_teacher=False,
    zero_at_equality=False,
    forms=lambda: (Form("cross_entropy"),),
    formula="−log s_y",
    source="label loss of language modelling",
)
def cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, *, labels: Tensor) -> Tensor:
    """Cross-entropy with the next token of the text: learning without a teacher, or beside one.

    Shapes: ``(N, V), unused, labels (N,) -> (N,)``. Range [0, ∞), in nats. It takes no temperature.
    Gradient at the student's logits: s − e_y.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), None, labels=torch.tensor([1]))
    tensor([0.6931])
    """
    return torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")


@token_objective(
    aliases=("dkd", "decoupled"),
    formula="a · KL((t_y, 1−t_y)‖(s_y, 1−s_y)) + b · KL(t̂‖ŝ),  p̂_v = p_v / (1−p_y) for v ≠ y",
    source="Zhao, Cui, Song, Qiu, Liang 2022, arXiv:2203.08679",
)
def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    target_weight: Annotated[float, Between(0, 1e6)] = 1.0,
    other_weight: Annotated[float, Between(0, 1e6)] = 0.5,
) -> Tensor:
    """Forward KL in two parts with weights of their own: how likely the label is, and how the other tokens compare.

    In forward KL the second part has the weight 1 − t_y, so a teacher that is sure of the label hardly teaches the others; here it
    counts the same at every token.

    Shapes: ``(N, V), (N, V), labels (N,) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    The second part is 0 where the teacher gives every other token probability 0.

    Options: ``target_weight``, a; ``other_weight``, b. Vision uses b = 8; for language models 1 − t_y is often tiny, b from 0.5
    to 1 is what has been tried (evidence: vision, and baselines of others).

    Source: Zhao, Cui, Song, Qiu, Liang 2022, arXiv:2203.08679.

    >>> teacher, label = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> decoupled_kd(teacher + 1.0, teacher, labels=label)
    tensor([0.])
    >>> decoupled_kd(torch.zeros(1, 3), teacher, labels=label, other_weight=0.0)  # KL of (0.67, 0.33) from (0.33, 0.67)
    tensor([0.2291])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    others = _not_label(log_s, labels)
    binary = [torch.cat([log_p.gather(-1, labels[:, None]), log_mass(log_p, others)], -1) for log_p in (log_t, log_s)]
    conditional = [log_conditional(log_p, others) for log_p in (log_t, log_s)]
    return target_weight * relative_entropy(*binary) + other_weight * relative_entropy(*conditional)


@token_objective(
    aliases=("nkd", "normalised_kd"),
    zero_at_equality=False,
    formula="−t_y log s_y + γ T² · (−Σ_{v≠y} t̂_v log ŝ_v),  p̂_v = p_v / (1−p_y) at temperature T",
    source="Yang et al. 2023, arXiv:2303.13005",
)
def normalized_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    gamma: Annotated[float, Between(0, 1e6)] = 1.5,
    temperature: Annotated[float, Between(0, 1000, excluding=(0,))] = 1.0,
) -> Tensor:
    """Label cross-entropy weighted by the teacher's own trust in the label, and soft cross-entropy over the other tokens.

    Beside it the paper uses ``cross_entropy``. The authors' code never takes the label out of the second part.

    Shapes: ``(N, V), (N, V), labels (N,) -> (N,)``. Range [0, ∞), in nats. At equality it is −t_y log t_y + γ T² H(t̂), above 0.
    The second part has the gradient of that of ``decoupled_kd``, and is 0 where the teacher gives every other token probability 0.
    Evidence: vision; exploratory for language models.

    Options: ``gamma``, weight of the second part. ``temperature``, T of the second part alone; the first is always at 1.

    Source: Yang, Zeng, Li, Zhang, Yuan, Li 2023, arXiv:2303.13005.

    >>> teacher, label = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> normalized_kd(torch.zeros(1, 3), teacher, labels=label, gamma=0.0)  # 0.6652 · ln 3
    tensor([0.7308])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    target = soft_targets(*(log_p.gather(-1, labels[:, None]) for log_p in (log_t, log_s)))
    log_s, log_t = log_distributions(student_logits / temperature, teacher_logits / temperature)
    others = _not_label(log_s, labels)
    rest = soft_targets(log_conditional(log_t, others), log_conditional(log_s, others))
    return target + gamma * temperature**2 * rest


@row_set_objective(
    aliases=("tsld", "tlsd", "token_scaled_logit_distillation"),
    zero_at_equality=False,
    formula="n · w_i · (−Σ_v t_iv log s_iv),  w = softmax_i(−log t_iy / weight_temperature)",
    source="Kim et al. 2023, arXiv:2308.06744",
)
def token_scaled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    weight_temperature: Annotated[float, Between(0, 1e6, excluding=(0,))] = 10.0,
    max_rows: Annotated[int, Between(1)] = 1024,
) -> Tensor:
    """Soft cross-entropy that looks most at the tokens of a document which the teacher itself finds hard.

    Tokens that the teacher codes well teach little more than the label does. Made for ternary students.

    Shapes: ``(n, V), (n, V), labels (n,) -> (n,)``; the mean over the rows is Σ_i w_i CE_i. Range [0, ∞), in nats; at equality it
    is Σ_i w_i H(t_i), above 0. A constant label loss of the teacher makes it the mean of ``soft_cross_entropy``. With a
    temperature, the driver divides the logits before both the distributions and the weights. A label that the teacher rules out
    (-inf) would take all of the weight; such rows count as the hardest of the others.

    Options: ``weight_temperature``, in nats: large ones weigh all tokens alike. ``max_rows``: rows of a set; of longer documents a
    sample is taken, and the weights are over the sample. The logits of a set, ``max_rows · V`` numbers a side, exist at once.

    Source: Kim et al. 2023 (TSLD), arXiv:2308.06744; an option of BitDistiller, where it is spelt tlsd.

    >>> teacher, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0])  # label losses 0.127 and 0.693
    >>> token_scaled(torch.zeros(2, 2), teacher, labels=labels, weight_temperature=1.0)  # 2 · (0.362, 0.638) · ln 2
    tensor([0.5020, 0.8843])
    """
    del max_rows  # the driver reads it before it draws the rows
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    hardness = -log_t.detach().gather(-1, labels[:, None]).squeeze(-1) / weight_temperature
    possible = hardness.isfinite()
    hardest = torch.where(possible, hardness, 0.0).amax()
    weights = torch.where(possible, hardness, hardest).softmax(0)
    return weights * len(weights) * soft_targets(log_t, log_s)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "cross_entropy": cross_entropy,
        "decoupled_kd": decoupled_kd,
        "normalized_kd": normalized_kd,
        "token_scaled": token_scaled,
    }
