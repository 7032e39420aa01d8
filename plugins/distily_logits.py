"""Objectives that compare logits, probabilities or the order of tokens by other measures than a divergence.

Letters: N supervised tokens, V vocabulary, k tokens of a ranking; z are logits, s and t the student's and the teacher's distributions.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu, softplus

from distily import hookimpl
from distily.distributions import cross_entropy, log_distributions, relative_entropy
from distily.forms import Form
from distily.objectives import token_objective
from distily.schema import Between

TIE = 1e-8
"""Teacher probabilities that differ by no more are of one rank."""

Rank = Annotated[int, Between(2, 1024)]


@token_objective(
    aliases=("soft_ce", "soft_targets"),
    zero_at_equality=False,
    forms=lambda: (Form("soft_cross_entropy"),),
    formula="−Σ_v t_v log s_v",
    source="Hinton, Vinyals, Dean 2015, arXiv:1503.02531",
)
def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's distribution as the target: forward KL plus the teacher's entropy.

    Its gradient, s − t, is that of ``forward_kl``, which reads better: its curve goes to 0. Some peers call this one forward KL.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [H(t), ∞), in nats; H(t), the teacher's entropy, where the distributions are equal.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531.

    >>> soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return cross_entropy(log_t, log_s)


@token_objective(
    aliases=("raw_mse", "logits_mse"),
    temperature_scale=None,
    formula="(1/V) Σ_v (Δ_v − mean Δ)²,  Δ = z_s − z_t",
    source="Ba, Caruana 2014, arXiv:1312.6184; Kim et al. 2021, arXiv:2105.08919",
)
def logit_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, center: bool = True, reduce: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Squared difference of the logits: it looks at unlikely tokens as much as at likely ones.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in squared units of a logit; zero where the logits are equal, with ``center``
    also where they differ by a constant. A temperature would change nothing, so it takes none: with T² its value is the limit of
    2 T² · forward KL as T grows. Tokens whose logit is -inf at the teacher take no part. For language models it loses to
    forward KL wherever the two were compared.

    Options: ``center``: take the mean over V off the difference, which no probability depends on. ``reduce``: ``mean`` or ``sum``
    over V.

    Source: Ba, Caruana 2014, arXiv:1312.6184; Kim et al. 2021, arXiv:2105.08919.

    >>> logit_mse(torch.tensor([[5.0, 9.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([4.])
    >>> logit_mse(torch.tensor([[5.0, 9.0]]), torch.tensor([[1.0, 1.0]]), center=False, reduce="sum")
    tensor([80.])
    """
    known = ~teacher_logits.isneginf()
    count = known.sum(-1, keepdim=True)
    difference = torch.where(known, student_logits - teacher_logits, 0.0)
    if center:
        difference = torch.where(known, difference - difference.sum(-1, keepdim=True) / count, 0.0)
    total = difference.square().sum(-1)
    return total / count.squeeze(-1) if reduce == "mean" else total


@token_objective(
    aliases=("soft_mse", "brier"),
    formula="Σ_v (s_v − t_v)²",
    source="Brier 1950, Monthly Weather Review 78(1)",
)
def probability_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the probabilities, summed over the vocabulary: Brier's score against the teacher.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, 2]; zero where the distributions are equal. Likely tokens rule it, and its
    gradient vanishes where the student is sure of a wrong token.

    Source: Brier 1950, Verification of forecasts expressed in terms of probability, Monthly Weather Review 78(1).

    >>> probability_mse(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -float("inf")]]))
    tensor([0.5000])
    """
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def _standardized(logits: Tensor) -> Tensor:
    """z-scores over the vocabulary; tokens at -inf stay there and take no part in mean and standard deviation."""
    known = ~logits.isneginf()
    count = known.sum(-1, keepdim=True)
    mean = torch.where(known, logits, 0.0).sum(-1, keepdim=True) / count
    centered = torch.where(known, logits - mean, 0.0)
    # A norm has gradient 0 at 0, where a square root has none.
    deviation = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / (count - 1).clamp(min=1).to(logits.dtype).sqrt()
    return (centered / (deviation + 1e-7)).masked_fill(~known, -math.inf)


@token_objective(
    aliases=("std_kl", "logit_standardization", "z_score_kl"),
    formula="T² · KL(softmax(ẑ_t/T)‖softmax(ẑ_s/T)),  ẑ = (z − mean z) / (std z + 1e-7)",
    source="Sun, Ren, Li, Wang, Cao 2024, arXiv:2403.01427",
)
def standardized_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Annotated[float, Between(0, 1000, excluding=(0,))] = 0.5,
) -> Tensor:
    """Forward KL of z-scored logits: the student matches the teacher's logits up to shift and scale, not its confidence.

    For a student too small to reach the size of the teacher's logits. Alone it leaves the student's confidence free, so keep
    ``cross_entropy`` beside it.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞); zero where z_s = a z_t + b with a > 0. The same for any such scaling of either
    side. The gradient grows as the student's logits come closer to each other: 1e7 times where they are all equal.
    Evidence: vision; exploratory for language models.

    Options: ``temperature``, T, of the z-scores; the value has the factor T². With 50,000 tokens the largest z-score is near 5:
    at T = 1 such a distribution is almost uniform, so T is 0.5 here, where vision takes 2.

    Source: Sun, Ren, Li, Wang, Cao 2024, arXiv:2403.01427; standard deviation with V − 1 as in the authors' code.

    >>> teacher = torch.tensor([[1.0, 2.0, 6.0]])
    >>> f"{standardized_kl(teacher * 3.0 + 1.0, teacher).item():.4f} {standardized_kl(-teacher, teacher).item():.4f}"
    '0.0000 0.9189'
    """
    log_s, log_t = log_distributions(_standardized(student_logits) / temperature, _standardized(teacher_logits) / temperature)
    return temperature**2 * relative_entropy(log_t, log_s)


@token_objective(
    aliases=("dist", "pearson_correlation"),
    temperature_scale="none",
    formula="1 − ρ(s, t),  ρ Pearson's correlation over the vocabulary",
    source="Huang, You, Wang, Qian, Xu 2022, arXiv:2205.10536",
)
def pearson(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """One minus the correlation of the two distributions over the vocabulary, so that a student need not be as sure as its teacher.

    This is the first half of DIST; its second half, the correlation over tokens for each entry of V, needs a batch and is left out.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, 2]; zero where s = a t + b with a > 0. A temperature takes no factor: as it grows
    the value tends to one minus the correlation of the logits, whose gradient is of order 1 as it is. A uniform distribution
    correlates with nothing: 1. Evidence: vision; exploratory for language models.

    Source: Huang, You, Wang, Qian, Xu 2022 (DIST), arXiv:2205.10536.

    >>> teacher = torch.tensor([[0.0, 1.0, 2.0]])
    >>> f"{pearson(teacher, teacher).item():.4f} {pearson(-teacher, teacher).item():.4f}"
    '0.0000 1.8671'
    """
    centered = (logits.softmax(-1) - 1.0 / logits.shape[-1] for logits in (student_logits, teacher_logits))
    student, teacher = (normalize(rows, dim=-1, eps=1e-6) for rows in centered)
    return 1.0 - (student * teacher).sum(-1)


def _pairs(scores: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (a, b) of the teacher's k likeliest tokens: the student's score of a less that of b, the same of the teacher's
    probabilities, and whether the teacher puts a before b: each ``(N, k, k)``.
    """
    likely, tokens = teacher_logits.softmax(-1).topk(min(k, teacher_logits.shape[-1]), -1)
    margins = likely[:, :, None] - likely[:, None, :]
    ordered = (margins > TIE) & (likely[:, None, :] > 0)
    chosen = scores.gather(-1, tokens)
    leads = torch.where(ordered, chosen[:, :, None] - chosen[:, None, :], 0.0)
    return leads, margins, ordered


def _mean_over(ordered: Tensor, values: Tensor) -> Tensor:
    """The mean over the ordered pairs of a row, 0 where there is none: ``(N, k, k), (N, k, k) -> (N,)``."""
    return torch.where(ordered, values, 0.0).sum((-2, -1)) / ordered.sum((-2, -1)).clamp(min=1)


@token_objective(
    aliases=("hinge_rank", "hinge"),
    temperature_scale="t",
    formula="mean over pairs t_a > t_b of the k likeliest: max(0, margin − (s_a − s_b)),  margin = t_a − t_b",
    source="pairwise hinge loss, Herbrich, Graepel, Obermayer 2000; on logits as in DistillKit",
)
def hinge_ranking(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: Rank = 16,
    margin: None | Annotated[float, Between(0, 1)] = None,  # noqa: RUF036
) -> Tensor:
    """How far the student's probabilities are from ranking the teacher's likeliest tokens as it does. Use it beside ``forward_kl``.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, 2]; zero where the distributions are equal (with a fixed margin not), and
    wherever the student leads by at least the margin in every pair; the gradient is 0 there, too.
    Tokens that the teacher gives the same probability, to 1e-8, form no pair; with no pair the value is 0.
    Evidence: none published for language models.

    Options: ``k``, how many of the teacher's likeliest tokens are paired; memory is N · k². ``margin``, a difference of
    probabilities; null: the teacher's own.

    Source: Herbrich, Graepel, Obermayer 2000 (the loss); Arcee's DistillKit (its use here).

    >>> hinge_ranking(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -float("inf")]]), margin=0.2)  # no second token to rank
    tensor([0.])
    >>> hinge_ranking(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))  # 0.731 − 0.269
    tensor([0.4621])
    """
    leads, margins, ordered = _pairs(student_logits.softmax(-1), teacher_logits, k)
    return _mean_over(ordered, relu((margins if margin is None else margin) - leads))


@token_objective(
    aliases=("logistic_rank", "ranknet"),
    temperature_scale="t",
    zero_at_equality=False,
    formula="mean over pairs t_a > t_b of the k likeliest: log(1 + exp(−(z_a − z_b)))",
    source="Burges et al. 2005, doi:10.1145/1102351.1102363; on logits as in DistillKit",
)
def logistic_ranking(student_logits: Tensor, teacher_logits: Tensor, *, k: Rank = 16) -> Tensor:
    """Likelihood, in the sense of Bradley and Terry, that the student ranks the teacher's likeliest tokens as it does.

    It reads the order alone, not the teacher's probabilities. Use it beside ``forward_kl``.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; falls as the student's logits spread in the right order and is never
    0, so it always asks for more spread than the teacher has. Pairs are those of ``hinge_ranking``; with none the value is 0.
    Evidence: none published for language models.

    Options: ``k``, how many of the teacher's likeliest tokens are paired; memory is N · k².

    Source: Burges et al. 2005 (RankNet); Arcee's DistillKit (its use here).

    >>> logistic_ranking(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    leads, _, ordered = _pairs(student_logits, teacher_logits, k)
    return _mean_over(ordered, softplus(-leads))


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "soft_cross_entropy": soft_cross_entropy,
        "logit_mse": logit_mse,
        "probability_mse": probability_mse,
        "standardized_kl": standardized_kl,
        "pearson": pearson,
        "hinge_ranking": hinge_ranking,
        "logistic_ranking": logistic_ranking,
    }
