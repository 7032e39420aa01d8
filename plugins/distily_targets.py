"""Targets that move from the student to the teacher while training.

Letters: N supervised tokens, V vocabulary; z are logits, s and t the student's and the teacher's distributions, k the teacher's share.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from distily import hookimpl
from distily.distributions import log_distributions, relative_entropy
from distily.objectives import token_objective
from distily.schema import Between
from distily.state import Adaptive


@token_objective(
    aliases=("taid", "temporally_adaptive_interpolation"),
    surrogate_gradient=True,
    formula="KL(p_k‖s),  p_k = softmax((1−k) · z_s + k · z_t), held constant",
    source="Shing et al. 2025, arXiv:2501.16937",
)
class AdaptiveTarget(Adaptive):
    """Forward KL to a target between student and teacher that moves to the teacher as fast as the student can follow.

    For students much smaller than their teacher.

    Shapes: ``(N, V), (N, V) -> (N,)``. Range [0, ∞), in nats; zero where the distributions are equal, or at k = 0. Gradient:
    s − p_k, since the student's part of the target is held constant; the value is no measure of progress, as its target moves.
    At k = 1 it is ``forward_kl``. A token that the teacher rules out (-inf) is ruled out in the target.

    After each optimizer step, with J the mean value over the global batch and x the share of training done::

        m ← decay · m + (1 − decay) · (J_before − J) / (J_before + 1e-15)
        k ← min(end, max(start + (end − start) · x, k + rate · sigmoid(m) · (1 − k)))

    The first step only notes J. At the default ``rate`` a run of 1000 steps or fewer follows the straight line.
    The paper's J is this KL; the authors' code takes the soft cross-entropy, whose relative changes are smaller.

    Options: ``start``, k before training. ``end``, k after it. ``rate``, how far k may run ahead of the line in a step. ``decay``, of
    the running mean m of the loss's relative changes.

    Source: Shing, Misaki, Bao, Yokoi, Akiba 2025 (TAID), arXiv:2501.16937.

    >>> objective = AdaptiveTarget(start=0.5)
    >>> objective(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]]))  # the target is softmax(2, 0)
    tensor([0.3278])
    """

    share: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(
        self,
        *,
        start: Annotated[float, Between(0, 1)] = 0.4,
        end: Annotated[float, Between(0, 1)] = 1.0,
        rate: Annotated[float, Between(0, 1)] = 5e-4,
        decay: Annotated[float, Between(0, 1, excluding=(1,))] = 0.99,
    ) -> None:
        super().__init__()
        if start > end:
            raise ValueError(f"start is {start}, above end, {end}; the target moves towards the teacher")
        self.start, self.end, self.rate, self.decay = start, end, rate, decay
        for name, value in (("share", start), ("momentum", 0.0), ("previous", math.inf)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float64), persistent=False)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        between = (1.0 - self.share) * student_logits.detach() + self.share * teacher_logits.detach()
        target = between.masked_fill(teacher_logits.isneginf(), -math.inf)
        log_s, log_target = log_distributions(student_logits, target)
        values = relative_entropy(log_target, log_s)
        if torch.is_grad_enabled():  # a forward that is repeated for its gradient adds value and count twice: the mean stays
            self.pending[0] += values.detach().sum()
            self.pending[1] += len(values)
        return values

    def advance(self, progress: float) -> None:
        total, count = self.pending
        mean = total / count
        change = (self.previous - mean) / (self.previous + 1e-15)
        momentum = self.decay * self.momentum + (1.0 - self.decay) * change
        line = self.start + (self.end - self.start) * progress
        share = self.share + self.rate * momentum.sigmoid() * (1.0 - self.share)
        seen = count > 0
        known = seen & self.previous.isfinite()
        # Chosen on the device: to ask here would make the host wait.
        self.momentum.copy_(torch.where(known, momentum, self.momentum))
        self.share.copy_(torch.where(known, share.clamp(min=line).clamp(max=self.end), self.share))
        self.previous.copy_(torch.where(seen, mean, self.previous))


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"adaptive_target": AdaptiveTarget}
