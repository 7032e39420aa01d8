"""Components with state: constants that are measured before training, or that move once per optimizer step.

Both live in buffers of modules on the student, so that checkpoints and ``--resume`` carry them; the export leaves them out.
Letters: n rows, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Calibrated(nn.Module):
    """An objective, projector or normalizer with constants that are measured on training text before training.

    The driver calls ``observe`` with rows of student and teacher until ``calibration_rows`` of them were seen (or the text ends),
    then ``conclude`` once. Rows are those that the component will see: logits, or features of its pair of layers before any
    projector, in float32. All ranks calibrate on the same text. A resumed run takes the constants from its checkpoint.
    """

    calibration_rows: int = 8192

    def observe(self, student: Tensor, teacher: Tensor, **inputs: Any) -> None:
        """Takes in ``(n, Hs)`` and ``(n, Ht)``, and the driver's inputs by name."""
        raise NotImplementedError

    def conclude(self) -> None:
        """Turns what was observed into the constants. Raises ``ValueError`` where that was too little."""
        raise NotImplementedError


class Adaptive(nn.Module):
    """A component whose state moves once per optimizer step, from sums over the whole global batch.

    During the micro-batches of a step it adds to its buffer ``pending`` (in place, detached, only while gradients are on);
    then the driver sums ``pending`` over the ranks, calls ``advance`` and sets it back to zero. So state, and with it the loss, does
    not depend on how the batch was divided. ``pending`` is registered with ``persistent=False``; state in other buffers.
    """

    pending: Tensor

    def advance(self, progress: float) -> None:
        """Folds the global ``pending`` into the state. ``progress``: share of the training done."""
        raise NotImplementedError


def once_observed(function: Callable[..., Any], owners: Sequence[nn.Module]) -> Callable[..., Any]:
    """``function``, which activation checkpointing runs twice: the second run adds nothing to the owners' ``pending``."""
    ran: list[bool] = []

    def run(*arguments: Any) -> Any:
        if not ran:
            ran.append(True)
            return function(*arguments)
        adaptive = [module for owner in owners for module in owner.modules() if isinstance(module, Adaptive)]
        kept = [module.pending.clone() for module in adaptive]
        try:
            return function(*arguments)
        finally:
            for module, pending in zip(adaptive, kept, strict=True):
                module.pending.copy_(pending)

    return run


class Moments:
    """Means and covariance of two sets of rows, summed up in float64 as they come: what calibration is made of."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums: list[Tensor] = []

    def add(self, first: Tensor, second: Tensor) -> None:
        """Takes in ``(n, H1)`` and ``(n, H2)``."""
        first, second = first.detach().double(), second.detach().double()
        new = [first.sum(0), second.sum(0), first.T @ second]
        self._sums = [total + more for total, more in zip(self._sums, new, strict=True)] if self._sums else new
        self.rows += first.shape[0]

    @property
    def means(self) -> list[Tensor]:
        """``(H1,)`` and ``(H2,)``. Raises ``ValueError`` where no more than one row came."""
        if self.rows < 2:
            raise ValueError(f"it saw {self.rows} rows; allowed: 2 or more")
        return [total / self.rows for total in self._sums[:2]]

    def covariance(self) -> Tensor:
        """``(H1, H2)``, divided by the number of rows. Raises ``ValueError`` where no more than one row came."""
        first, second = self.means
        return self._sums[2] / self.rows - first[:, None] * second
