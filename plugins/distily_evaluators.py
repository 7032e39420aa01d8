"""Evaluators on held-out tokens: perplexity, and agreement with the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distily import hookimpl
from distily.evaluation import EvaluationContext, Evaluator


def _cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")


def _divergence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    t = log_t.exp()
    return torch.where(t > 0, t * (log_t - log_s), 0.0).sum(-1)


def _same_first(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


class Perplexity(Evaluator):
    """exp of the mean cross-entropy over all held-out supervised tokens (``perplexity``), and that mean in nats (``nats``)."""

    aliases = ("ppl",)

    def evaluate(self, model: Any, context: EvaluationContext) -> dict[str, float]:
        nats = context.token_means(model, {"nats": _cross_entropy}, False)["nats"]
        return {"perplexity": math.exp(nats) if nats < 700 else math.inf, "nats": nats}


class Agreement(Evaluator):
    """How near the model is to the teacher on held-out tokens: ``kl`` = KL(teacher‖model) in nats, and ``top1``, the share of
    tokens for which both put the same token first. Nothing is reported in a run without a teacher.
    """

    def evaluate(self, model: Any, context: EvaluationContext) -> dict[str, float]:
        if not context.has_teacher:
            return {}
        return context.token_means(model, {"kl": _divergence, "top1": _same_first}, True)


@hookimpl
def distily_evaluators() -> dict[str, object]:
    return {"perplexity": Perplexity, "agreement": Agreement}
