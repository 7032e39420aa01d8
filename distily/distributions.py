"""Arithmetic of distributions that every objective on logits shares, in the log domain and safe for masked entries.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_distributions(*logits: Tensor) -> list[Tensor]:
    """The log-softmax of each argument over its last dimension."""
    return [values.log_softmax(-1) for values in logits]


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) over the last dimension, in nats, with 0 · log 0 = 0 (entries masked by -inf): ``(…, V), (…, V) -> (…)``."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)  # chosen before the product: 0 · inf has a gradient of NaN


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−Σ p log q over the last dimension, with 0 · log 0 = 0: ``(…, V), (…, V) -> (…)``."""
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_q, 0.0)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 − share) · q); ``share`` in [0, 1]."""
    if share <= 0.0:
        return log_q
    if share >= 1.0:
        return log_p
    absent = torch.maximum(log_p, log_q).isneginf()  # in both: logaddexp would have a gradient of NaN
    parts = (log_p + math.log(share), log_q + math.log1p(-share))
    return torch.logaddexp(*(part.masked_fill(absent, 0.0) for part in parts)).masked_fill(absent, -math.inf)


def jensen_shannon(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """The generalised Jensen-Shannon divergence, share · KL(p‖m) + (1 − share) · KL(q‖m): ``(…, V), (…, V) -> (…)``.

    The mixture m is share · p + (1 − share) · q, with ``share`` in (0, 1); exact also where log m and log q round to the same.
    """
    if share > 0.5:
        return jensen_shannon(log_q, log_p, 1.0 - share)
    limit = math.log(torch.finfo(log_p.dtype).max) - 1.0  # a larger ratio changes nothing; infinite in only one, NaN in neither
    ratio = (log_p - log_q).nan_to_num(nan=0.0).clamp(-limit, limit)
    above_q = torch.log1p(share * torch.expm1(ratio))  # log m − log q; log p − log m is the rest of the ratio
    return (share * log_p.exp() * (ratio - above_q) - (1.0 - share) * log_q.exp() * above_q).sum(-1)


def log_mass(log_p: Tensor, selected: Tensor) -> Tensor:
    """The log-probability of the ``selected`` tokens: ``(…, V), (…, V) -> (…, 1)``. -inf, with gradient 0, where they have none."""
    chosen = log_p.masked_fill(~selected, -math.inf)
    empty = chosen.amax(-1, keepdim=True).isneginf()
    return chosen.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)


def log_conditional(log_p: Tensor, selected: Tensor) -> Tensor:
    """The log-distribution over the ``selected`` tokens alone; -inf for the others, and everywhere if none has mass."""
    mass = log_mass(log_p, selected)
    return log_p.masked_fill(~selected, -math.inf) - mass.masked_fill(mass.isneginf(), 0.0)
