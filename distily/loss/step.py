"""One open micro-batch of the driver.

Letters: n rows, N supervised tokens of the global, accumulated batch, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distily.batch import Supervision, row_seeds
from distily.loss.features import Place
from distily.loss.meetings import FeatureGradients
from distily.teachers import TeacherSignals

if TYPE_CHECKING:
    from distily.loss.driver import Driver


class Step:
    """One open micro-batch: its supervision, the teacher's signals, and what the loss came to.

    ``loss`` is Σ weight · term ÷ N with gradient; ``values`` holds each term's own Σ ÷ N, detached;
    ``gradients`` each logit term's gradient at the selected last hidden states ``(n, H)`` when it was asked for.
    ``observer``: gets the rows in place of the loss, see ``distily.loss.calibration``.
    """

    def __init__(
        self,
        driver: Driver,
        supervision: Supervision,
        signals: TeacherSignals | None,
        tensors: Mapping[Place, Tensor],
        items: Tensor,
        progress: float,
        seed: int,
        observer: Any = None,
    ) -> None:
        self.driver = driver
        self.supervision = supervision
        self.signals = signals
        self.tensors = tensors
        self.items = items
        self.progress = progress
        self.seed = seed
        self.observer = observer
        self.loss: Tensor | None = None
        self.rows: Tensor | None = None
        self.logit_loss = items.new_zeros((), dtype=torch.float32)
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.feature_gradients = FeatureGradients(driver.meetings)
        self.head_fired = False

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What objectives may ask for by name."""
        supervision = self.supervision
        inputs = {
            "labels": supervision.labels,
            "input_ids": supervision.input_ids,
            "sequence_ids": supervision.sequence_ids,
            "progress": self.progress,
        }
        if any("row_seeds" in term.description.inputs for term in self.driver.terms):
            inputs["row_seeds"] = row_seeds(supervision, self.seed)
        return inputs

    def add(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
