"""A1 to A10: divergences of next-token distributions, against other libraries, plain formulas and loops."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from oracles.case import Case, Check


def probabilities(*logits: Tensor) -> list[np.ndarray]:
    return [scipy.special.softmax(rows.detach().numpy(), axis=-1) for rows in logits]


def entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q)."""
    return scipy.stats.entropy(p, q, axis=-1)


def softmax(*logits: Tensor) -> list[Tensor]:
    return [torch.softmax(rows, -1) for rows in logits]


# --- other libraries; importing them takes seconds ---


def trl(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """TRL's loss; exactly 0 and 1 are its names for the KL divergences."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")[0].sum(-1)


def liger(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Liger's loss, row by row since it gives sums; likewise at 0 and 1. (Its chunks around it add up in float32.)"""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    loss = LigerFusedLinearJSDFunction.distillation_loss_fn
    return torch.stack([loss(mine[None], theirs[None], beta) for mine, theirs in zip(student, teacher, strict=True)])


FORWARD = {"TRL, β = 0": functools.partial(trl, beta=0), "Liger, β = 0": functools.partial(liger, beta=0)}
REVERSE = {"TRL, β = 1": functools.partial(trl, beta=1), "Liger, β = 1": functools.partial(liger, beta=1)}


# --- A1 to A5: KL divergences, mixed and skewed ---


def scipy_forward(student: Tensor, teacher: Tensor) -> np.ndarray:
    s, t = probabilities(student, teacher)
    return entropy(t, s)


def scipy_reverse(student: Tensor, teacher: Tensor) -> np.ndarray:
    return scipy_forward(teacher, student)


def scipy_jeffreys(student: Tensor, teacher: Tensor, reverse_share: float = 0.5) -> np.ndarray:
    return (1 - reverse_share) * scipy_forward(student, teacher) + reverse_share * scipy_reverse(student, teacher)


def torchtune_symmetric(student: Tensor, teacher: Tensor, reverse_share: float = 0.5) -> Tensor:
    """torchtune's formula: its ``sym_kd_ratio`` weighs the forward half, which is a cross-entropy; here less the teacher's entropy."""
    s, t = softmax(student, teacher)
    soft_targets, reverse = -(t * s.log()).sum(-1), -(s * (t.log() - s.log())).sum(-1)
    ratio = 1 - reverse_share
    return ratio * (soft_targets + (t * t.log()).sum(-1)) + (1 - ratio) * reverse


def scipy_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, normalize: str = "none") -> np.ndarray:
    s, t = probabilities(student, teacher)
    m = beta * t + (1 - beta) * s
    value = beta * entropy(t, m) + (1 - beta) * entropy(s, m)
    return value / (beta * (1 - beta)) if normalize == "beta" else value


def scipy_jensenshannon(student: Tensor, teacher: Tensor) -> np.ndarray:
    """scipy gives the square root."""
    return scipy.spatial.distance.jensenshannon(*probabilities(student, teacher), axis=-1) ** 2


def entropies(student: Tensor, teacher: Tensor, beta: float = 0.5, normalize: str = "none") -> Tensor:
    """H(m) − β H(t) − (1−β) H(s)."""
    s, t = softmax(student, teacher)

    def h(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum(-1)

    value = h(beta * t + (1 - beta) * s) - beta * h(t) - (1 - beta) * h(s)
    return value / (beta * (1 - beta)) if normalize == "beta" else value


def scipy_skew(student: Tensor, teacher: Tensor, skew: float = 0.1) -> np.ndarray:
    s, t = probabilities(student, teacher)
    return entropy(t, skew * t + (1 - skew) * s)


def skewed(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    s, t = softmax(student, teacher)
    return (t * (t / (skew * t + (1 - skew) * s)).log()).sum(-1)


def scipy_skew_reverse(student: Tensor, teacher: Tensor, skew: float = 0.1) -> np.ndarray:
    return scipy_skew(teacher, student, skew)


def skewed_reverse(student: Tensor, teacher: Tensor, skew: float = 0.1, detach_mixture: bool = False) -> Tensor:
    s, t = softmax(student, teacher)
    within = s.detach() if detach_mixture else s
    return (s * (s / ((1 - skew) * t + skew * within)).log()).sum(-1)


# --- A6, A7: shares that depend on the teacher ---


def adaptive_loop(student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> Tensor:
    """Token by token down the teacher's ranking, until the head has its mass."""
    values = []
    for s, t in zip(*softmax(student, teacher), strict=True):
        mass, gaps = 0.0, {True: 0.0, False: 0.0}
        for token in sorted(range(len(t)), key=lambda v: -t[v].item()):
            in_head = mass < head_mass
            gaps[in_head] += abs(t[token] - s[token]).item()
            mass += t[token].item()
        weight = gaps[True] / (sum(gaps.values()) or 1.0)
        forward, reverse = (t * (t / s).log()).sum(), (s * (s / t).log()).sum()
        values.append(weight * forward + (1 - weight) * reverse)
    return torch.stack(values)


def scipy_shares(student: Tensor, teacher: Tensor, component: Any) -> np.ndarray:
    """With the γ that the objective has measured; a line of its own says whether it is the right one."""
    return scipy_jeffreys(student, teacher, component.gamma.item())


def gamma_error(gamma: str) -> float:
    """γ over observed batches of unequal sizes, against the mean over all of their rows."""
    from distily_divergences import ConfidenceKL

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 11, generator=generator, dtype=torch.float64) * 2 for n in (1, 7, 4)]
    labels = [torch.randint(11, (len(batch),), generator=generator) for batch in batches]
    objective = ConfidenceKL(gamma=gamma).double()  # type: ignore[arg-type]
    for rows, targets in zip(batches, labels, strict=True):
        objective.observe(rows, rows, labels=targets)
    objective.conclude()
    (p,) = probabilities(torch.cat(batches))
    expected = p.max(-1).mean() if gamma == "max" else p[np.arange(12), torch.cat(labels)].mean()
    return abs(objective.gamma.item() - expected)


# --- A8: total variation ---


def half_l1(student: Tensor, teacher: Tensor) -> np.ndarray:
    s, t = probabilities(student, teacher)
    return 0.5 * np.abs(s - t).sum(-1)


def positive_parts(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = softmax(student, teacher)
    return torch.relu(t - s).sum(-1)


def transport(student: Tensor, teacher: Tensor) -> np.ndarray:
    """The least mass to move, where every move costs 1."""
    import ot

    cost = 1.0 - np.eye(student.shape[-1])
    return np.array([ot.emd2(s, t, cost) for s, t in zip(*probabilities(student, teacher), strict=True)])


# --- A9, A10: powers of probabilities ---


def cichocki(student: Tensor, teacher: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """The five cases of Cichocki, Cruces and Amari 2011, as written there."""
    s, t = softmax(student, teacher)
    total = alpha + beta
    if alpha and beta and total:
        terms = t**alpha * s**beta - alpha / total * t**total - beta / total * s**total
        return -terms.sum(-1) / (alpha * beta)
    if alpha and not beta:
        return (t**alpha * (t**alpha / s**alpha).log() - t**alpha + s**alpha).sum(-1) / alpha**2
    if beta and not alpha:
        return (s**beta * (s**beta / t**beta).log() - s**beta + t**beta).sum(-1) / beta**2
    if alpha:
        return ((s**alpha / t**alpha).log() + (s**alpha / t**alpha) ** -1 - 1).sum(-1) / alpha**2
    return 0.5 * (t.log() - s.log()).square().sum(-1)


def hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = softmax(student, teacher)
    return 2 * (s.sqrt() - t.sqrt()).square().sum(-1)


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = softmax(student, teacher)
    return 0.5 * (s - t).square().sum(-1)


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = softmax(student, teacher)
    return 0.5 * ((t - s).square() / s).sum(-1)


def neyman(student: Tensor, teacher: Tensor) -> Tensor:
    return pearson(teacher, student)


def power_sum(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    s, t = softmax(student, teacher)
    return (t**alpha * s ** (1 - alpha)).sum(-1).log() / (alpha - 1)


def geometric_path(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> np.ndarray:
    """R_α (1−α) = α KL(r‖t) + (1−α) KL(r‖s) for r on the geometric path between s and t (van Erven, Harremoës 2014)."""
    between = alpha * torch.log_softmax(teacher, -1) + (1 - alpha) * torch.log_softmax(student, -1)
    s, t, r = probabilities(student, teacher, between)
    return (alpha * entropy(r, t) + (1 - alpha) * entropy(r, s)) / (1 - alpha)


def alpha_beta(alpha: float, beta: float, note: str = "", **oracles: Any) -> Case:
    return Case("A9", "alpha_beta", {"Cichocki's formula": cichocki, **oracles}, {"alpha": alpha, "beta": beta}, note=note)


LIMIT = "ABKD's code is off by the power that is not 0"
ENDS = "TRL and Liger return the KL divergences at β = 0 and 1"
CASES: list[Case | Check] = [
    Case("A1", "forward_kl", {"scipy": scipy_forward, **FORWARD}),
    Case("A2", "reverse_kl", {"scipy": scipy_reverse, **REVERSE}),
    Case("A3", "jeffreys", {"scipy": scipy_jeffreys, "torchtune's formula": torchtune_symmetric}),
    Case("A3", "jeffreys", {"scipy": scipy_jeffreys, "torchtune's formula": torchtune_symmetric}, {"reverse_share": 0.9}),
    Case("A4", "jsd", {"scipy jensenshannon²": scipy_jensenshannon, "entropies": entropies, "TRL": trl, "Liger": liger}),
    Case("A4", "jsd", {"scipy": scipy_jsd, "TRL": trl, "Liger": liger}, {"beta": 0.1}, note=ENDS),
    Case("A4", "jsd", {"scipy": scipy_jsd, "entropies": entropies}, {"beta": 0.9, "normalize": "beta"}),
    Case("A4", "jsd", {"scipy": scipy_jsd, "entropies": entropies}, {"beta": 1e-3, "normalize": "beta"}),
    Case("A5", "skew_kl", {"scipy": scipy_skew, "DistiLLM's formula": skewed}),
    Case("A5", "skew_kl", {"scipy": scipy_forward, **FORWARD}, {"skew": 0.0}),
    Case("A5", "skew_reverse_kl", {"scipy": scipy_skew_reverse, "DistiLLM's formula": skewed_reverse}, {"skew": 0.3}),
    Case(
        "A5", "skew_reverse_kl", {"scipy": scipy_skew_reverse, "DistiLLM-2's formula": skewed_reverse}, {"detach_mixture": True}
    ),
    Case("A6", "adaptive_kl", {"loop": adaptive_loop}),
    Case("A6", "adaptive_kl", {"loop": adaptive_loop}, {"head_mass": 0.9}),
    Case("A7", "confidence_kl", {"scipy": scipy_shares}),
    Case("A7", "confidence_kl", {"scipy": scipy_shares}, {"gamma": "max"}),
    Case("A7", "confidence_kl", {"scipy": scipy_shares}, {"gamma": 0.3}),
    *(
        Check("A7", "confidence_kl", f"numpy, γ = {gamma}", "value", functools.partial(gamma_error, gamma), 1e-12)
        for gamma in ("label", "max")
    ),
    Case("A8", "total_variation", {"numpy": half_l1, "positive parts": positive_parts, "POT emd2": transport}),
    alpha_beta(0.2, 0.7),
    alpha_beta(1.0, 0.0, **{"scipy, forward": scipy_forward}),
    alpha_beta(0.0, 1.0, **{"scipy, reverse": scipy_reverse}),
    alpha_beta(0.5, 0.5, Hellinger=hellinger),
    alpha_beta(1.0, 1.0, **{"squared distance": squared_distance}),
    alpha_beta(0.5, 0.0, LIMIT),
    alpha_beta(0.0, 0.5, LIMIT),
    alpha_beta(0.5, -0.5, LIMIT),
    alpha_beta(0.0, 0.0),
    Case("A10", "renyi", {"power sum": power_sum, "geometric path": geometric_path}),
    Case("A10", "renyi", {"power sum": power_sum, "geometric path": geometric_path}, {"alpha": 5.0}),
    Case("A10", "renyi", {"power sum": power_sum, "geometric path": geometric_path}, {"alpha": 0.97}),
    Case("A10", "renyi", {"scipy, forward": scipy_forward, **FORWARD}, {"alpha": 1.0}),
    Case("A10", "amari_alpha", {"Hellinger": hellinger}),
    Case("A10", "amari_alpha", {"scipy, forward": scipy_forward}, {"alpha": 1.0}),
    Case("A10", "amari_alpha", {"scipy, reverse": scipy_reverse}, {"alpha": 0.0}),
    Case("A10", "amari_alpha", {"Pearson's χ² / 2": pearson}, {"alpha": 2.0}),
    Case("A10", "amari_alpha", {"Neyman's χ² / 2": neyman}, {"alpha": -1.0}),
]
