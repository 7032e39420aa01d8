"""The contract of a logger: metrics go somewhere besides ``metrics.jsonl``, which is always written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Logger:
    """Base class. Keyword-only parameters of ``__init__`` are the options.

    ``report_to`` names a sink that ``transformers.Trainer`` already knows (``tensorboard``, ``wandb`` …); the run then
    hands it to the trainer and the methods below need not be overridden.
    """

    report_to: str | None = None

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        """Called once before training; ``config`` holds no secrets."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Called at each logging step and after each evaluation, on the main process only."""

    def finish(self) -> None:
        """Called once after training, also when it failed."""
