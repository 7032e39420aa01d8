"""Divergences between next-token distributions by powers of their probabilities, and total variation.

Letters: N supervised tokens, V vocabulary; s and t are the student's and the teacher's distributions.
A logit of -inf is a token without mass. Where a value is infinite, it is given as infinite, and its gradient is not finite.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from distily import hookimpl
from distily.distributions import log_distributions
from distily.forms import Form
from distily.objectives import token_objective
from distily.schema import Between


@token_objective(
    aliases=("tvd", "tv", "total_variation_distance"),
    temperature_scale="t",
    forms=lambda: (Form("total_variation"),),
    formula="½ Σ_v |t_v − s_v|",
    source="Wen, Li, Du, Mou 2023, arXiv:2307.15190",
)
def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half of the L1 distance: the probability mass that would have to move. Robust where the teacher is noisy.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, 1]; zero where the distributions are equal. A metric.
    Gradient at the student's logits: ½ s (g − Σ s g) with g = sign(s − t), and 0 at ties. It is bounded, does not shrink near equality
    and is weak where the distributions hardly overlap. It is of first order, so the driver's factor is T, not T².

    Source: Wen, Li, Du, Mou 2023 (f-DISTILL), arXiv:2307.15190.

    >>> total_variation(torch.tensor([[99.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -torch.inf]]))
    tensor([0.5000])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return 0.5 * (log_t.exp() - log_s.exp()).abs().sum(-1)


def _growth(distance: Tensor, rate: float) -> Tensor:
    """(exp(rate · distance) − 1) / rate, which is the distance itself at rate 0."""
    return distance if rate == 0.0 else torch.expm1(rate * distance) / rate


def _curvature(distance: Tensor, first: float, second: float) -> Tensor:
    """−(1/αβ) (e^{αd} − α/(α+β) e^{(α+β)d} − β/(α+β)), with its limits where α, β or α+β is 0.

    That is d² times the second divided difference of exp at 0, αd and (α+β)d: symmetric in the three, so that dividing by the
    widest of their distances loses no digits.
    """
    low, middle, high = sorted((0.0, first, first + second))
    if low == high:
        return distance.square() / 2.0
    upper = torch.exp(middle * distance) * _growth(distance, high - middle)
    lower = torch.exp(low * distance) * _growth(distance, middle - low)
    return (upper - lower) / (high - low)


def _alone(first: float, total: float) -> float:
    """The curvature for d → −∞: one distribution, to the power ``first``, gives no mass at all."""
    return 1.0 / (first * total) if first > 0.0 and total > 0.0 else math.inf


def _alpha_beta(student_logits: Tensor, teacher_logits: Tensor, alpha: float, beta: float) -> Tensor:
    """The α-β divergence, from how far each token's smaller log-probability is below the larger: powers of at most 1."""
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    total = alpha + beta
    ratio = (log_t - log_s).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)  # NaN: neither gives mass
    distance = -ratio.masked_fill(ratio.isinf(), 0.0).abs()
    curvature = torch.where(ratio < 0, _curvature(distance, alpha, beta), _curvature(distance, beta, alpha))
    curvature = curvature.masked_fill(ratio == -math.inf, _alone(alpha, total)).masked_fill(
        ratio == math.inf, _alone(beta, total)
    )
    larger = torch.maximum(log_s, log_t)
    weight = torch.exp(total * larger.masked_fill(larger.isneginf(), 0.0))
    return (weight * curvature.masked_fill(weight == 0, 0.0)).sum(-1)  # underflow · ∞ is no mass


def _alpha_beta_forms(alpha: float, beta: float) -> tuple[Form, ...]:
    """The ends, which are the KL divergences, and the inside away from them: there no power is large and no difference is small."""
    if (alpha, beta) in ((1.0, 0.0), (0.0, 1.0)):
        return (Form("forward_kl" if alpha else "reverse_kl"),)
    return (Form("alpha_beta", (alpha, beta)),) if min(alpha, beta) >= 0.05 else ()


@token_objective(
    aliases=("ab", "abkd", "ab_divergence"),
    forms=lambda objective: _alpha_beta_forms(objective.alpha, objective.beta),
    formula="−(1/αβ) Σ_v (t^α s^β − α/(α+β) t^{α+β} − β/(α+β) s^{α+β})",
    source="Wang et al. 2025, arXiv:2505.04560",
)
class AlphaBeta(nn.Module):
    """α-β divergence: α says how much the teacher's likely tokens count, β how much those that the student finds likely.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞); zero where the distributions are equal.
    Gradient at the student's log-probabilities: −s^β (t^α − s^α) / α. (1, 0) is ``forward_kl``, (0, 1) ``reverse_kl``, (½, ½) four
    times the squared Hellinger distance, (1, 1) half the squared distance, α + β = 1 ``amari_alpha``. Limits at α = 0, β = 0 and α = −β
    are those of Cichocki et al.; the authors' code divides by α (β) there and not by α² (β²).
    Its size near equality grows with V^(1−α−β): with 50,000 tokens and α + β = 0.9 about threefold, so choose the weight anew.
    Infinite where s is 0 alone and β ≤ 0, or t alone and α ≤ 0, and wherever one is 0 alone if α + β = 0: there unlikely tokens rule.
    With a negative power the value grows with the ratio of the probabilities and leaves float32 where that does.

    Options: ``alpha``, ``beta``: powers of the teacher's and of the student's probabilities, α + β ≥ 0. The authors' choice for GPT-2
    on instructions is the default.

    Source: Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki, Cruces, Amari 2011, doi:10.3390/e13010134.

    >>> objective = AlphaBeta(alpha=1.0, beta=1.0)
    >>> objective(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.2500])
    """

    def __init__(self, *, alpha: Annotated[float, Between(-2, 2)] = 0.2, beta: Annotated[float, Between(-2, 2)] = 0.7) -> None:
        super().__init__()
        if alpha + beta < 0:
            raise ValueError(f"alpha + beta is {alpha + beta:g}; below 0 unlikely tokens would count without bound")
        self.alpha, self.beta = float(alpha), float(beta)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return _alpha_beta(student_logits, teacher_logits, self.alpha, self.beta)


@token_objective(
    aliases=("alpha", "alpha_divergence", "amari"),
    forms=lambda alpha: _alpha_beta_forms(alpha, 1.0 - alpha),
    formula="(1 − Σ_v t^α s^{1−α}) / (α (1−α))",
    source="Amari 1985, doi:10.1007/978-1-4612-5056-2",
)
def amari_alpha(student_logits: Tensor, teacher_logits: Tensor, *, alpha: Annotated[float, Between(-1, 2)] = 0.5) -> Tensor:
    """Amari's α-divergence: a path from reverse KL (α = 0) over the Hellinger distance (½) to forward KL (1).

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, 1/(α(1−α))] for α inside (0, 1), else [0, ∞); zero where the distributions are equal.
    Gradient at the student's logits: (s Σ_u r_u − r)/α with r = t^α s^{1−α}. Exact through both ends. α = 2 is half of Pearson's χ²,
    α = −1 half of Neyman's. ``renyi`` is −log(1 − α(1−α) · value) / (1−α). Exploratory for language models.
    Infinite for α ≥ 1 where s alone is 0, for α ≤ 0 where t alone is; outside [0, 1] it leaves float32 where Σ r does.

    Options: ``alpha``, in [−1, 2]: the power of the teacher's probabilities.

    Source: Amari 1985, doi:10.1007/978-1-4612-5056-2.

    >>> far = torch.tensor([[0.0, 99.0]])
    >>> amari_alpha(far, far.flip(1), alpha=0.5)
    tensor([4.])
    """
    return _alpha_beta(student_logits, teacher_logits, alpha, 1.0 - alpha)


@token_objective(
    aliases=("renyi_divergence",),
    forms=lambda alpha: (Form("renyi", (alpha,)),) if alpha <= 0.95 else (Form("forward_kl"),) if alpha == 1.0 else (),
    formula="log(Σ_v t^α s^{1−α}) / (α−1)",
    source="Rényi 1961; van Erven, Harremoës 2014, arXiv:1206.2459",
)
def renyi(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: Annotated[float, Between(0, 1e4, excluding=(0,))] = 0.5,
) -> Tensor:
    """Rényi divergence of order α: forward KL (α = 1) towards a nearer, moving target (α < 1) or towards the worst token (α > 1).

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal; grows with α.
    Gradient at the student's logits: s − w with w ∝ t^α s^{1−α}. α = ½ is −2 log Σ √(ts); large α approach max log(t/s), where one
    token has the whole gradient: clip it. Near equality it is α times forward KL. Exploratory for language models.
    Infinite where the distributions share no token, and for α ≥ 1 where s alone is 0.

    Options: ``alpha``, α > 0: the order.

    Source: Rényi 1961; van Erven, Harremoës 2014, arXiv:1206.2459.

    >>> renyi(torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]]), alpha=2.0)
    tensor([0.6931])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    power = alpha - 1.0
    unsaid = log_t.isneginf()
    if abs(power) > 0.05:
        return (alpha * log_t - power * log_s).masked_fill(unsaid, -math.inf).logsumexp(-1) / power
    # The logarithm of a sum near 1 over a power near 0: both subtractions are done before rounding.
    mean = (log_t.exp() * _growth((log_t - log_s).masked_fill(unsaid, 0.0), power)).sum(-1)
    return mean if power == 0.0 else torch.log1p(power * mean) / power


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"total_variation": total_variation, "alpha_beta": AlphaBeta, "amari_alpha": amari_alpha, "renyi": renyi}
