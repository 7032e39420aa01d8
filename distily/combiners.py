"""The contract of a combiner: coefficients for the terms of the loss, from what was measured of their values or gradients.

Terms meet where both have a gradient: the terms on logits at the last hidden states; those on features of a block at that
feature, with all that comes from above. Term 0 of a meeting is the primary one: the first term on logits, or what comes from above.

Letters: K terms of a meeting.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Scope = Literal["step", "token", "micro_batch"]
SCOPES: tuple[Scope, ...] = ("step", "token", "micro_batch")
"""``step``: measured over the whole global batch and smoothed, applied in the next step. ``token``: each token's own gradients.
``micro_batch``: those of the micro-batch, as in the papers; not the same for every division of a batch."""

COMBINER_KEYS = ("scope", "decay", "divided")
"""Keys of a combiner that belong to the core: the scope; how slowly what ``step`` measures is forgotten; that ``micro_batch`` is meant
although a batch is divided."""


class Combiner(nn.Module):
    """Constructed with the number of terms K (from the core) and its options; one instance for each meeting.

    ``measures``: ``gradients`` get the Gram matrix of the weighted terms' gradients at their meeting, ``values`` get the terms' own
    values (unweighted) and have one meeting for the whole run, in ``step`` scope. State is in buffers. Coefficients multiply the
    terms' weights; they are tensors that never leave the device.
    """

    measures: ClassVar[Literal["gradients", "values"]] = "gradients"
    scopes: ClassVar[tuple[Scope, ...]] = SCOPES

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms = terms

    def coefficients(self, measured: Tensor) -> Tensor:
        """Gram matrices ``(…, K, K)``, or values ``(K,)``, to coefficients ``(…, K)``. Pure: it reads state, but changes none."""
        raise NotImplementedError

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        """Moves the state, once per optimizer step, with what was measured over the global batch; before ``coefficients``.

        ``values`` (K,): the terms' own values; where gradients meet, weighted, as their gradients are.
        """

    def report(self) -> dict[str, Tensor]:
        """Further numbers for the log, by name."""
        return {}


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def norms(gram: Tensor) -> Tensor:
    """The lengths of the gradients: ``(…, K, K) -> (…, K)``."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """The cosines of the angles between gradients, 0 where one of them is 0: ``(…, K, K) -> (…, K, K)``."""
    lengths = norms(gram)  # divided by one after the other: their product may be too small for float32
    return divide(divide(gram, lengths[..., :, None]), lengths[..., None, :]).clamp(-1, 1)


def cosine(gram: Tensor, first: int = 0, second: int = 1) -> Tensor:
    """One of ``cosines``: ``(…, K, K) -> (…)``."""
    return cosines(gram)[..., first, second]
