"""Oracles of the logit objectives that read labels, cut or sample the vocabulary, or compare by something else than a divergence.

They are written from the formulas, on probabilities and with loops where the components stay in the log domain and vectorise, or are
other libraries' functions, called row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F

from oracles.case import Case, Check
from oracles.peers import torchdistill_losses

SEED = 7


def by_row(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer that reduces its batch, as a function of rows: each row is a batch of one."""

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.stack([function(s[None], t[None]) for s, t in zip(student, teacher, strict=True)])

    return rows


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of two lists of positive numbers."""
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def entropy(logits: Tensor) -> np.ndarray:
    return scipy.stats.entropy(scipy.special.softmax(logits.detach().numpy(), -1), axis=-1)


def label_loss(logits: Tensor, labels: Tensor) -> np.ndarray:
    return -np.take_along_axis(scipy.special.log_softmax(logits.detach().numpy(), -1), labels.numpy()[:, None], -1)[:, 0]


# --- A11, A12, A22, A23: with labels ---


def without(p: Tensor, label: Tensor) -> Tensor:
    """A distribution without one of its tokens, renormalised."""
    kept = torch.cat([p[:label], p[label + 1 :]])
    return kept / kept.sum()


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, target_weight: float = 1.0, other_weight: float = 0.5) -> Tensor:
    values = []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        s, t = z_s.softmax(0), z_t.softmax(0)
        target = kl(torch.stack([t[y], 1 - t[y]]), torch.stack([s[y], 1 - s[y]]))
        values.append(target_weight * target + other_weight * kl(without(t, y), without(s, y)))
    return torch.stack(values)


def decoupled_is_forward_kl() -> float:
    """With a = 1 and b = 1 − t_y, row by row, the two parts add up to forward KL."""
    from distily_labels import decoupled_kd

    generator = torch.Generator().manual_seed(SEED)
    student, teacher = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    errors = []
    for row in range(5):
        z_s, z_t, labels = student[row : row + 1], teacher[row : row + 1], torch.tensor([row])
        weight = 1.0 - z_t.softmax(-1)[0, row].item()
        found = decoupled_kd(z_s, z_t, labels=labels, other_weight=weight)
        errors.append(abs(found.item() - scipy.stats.entropy(z_t.softmax(-1)[0].numpy(), z_s.softmax(-1)[0].numpy())))
    return max(errors)


def normalized(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    values = []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        target = -z_t.softmax(0)[y] * z_s.softmax(0)[y].log()
        s, t = without((z_s / temperature).softmax(0), y), without((z_t / temperature).softmax(0), y)
        values.append(target - gamma * temperature**2 * (t * s.log()).sum())
    return torch.stack(values)


def hugging_face(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import fixed_cross_entropy

    return torch.stack([fixed_cross_entropy(z[None], y[None]) for z, y in zip(student, labels, strict=True)])


def token_scaled(student: Tensor, teacher: Tensor, labels: Tensor, weight_temperature: float = 10.0) -> Tensor:
    weights = [math.exp(loss / weight_temperature) for loss in label_loss(teacher, labels)]
    total = 0.0
    for weight, z_s, z_t in zip(weights, student, teacher, strict=True):
        total = total - weight / sum(weights) * (z_t.softmax(0) * z_s.softmax(0).log()).sum()
    return total


# --- A13–A15: other measures ---


def torch_soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student, teacher.softmax(-1), reduction="none")


def textbrewer(name: str) -> Callable[..., Tensor]:
    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        import textbrewer.losses

        return by_row(getattr(textbrewer.losses, name))(student, teacher)

    return rows


def centred_mse(student: Tensor, teacher: Tensor) -> np.ndarray:
    """The variance of the difference."""
    return np.var((student - teacher).detach().numpy(), axis=-1)


def brier(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(s.softmax(0), t.softmax(0), reduction="sum") for s, t in zip(student, teacher, strict=True)])


def torchdistill_standardized(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    peer = torchdistill_losses().LogitStdKDLoss("m", "output", "m", "output", temperature=temperature, alpha=0)
    return by_row(lambda s, t: temperature**2 * peer({"m": {"output": s}}, {"m": {"output": t}}))(student, teacher)


def torchdistill_pearson(student: Tensor, teacher: Tensor) -> Tensor:
    peer = torchdistill_losses().DISTLoss("m", "output", "m", "output")
    return by_row(lambda s, t: peer.inter_class_relation(s.softmax(-1), t.softmax(-1)))(student, teacher)


def scipy_pearson(student: Tensor, teacher: Tensor) -> np.ndarray:
    s, t = (scipy.special.softmax(side.detach().numpy(), -1) for side in (student, teacher))
    return np.array([1 - scipy.stats.pearsonr(*pair).statistic for pair in zip(s, t, strict=True)])


# --- A16: a part of the vocabulary ---


def likeliest(p: Tensor, k: int, mass: float | None) -> set[int]:
    """The k likeliest tokens, of which no more than it takes to reach the mass."""
    chosen: set[int] = set()
    for token in sorted(range(len(p)), key=lambda token: -p[token].item())[:k]:
        if mass is not None and sum(p[other].item() for other in chosen) >= mass:
            break
        chosen.add(token)
    return chosen


def restricted(
    student: Tensor,
    teacher: Tensor,
    k: int,
    p: float | None = None,
    tail: str = "bucket",
    support: str = "teacher",
    divergence: str = "forward_kl",
) -> Tensor:
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        full = {"student": z_s.softmax(0), "teacher": z_t.softmax(0)}
        sides = ["student", "teacher"] if support == "union" else [support]
        tokens = sorted(set.union(*(likeliest(full[side], k, p) for side in sides)))
        s, t = ([full[side][token] for token in tokens] for side in ("student", "teacher"))
        if tail == "bucket":
            s, t = ([*side, 1 - sum(side)] for side in (s, t))
        if tail == "renormalize":
            s, t = ([each / sum(side) for each in side] for side in (s, t))
        m = [(a + b) / 2 for a, b in zip(s, t, strict=True)]
        values.append({"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "jsd": (kl(t, m) + kl(s, m)) / 2}[divergence])
    return torch.stack(values)


def trl_with_tail(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """TRL's own parts, for the teacher's support and forward KL."""
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

    tokens = teacher.topk(k).indices
    sides = [side.log_softmax(-1).gather(-1, tokens) for side in (student, teacher)]
    (log_s, mask), (log_t, _) = (_add_tail_bucket(side, torch.ones_like(tokens, dtype=torch.bool)) for side in sides)
    return _jsd_divergence(log_s, log_t, 0, mask).sum(-1)


RESTRICTED = [
    Case("A16", "top_k", {"TRL server distillation": trl_with_tail, "loops": restricted}, {"k": 4}),
    *(
        Case("A16", "top_k", {"loops": restricted}, {"k": 4, "tail": tail, "support": support})
        for tail in ("bucket", "renormalize", "zero")
        for support in ("teacher", "student", "union")
        if (tail, support) != ("bucket", "teacher")
    ),
    *(
        Case("A16", "top_k", {"loops": restricted}, {"k": 4, "support": "union", "divergence": divergence})
        for divergence in ("reverse_kl", "jsd")
    ),
    Case("A16", "top_p", {"loops": restricted}, {"p": 0.7, "k": 6}),
    Case("A16", "top_p", {"loops": restricted}, {"p": 0.9, "k": 3, "tail": "renormalize", "support": "student"}),
]

# --- A17: sampled targets ---


def splitmix(seed: int, count: int) -> list[float]:
    """SplitMix64 as published, in Python's own integers, from state ``seed``: numbers in (0, 1)."""
    numbers, word = [], 2**64 - 1
    for step in range(1, count + 1):
        z = (seed + step * 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        numbers.append((((z ^ (z >> 31)) >> 11) + 0.5) / 2**53)
    return numbers


def sampled(
    student: Tensor, teacher: Tensor, row_seeds: Tensor, samples: int = 50, rho: float = 1.0, normalize: bool = True
) -> Tensor:
    values = []
    for z_s, z_t, seed in zip(student, teacher, row_seeds.tolist(), strict=True):
        t = z_t.detach().numpy()
        t = np.exp(t - t.max()) / np.exp(t - t.max()).sum()
        q = t**rho / (t**rho).sum()
        target = np.zeros(len(t))
        for u in splitmix(seed, samples):
            token = np.searchsorted(np.cumsum(q), u)
            target[token] += t[token] / q[token] / samples
        if normalize:
            target /= target.sum()
        values.append(-(torch.from_numpy(target) * z_s.softmax(0).log()).sum())
    return torch.stack(values)


# --- A21: ranking ---


def ranked_pairs(teacher: Tensor, k: int) -> list[tuple[int, int]]:
    t = teacher.softmax(0).tolist()
    top = sorted(range(len(t)), key=lambda token: -t[token])[:k]
    return [(a, b) for a in top for b in top if t[a] > t[b] + 1e-8]


def hinge(student: Tensor, teacher: Tensor, k: int = 16, margin: float | None = None) -> Tensor:
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        s, t, pairs = z_s.softmax(0), z_t.softmax(0), ranked_pairs(z_t, k)
        margins = [(t[a] - t[b]).item() if margin is None else margin for a, b in pairs]
        losses = [F.margin_ranking_loss(s[a], s[b], torch.ones(()), each) for (a, b), each in zip(pairs, margins, strict=True)]
        values.append(torch.stack(losses).mean())
    return torch.stack(values)


def logistic(student: Tensor, teacher: Tensor, k: int = 16) -> Tensor:
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        gaps = torch.stack([z_s[a] - z_s[b] for a, b in ranked_pairs(z_t, k)])
        values.append(F.binary_cross_entropy_with_logits(gaps, torch.ones_like(gaps)))
    return torch.stack(values)


# --- A24: the target that moves ---


def interpolated(student: Tensor, teacher: Tensor, start: float = 0.4) -> Tensor:
    target = ((1 - start) * student.detach() + start * teacher).softmax(-1)
    return F.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1)


def schedule_error() -> float:
    """k after 40 steps of a noisy falling loss, by the component and by the published update in Python's own floats."""
    from distily_targets import AdaptiveTarget

    objective = AdaptiveTarget(rate=0.05, decay=0.8)
    share, momentum, before, errors = 0.4, 0.0, None, []
    for step in range(40):
        loss = 2.0 / (1 + step) + 0.3 * math.sin(step) ** 2
        objective.pending.copy_(torch.tensor([loss * 10, 10.0], dtype=torch.float64))
        objective.advance(step / 200)
        if before is not None:
            momentum = 0.8 * momentum + 0.2 * (before - loss) / (before + 1e-15)
            faster = share + 0.05 / (1 + math.exp(-momentum)) * (1 - share)
            share = min(1.0, max(0.4 + 0.6 * step / 200, faster))
        before = loss
        errors.append(abs(objective.share.item() - share))
    return max(errors)


CASES: list[Case | Check] = [
    Case("A11", "decoupled_kd", {"formula on probabilities": decoupled}),
    Case("A11", "decoupled_kd", {"formula on probabilities": decoupled}, {"target_weight": 2.0, "other_weight": 8.0}),
    Check("A11", "decoupled_kd", "scipy.stats.entropy, at b = 1 − t_y", "value", decoupled_is_forward_kl, 1e-12),
    Case(
        "A12",
        "normalized_kd",
        {"formula on probabilities": normalized},
        floor=lambda student, teacher, labels: normalized(teacher, teacher, labels),
        note="the paper's formula; the authors' code keeps the label in the second part",
    ),
    Case(
        "A12",
        "normalized_kd",
        {"formula on probabilities": normalized},
        {"gamma": 0.5, "temperature": 2.0},
        floor=lambda student, teacher, labels, **options: normalized(teacher, teacher, labels, 0.5, 2.0),
    ),
    Case(
        "A13",
        "soft_cross_entropy",
        {"torch.nn.functional.cross_entropy": torch_soft_targets, "textbrewer.kd_ce_loss": textbrewer("kd_ce_loss")},
        floor=lambda student, teacher: entropy(teacher),
    ),
    Case("A14", "logit_mse", {"numpy.var of the difference": centred_mse}),
    Case("A14", "logit_mse", {"textbrewer.kd_mse_loss": textbrewer("kd_mse_loss")}, {"center": False}),
    Case(
        "A14",
        "logit_mse",
        {"torch.nn.functional.mse_loss": by_row(lambda s, t: F.mse_loss(s, t, reduction="sum"))},
        {"center": False, "reduce": "sum"},
    ),
    Case("A14", "probability_mse", {"torch.nn.functional.mse_loss": brier}),
    Case("A15", "standardized_kl", {"torchdistill.LogitStdKDLoss · T²": torchdistill_standardized}),
    Case("A15", "standardized_kl", {"torchdistill.LogitStdKDLoss · T²": torchdistill_standardized}, {"temperature": 2.0}),
    Case(
        "A15",
        "pearson",
        {"torchdistill.DISTLoss.inter_class_relation": torchdistill_pearson, "scipy.stats.pearsonr": scipy_pearson},
        note="torchdistill's whole loss has a factor T² that the correlation does not need",
    ),
    *RESTRICTED,
    *(
        Case(
            "A17",
            "sampled_targets",
            {"SplitMix64 in Python, numpy.searchsorted": sampled},
            options,
            floor=lambda student, teacher, row_seeds, samples=50, rho=1.0, normalize=True: sampled(
                teacher, teacher, row_seeds, samples, rho, normalize
            ),
        )
        for options in ({}, {"samples": 12, "rho": 0.7}, {"samples": 12, "rho": 0.7, "normalize": False})
    ),
    Case("A21", "hinge_ranking", {"torch margin_ranking_loss, in a loop": hinge}, {"k": 5}),
    Case(
        "A21",
        "hinge_ranking",
        {"torch margin_ranking_loss, in a loop": hinge},
        {"margin": 0.1},
        floor=lambda student, teacher, margin: hinge(teacher, teacher, margin=margin),
    ),
    Case(
        "A21",
        "logistic_ranking",
        {"torch binary_cross_entropy_with_logits, in a loop": logistic},
        {"k": 5},
        floor=lambda student, teacher, k: logistic(teacher, teacher, k),
    ),
    Case(
        "A22",
        "cross_entropy",
        {"transformers.fixed_cross_entropy": hugging_face, "scipy log_softmax": lambda s, t, labels: label_loss(s, labels)},
        floor=lambda student, teacher, labels: label_loss(student, labels),
        note="no teacher; the floor is the label loss of the student itself",
    ),
    *(
        Case(
            "A23",
            "token_scaled",
            {"loop over the document": token_scaled},
            options,
            floor=lambda student, teacher, labels, weight_temperature=10.0: token_scaled(
                teacher, teacher, labels, weight_temperature
            ),
        )
        for options in ({}, {"weight_temperature": 1.0})
    ),
    Case("A24", "adaptive_target", {"torch.nn.functional.kl_div": interpolated}),
    Case("A24", "adaptive_target", {"torch.nn.functional.kl_div": interpolated}, {"start": 0.8}),
    Check("A24", "adaptive_target", "published schedule, in Python floats", "value", schedule_error, 1e-12),
]
