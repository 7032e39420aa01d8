"""The contract of a quantizer: the student is prepared once before training and converted once for export.

A quantizer keeps no state of its own between the two: what training changes lives in the student's modules, so that a resumed
run and an uninterrupted one are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Quantizer:
    """Base class. Keyword-only parameters of ``__init__`` are the options."""

    def prepare(self, student: PreTrainedModel) -> PreTrainedModel:
        """Replace the modules that train quantised, in place; state-dict keys stay those of the plain model."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")

    def on_progress(self, student: PreTrainedModel, step: int, max_steps: int) -> None:
        """Called before each optimizer step: warm-up schedules live here. Must depend on its arguments alone."""

    def convert(self, student: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the ``quantization_config`` that plain transformers loads: ``(state_dict, config entry)``.

        Raises ``DistilyError`` for a student that the format cannot hold. The student itself is left as it is.
        """
        raise NotImplementedError(f"{type(self).__name__}.convert")
