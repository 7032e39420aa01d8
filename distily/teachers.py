"""The contract of a teacher: signals for a batch. Logits are a source that the driver reads by chunk, never a whole tensor.

Letters: B batch, S sequence, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distily.loss.features import Feature, FeatureCapture
from distily.loss.heads import OutputHead, select
from distily.loss.readouts import Readout
from distily.products import EIGHT_BIT_MULTIPLE, Float8Rows, Product

SAMPLE, FARTHEST = 64, 0.01
"""Tokens on which logits in fp8 are compared with the others, and the mean KL divergence in nats up to which they may stand for them.
Logits that share an offset many times their spread, which a softmax does not see, lose more.
"""


class LogitSource(Protocol):
    """The teacher's logits at the supervised tokens of a batch."""

    def chunk(self, rows: slice | Tensor) -> Tensor:
        """Dense logits ``(n, V)`` in float32 of supervised rows ``rows``, without gradient."""

    def product(self, rows: slice | Tensor) -> Product | None:
        """The same before they are formed, where they are hidden states times a head; else None."""


@dataclass(frozen=True)
class TeacherSignals:
    """What the teacher says about one batch: logits at the supervised tokens, features at all of them: ``(B, S, H)``, or
    ``AttentionScores`` at ``attentions``.
    """

    logits: LogitSource | None
    features: Mapping[Feature, Any]


class Teacher(Protocol):
    """A source of signals; a model in this process, or anything that recorded or serves one."""

    has_features: bool
    readout: Readout | None
    """Reads logits off hidden states, where a term asks for that."""

    def signals(self, inputs: Mapping[str, Any], index: Tensor) -> TeacherSignals:
        """Signals for the model inputs of a batch; ``index`` (N,) are the supervised positions of the flattened batch."""

    def close(self) -> None:
        """Gives back what it holds; a model is left as it was."""


class DenseLogits:
    """Logits computed from the last hidden states ``(N, H)`` and the head, a chunk at a time.

    ``float8``: gives the weight of a product in fp8, from which kernels form it, or why they shall not; asked with all hidden states.
    """

    def __init__(
        self,
        head: OutputHead,
        hidden: Tensor,
        vocabulary: int,
        float8: Callable[[Product, Tensor], Float8Rows | str] | None = None,
    ) -> None:
        self.head, self.hidden, self.vocabulary, self.float8 = head, hidden, vocabulary, float8

    def chunk(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            product = self._product(rows)
            if product is None:
                return self.head.logits(self.hidden[rows], self.vocabulary)
            return self.head.finish(product.formed())

    def product(self, rows: slice | Tensor) -> Product | None:
        product = self._product(rows)
        if product is None or self.float8 is None or product.unsuited() or not len(self.hidden):
            return product
        return replace(product, float8=self.float8(product, self.hidden))

    def _product(self, rows: slice | Tensor) -> Product | None:
        weight = getattr(self.head.module, "weight", None)
        return None if weight is None else self.head.product(self.hidden[rows], self.vocabulary, weight.dtype)


class LocalTeacher:
    """Any Hugging Face causal language model in this process, frozen, of any dtype or Hugging Face quantisation.

    ``float8``: the kernels of the loss form its logits in fp8, where they can, from a copy of its head.
    """

    has_features = True

    def __init__(
        self, model: Any, vocabulary: int, wanted: Iterable[Feature] = (), logit_lens: bool = False, float8: bool = False
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = OutputHead(model)
        self.vocabulary = vocabulary
        self._wants_float8 = float8
        self._float8: Float8Rows | str | None = None
        self.capture = FeatureCapture(model, wanted)
        self.readout = Readout(model, self.head, vocabulary) if logit_lens else None

    def signals(self, inputs: Mapping[str, Any], index: Tensor) -> TeacherSignals:
        with torch.no_grad(), self.capture.opened() as tensors:
            hidden = self.head.last_hidden_states(self.model, inputs)
            features = {feature: self.capture.feature(feature, tensors) for feature in self.capture.wanted}
        float8 = self._in_float8 if self._wants_float8 else None
        return TeacherSignals(DenseLogits(self.head, select(hidden, index), self.vocabulary, float8), features)

    def close(self) -> None:
        self.capture.remove()
        self._float8 = None

    def _in_float8(self, product: Product, hidden: Tensor) -> Float8Rows | str:
        """The head in fp8, made when kernels first ask for it, if its logits are near enough to the others for the first ``hidden``."""
        if self._float8 is None:
            self._float8 = _measured_in_float8(replace(product, hidden=hidden[:SAMPLE].to(product.hidden.dtype)))
        return self._float8


def _measured_in_float8(sample: Product) -> Float8Rows | str:
    from distily.kernels.products import divergence_in_float8, float8_rows

    if sample.weight.shape[1] % EIGHT_BIT_MULTIPLE:
        return f"rows of {sample.weight.shape[1]} numbers are not for fp8"
    rows = float8_rows(sample.weight)
    error = float(divergence_in_float8(sample, rows))
    return rows if error <= FARTHEST else f"in fp8 they would be {error:.2g} nats off"
