"""The trainer: ``transformers.Trainer`` with the driver's loss, the terms in the log, and evaluators in place of HF's evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from distily import memory
from distily.batch import model_inputs
from distily.evaluation import EvaluationContext, Evaluator, measure
from distily.loss.driver import Driver
from distily.loss.step import Step
from distily.speed import Applied


class Distilling(TrainerCallback):
    """Hands the trainer's clock to a quantizer before each optimizer step, and to the driver after it."""

    def __init__(self, driver: Driver, quantizer: Any, student: Any) -> None:
        self.driver, self.quantizer, self.student = driver, quantizer, student

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.quantizer is not None:
            self.quantizer.on_progress(self.student, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.driver.advance(state.global_step / max(1, state.max_steps))


class DistillationTrainer(Trainer):
    """Trains a student that a driver is attached to. Overrides ``compute_loss``, ``log`` and ``evaluate``, nothing private.

    ``applied``: what student and teacher run with while they train; evaluation gets the plain models.
    """

    def __init__(
        self,
        driver: Driver,
        evaluators: Mapping[str, Evaluator],
        context: EvaluationContext | None,
        quantizer: Any = None,
        applied: Applied | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        # the loss is divided by the tokens of the accumulated batch already, for every class of model
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.driver = driver
        self.evaluators = evaluators
        self.evaluation_context = context
        self._applied = applied
        self._sums: dict[str, Tensor] = {}
        self._tokens = self._logged_step = 0
        self._clock: float | None = None
        self._paused = 0.0
        self.add_callback(Distilling(driver, quantizer, self.model))

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return self.state.global_step / max(1, self.state.max_steps)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The driver's loss of one micro-batch, for a backward whose gradients are averaged over ranks."""
        if self._clock is None:
            memory.reset_peak()
            self._restart()
        with self.driver.step(inputs, num_items_in_batch, self.progress, self.state.global_step) as step:
            outputs = model(**model_inputs(inputs), use_cache=False)
        self._collect(step, inputs)
        loss = outputs["loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # N counts the tokens of all ranks, DDP averages
        return (loss, outputs) if return_outputs else loss

    def _collect(self, step: Step, inputs: Mapping[str, Any]) -> None:
        for key, value in step.values.items():
            weighted = value * self.driver.weight(key, step.progress)
            for name, part in ((f"{key}", value), (f"{key}_weighted", weighted)):
                self._sums[name] = self._sums[name] + part if name in self._sums else part.clone()
        self._tokens += inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training log: each term raw and weighted, seconds, tokens a second, memory with its training peak."""
        if "loss" in logs and self._clock is not None and self.state.global_step > self._logged_step:
            steps = self.state.global_step - self._logged_step
            ranks = self.accelerator.num_processes
            for name, value in self._sums.items():
                total = self.accelerator.reduce(value, "sum") if ranks > 1 else value
                scale = 1.0 if self.args.average_tokens_across_devices else 1.0 / ranks
                logs[f"term_{name}"] = float(total) * scale / steps
            seconds = time.perf_counter() - self._clock - self._paused
            logs["train_seconds"] = seconds
            logs["tokens_per_second"] = self._tokens * ranks / max(seconds, 1e-9)
            logs.update(self.driver.measurements())
            logs.update({f"train_{name}": value for name, value in memory.read().items()})
            self._restart()
        super().log(logs, start_time)

    def _restart(self) -> None:
        self._sums, self._tokens, self._paused = {}, 0, 0.0
        self._logged_step = self.state.global_step
        self._clock = time.perf_counter()

    def evaluate(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> dict[str, float]:
        """The evaluators that are cheap enough, on the held-out tokens, with time and memory of their own."""
        if self.evaluation_context is None:
            return {}
        began = time.perf_counter()
        before = memory.read()
        with self._applied.paused() if self._applied is not None else nullcontext():
            memory.reset_peak()
            results = measure(self.evaluators, self.model, self.evaluation_context, during_training=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        if "perplexity_nats" in results:
            metrics[f"{metric_key_prefix}_loss"] = results["perplexity_nats"]
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - began
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in memory.read().items()})
        metrics["train_memory_before_eval"] = before["memory_now"]
        metrics["train_memory_peak"] = before["memory_peak"]
        memory.reset_peak()
        self._paused += time.perf_counter() - began
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
