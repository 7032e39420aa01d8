"""The Kullback-Leibler family between teacher and student next-token distributions: both ways, mixed, skewed and bounded.

Letters: N supervised tokens, V vocabulary; s and t are the student's and the teacher's distributions, m a mixture of the two.
A logit of -inf is a token without mass. Where a value is infinite, it is given as infinite, and its gradient is not finite.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from distily import hookimpl
from distily.distributions import jensen_shannon, log_distributions, log_mixture, relative_entropy
from distily.forms import Form
from distily.objectives import token_objective
from distily.schema import Between
from distily.state import Calibrated


@token_objective(
    aliases=("kl", "fkl", "kld", "torch_kl", "forward"),
    forms=lambda: (Form("forward_kl"),),
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
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return relative_entropy(log_t, log_s)


@token_objective(
    aliases=("rkl", "inverse_kl", "reverse_kld", "reverse"),
    forms=lambda: (Form("reverse_kl"),),
    formula="Σ_v s_v (log s_v − log t_v)",
    source="Gu, Dong, Wei, Huang 2024, arXiv:2306.08543",
)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student‖teacher): how surprised the teacher is by what the student would say; seeks modes.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    Gradient at the student's logits: s (log s − log t − KL): it vanishes where the student gives no mass.
    Infinite where the teacher gives no mass to a token that the student can say, as where the teacher alone masks its vocabulary.

    Source: Gu, Dong, Wei, Huang 2024 (MiniLLM), arXiv:2306.08543.

    >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return relative_entropy(log_s, log_t)


def _both_ways(log_s: Tensor, log_t: Tensor, reverse_share: Tensor | float) -> Tensor:
    """(1 − share) KL(t‖s) + share KL(s‖t), with one share or one for each row."""
    return (1.0 - reverse_share) * relative_entropy(log_t, log_s) + reverse_share * relative_entropy(log_s, log_t)


def _forms_both_ways(reverse_share: Tensor | float) -> tuple[Form, Form]:
    return Form("forward_kl", factor=1.0 - reverse_share), Form("reverse_kl", factor=reverse_share)


def _jsd_forms(beta: float, normalize: str) -> tuple[Form, ...]:
    """Near its ends the divergence is a small difference of large numbers, which the kernel does not take care of."""
    return (Form("jsd", (beta,), 1.0 / (beta * (1.0 - beta)) if normalize == "beta" else 1.0),) if 0.05 <= beta <= 0.95 else ()


def _skew_reverse_forms(skew: float, detach_mixture: bool) -> tuple[Form, ...]:
    return (Form("skew_reverse_kl_detached" if detach_mixture else "skew_reverse_kl", (skew,)) if skew else Form("reverse_kl"),)


@token_objective(
    aliases=("symmetric_kl", "sym_kl", "jeffreys_divergence"),
    forms=lambda reverse_share: _forms_both_ways(reverse_share),
    formula="(1−w) KL(t‖s) + w KL(s‖t)",
    source="Jeffreys 1946, doi:10.1098/rspa.1946.0056",
)
def jeffreys(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reverse_share: Annotated[float, Between(0, 1, excluding=(0, 1))] = 0.5,
) -> Tensor:
    """Forward and reverse KL in fixed shares; with equal shares it does not matter which distribution is the student's.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    Near equality the share does not matter, since both directions have the same curvature there. With equal shares it is half of what
    Jeffreys defined. No published result on decoder models puts it before a tuned forward KL: take it as the control of
    ``confidence_kl``.
    Infinite where only one of the two gives no mass to a token.

    Options: ``reverse_share``, w in (0, 1): the weight of the reverse KL. The ends are ``forward_kl`` and ``reverse_kl``.

    Source: Jeffreys 1946, doi:10.1098/rspa.1946.0056.

    >>> apart, level = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> jeffreys(apart, level), jeffreys(level, apart)
    (tensor([0.3808]), tensor([0.3808]))
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return _both_ways(log_s, log_t, reverse_share)


@token_objective(
    aliases=("jensen_shannon", "generalized_jsd", "js"),
    forms=lambda beta, normalize: _jsd_forms(beta, normalize),
    formula="β KL(t‖m) + (1−β) KL(s‖m),  m = β t + (1−β) s",
    source="Agarwal et al. 2024, arXiv:2306.13649",
)
def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: Annotated[float, Between(0, 1, excluding=(0, 1))] = 0.5,
    normalize: Literal["none", "beta"] = "none",
) -> Tensor:
    """Generalised Jensen-Shannon divergence: both distributions against their mixture, so it is bounded.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, H(β)] with the binary entropy H, at most ln 2; zero where the distributions
    are equal. Gradient at the student's logits: (1−β) s (log s − log m − KL(s‖m)). Towards β = 0 the value becomes β · forward KL,
    towards β = 1 (1−β) · reverse KL. Finite whatever is masked, and accurate for every β (float32 at β = 1e-6: 1e-5, relative).
    TRL and Liger return the KL divergences themselves at β = 0 and 1, where the divergence is 0.

    Options: ``beta``, in (0, 1): the teacher's share of the mixture. ``normalize``: "beta" divides by β(1−β), which keeps the size
    of the gradient as β moves and reaches the two KL divergences at the ends; "none" does not.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649.

    >>> jsd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), beta=0.3)
    tensor([0.])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    value = jensen_shannon(log_t, log_s, beta)
    return value / (beta * (1.0 - beta)) if normalize == "beta" else value


@token_objective(
    aliases=("skl", "skewed_forward_kl"),
    forms=lambda skew: (Form("skew_kl", (skew,)) if skew else Form("forward_kl"),),
    formula="KL(t‖m),  m = λ t + (1−λ) s",
    source="Ko, Kim, Chen, Yun 2024, arXiv:2402.03898",
)
def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: Annotated[float, Between(0, 1, excluding=(1,))] = 0.1,
) -> Tensor:
    """Forward KL against a student that is helped by a share λ of the teacher: no token can cost more than −log λ.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, −log λ], in nats; zero where the distributions are equal.
    Gradient at the student's logits: −(1−λ) s (t/m − Σ s t/m), bounded since t/m ≤ 1/λ. With λ > 0 finite whatever is masked.

    Options: ``skew``, λ in [0, 1): the teacher's share of the mixture; 0 gives ``forward_kl``.

    Source: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv:2402.03898.

    >>> far = torch.tensor([[0.0, 99.0]])
    >>> skew_kl(far, far.flip(1), skew=0.1)  # forward_kl gives 99
    tensor([2.3026])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    return relative_entropy(log_t, log_mixture(log_t, log_s, skew))


@token_objective(
    aliases=("srkl", "skewed_reverse_kl"),
    forms=lambda skew, detach_mixture: _skew_reverse_forms(skew, detach_mixture),
    formula="KL(s‖m),  m = (1−λ) t + λ s",
    source="Ko, Kim, Chen, Yun 2024, arXiv:2402.03898",
)
def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: Annotated[float, Between(0, 1, excluding=(1,))] = 0.1,
    detach_mixture: bool = False,
) -> Tensor:
    """Reverse KL against a teacher that is helped by a share λ of the student: no token can cost more than −log λ.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, −log λ], in nats; zero where the distributions are equal.
    Gradient at the student's logits: s (u − Σ s u) with u = log(s/m) − λ s/m. With λ > 0 finite whatever is masked.

    Options: ``skew``, λ in [0, 1): the student's share of the mixture; 0 gives ``reverse_kl``. ``detach_mixture``: hold m constant,
    as DistiLLM-2's code does and DistiLLM's does not; then u = log(s/m), which is not the gradient of the value.

    Source: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv:2402.03898; Ko et al. 2025 (DistiLLM-2), arXiv:2503.07067.

    >>> far = torch.tensor([[0.0, 99.0]])
    >>> skew_reverse_kl(far, far.flip(1), skew=0.1)  # reverse_kl gives 99
    tensor([2.3026])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    within = log_s.detach() if detach_mixture else log_s
    return relative_entropy(log_s, log_mixture(within, log_t, skew))


@token_objective(
    aliases=("akl",),
    surrogate_gradient=True,
    formula="(g_head KL(t‖s) + g_tail KL(s‖t)) / (g_head + g_tail),  g = Σ |t − s| over the part",
    source="Wu et al. 2024, arXiv:2404.02657",
)
def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    head_mass: Annotated[float, Between(0, 1, excluding=(0, 1))] = 0.5,
) -> Tensor:
    """Forward and reverse KL, weighed at every token by whether student and teacher differ in the teacher's head or in its tail.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range: between forward and reverse KL; zero where the distributions are equal.
    The gradient is that of the two divergences with the weights held constant. The head is the smallest set of the teacher's likeliest
    tokens with a mass of at least ``head_mass``; of equally likely ones the first come first. The authors' code leaves out the token
    that crosses the threshold. It sorts the vocabulary at every token.
    Infinite where ``reverse_kl`` is.

    Options: ``head_mass``, μ in (0, 1).

    Source: Wu et al. 2024, arXiv:2404.02657.

    >>> adaptive_kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))  # forward 0.4338, reverse 0.3278
    tensor([0.3808])
    """
    log_s, log_t = log_distributions(student_logits, teacher_logits)
    with torch.no_grad():
        teacher, order = log_t.exp().sort(dim=-1, descending=True, stable=True)
        gap = (log_s.exp().gather(-1, order) - teacher).abs()
        in_tail = teacher.cumsum(-1) - teacher >= head_mass  # what comes before a token is enough already
        whole = gap.sum(-1)
        tail = (gap * in_tail).sum(-1)
        reverse_share = torch.where(whole > 0, tail / whole.where(whole > 0, 1.0), 0.5)
    return _both_ways(log_s, log_t, reverse_share)


@token_objective(
    aliases=("cakld", "confidence_aware_kl"),
    forms=lambda objective: _forms_both_ways(objective.gamma),
    formula="γ KL(s‖t) + (1−γ) KL(t‖s),  γ = mean t_y (or mean max_v t_v) over calibration text",
    source="Du et al. 2024, arXiv:2402.10631",
)
class ConfidenceKL(Calibrated):
    """Forward and reverse KL in shares that are measured once: the surer the teacher is of the text, the more mode-seeking.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal.
    Infinite where only one of the two gives no mass to a token.
    γ is the exact mean over the supervised tokens of the calibration text, at the term's temperature, and stays what it is; the run's
    checkpoints carry it. The authors' code takes "max", padding included, and divides the sum over K + 1 batches by K.

    Options: ``gamma``: "label" measures the teacher's probability of the next token of the text, "max" that of its likeliest token; a
    number in (0, 1) is γ itself (``jeffreys`` by another name). ``calibration_rows``: supervised tokens to measure on.

    Source: Du et al. 2024 (BitDistiller), arXiv:2402.10631.

    >>> objective = ConfidenceKL(gamma="max")
    >>> sure = torch.tensor([[20.0, 0.0]])
    >>> objective.observe(sure, sure, labels=torch.tensor([0]))
    >>> objective.conclude()
    >>> objective(sure.flip(1), sure, labels=torch.tensor([0]))  # γ = 1: the reverse KL
    tensor([20.])
    """

    gamma: Tensor

    def __init__(
        self,
        *,
        gamma: Annotated[float, Between(0, 1, excluding=(0, 1))] | Literal["label", "max"] = "label",
        calibration_rows: Annotated[int, Between(1)] = 8192,
    ) -> None:
        super().__init__()
        self.measure = gamma if isinstance(gamma, str) else None
        self.calibration_rows = calibration_rows if self.measure else 0
        self.register_buffer("gamma", torch.tensor(float("nan") if self.measure else gamma, dtype=torch.float64))
        self.confidence, self.observed = 0.0, 0

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        """Adds up the teacher's confidence on rows ``(n, V)`` with ``labels`` (n,)."""
        log_t = teacher.log_softmax(-1)
        chosen = log_t.gather(-1, inputs["labels"][:, None])[:, 0] if self.measure == "label" else log_t.amax(-1)
        self.confidence += math.fsum(chosen.exp().tolist())
        self.observed += len(teacher)

    def conclude(self) -> None:
        """Sets γ to the mean confidence."""
        if self.measure is None:
            return
        if not self.observed:
            raise ValueError("gamma: there was no supervised token to measure it on")
        self.gamma.fill_(self.confidence / self.observed)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, *, labels: Tensor) -> Tensor:
        del labels  # read while measuring: both calls get the same inputs
        log_s, log_t = log_distributions(student_logits, teacher_logits)
        return _both_ways(log_s, log_t, self.gamma)


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jeffreys": jeffreys,
        "jsd": jsd,
        "skew_kl": skew_kl,
        "skew_reverse_kl": skew_reverse_kl,
        "adaptive_kl": adaptive_kl,
        "confidence_kl": ConfidenceKL,
    }
