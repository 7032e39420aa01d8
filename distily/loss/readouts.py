"""The logit lens: what the final norm and the head of a model read off the output of any of its blocks.

Letters: n rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distily.errors import DistilyError
from distily.loss.features import body
from distily.loss.heads import OutputHead


def final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head. Raises ``DistilyError`` where the model has none that can be told."""
    norms = [child for child in body(model).children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise DistilyError(f"{type(model).__name__}: no norm was found after its blocks, so a logit lens cannot read them.")
    return norms[-1]


class Readout:
    """Reads logits off hidden rows by a model's own norm and head, whose weights get no gradient from it."""

    def __init__(self, model: Any, head: OutputHead, vocabulary: int) -> None:
        self.norm, self.head, self.vocabulary = final_norm(model), head, vocabulary

    def logits(self, rows: Tensor) -> Tensor:
        """``(n, H) -> (n, V)`` in float32 (float64 stays)."""
        frozen = {name: parameter.detach() for name, parameter in self.norm.named_parameters()}
        normed: Any = torch.func.functional_call(self.norm, frozen, (rows,))
        return self.head.frozen_logits(normed, self.vocabulary)
