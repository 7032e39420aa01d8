"""The contract of an evaluator: a model and a context in, named numbers out.

The same evaluators measure the teacher, the untrained student, the trained student and the control, on the same held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TokenFunction = Callable[..., "Tensor"]
"""``(student_logits (N, V), teacher_logits (N, V) or None, labels (N,)) -> (N,)``."""


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluator may use.

    ``token_means(model, functions, against_teacher)`` walks the held-out supervised tokens in chunks, in float32, and
    returns the mean of each function over them; logits are never whole. ``has_teacher`` is False in a run without one.
    """

    tokenizer: PreTrainedTokenizerBase
    token_means: Callable[[PreTrainedModel, Mapping[str, TokenFunction], bool], dict[str, float]]
    has_teacher: bool
    batch_size: int
    output_dir: str


class Evaluator:
    """Base class. Keyword-only parameters of ``__init__`` are the options. ``during_training``: cheap enough for every
    evaluation step; otherwise it runs before and after training only.
    """

    during_training = True

    def prepare(self) -> None:
        """Called before training starts, so that a wrong name or a missing file is found at once and not after hours."""

    def evaluate(self, model: PreTrainedModel, context: EvaluationContext) -> dict[str, float]:
        """Named numbers of ``model``; the run stores them as ``<evaluator>_<metric>``."""
        raise NotImplementedError(f"{type(self).__name__}.evaluate")


def measure(
    evaluators: Mapping[str, Evaluator], model: Any, context: EvaluationContext, during_training: bool = False
) -> dict[str, float]:
    """All evaluators on one model, in evaluation mode without gradients: ``{evaluator_metric: value}``."""
    import torch

    training = model.training
    model.eval()
    results: dict[str, float] = {}
    with torch.no_grad():
        for name, evaluator in evaluators.items():
            if during_training and not evaluator.during_training:
                continue
            for metric, value in evaluator.evaluate(model, context).items():
                key = name if metric == name else f"{name}_{metric}"
                results[key] = float(value)
    model.train(training)
    return results
