"""Everything a run needs, loaded, checked against each other and measured against the machine, before anything is written."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer

from distily import data, models, probes
from distily.arguments import kept_checkpoints, training_arguments
from distily.batch import model_inputs, moved
from distily.config import RunConfig
from distily.errors import DistilyError
from distily.evaluation import EvaluationContext, Evaluator
from distily.heldout import HeldOut
from distily.loggers import Logger
from distily.loss.calibration import calibrate
from distily.loss.driver import Driver, local_teacher
from distily.loss.meetings import combination
from distily.loss.terms import build_terms
from distily.plugins import Plugins
from distily.spec import Component
from distily.speed import Speed, choose


@dataclass(frozen=True)
class Assembly:
    """The parts of a run. ``new_student`` builds the same student every time."""

    config: RunConfig
    plugins: Plugins
    device: torch.device
    tokenizer: Any
    teacher: Any
    vocabulary: int
    data: data.PreparedData
    evaluators: Mapping[str, Evaluator]
    loggers: list[Logger]
    context: EvaluationContext
    speed: Speed

    def new_student(self) -> tuple[Any, Any]:
        """``(student, quantizer)`` on the device, from the seed alone."""
        student = models.build_student(self.config.student, self.teacher, self.config.seed, self.config.trust_remote_code)
        quantizer = self.plugins.build("quantizers", self.config.quantizer) if self.config.quantizer else None
        if quantizer is not None:
            student = quantizer.prepare(student)
        return student.to(self.device), quantizer

    def new_driver(self, student: Any, objectives: tuple[Component, ...]) -> Driver:
        """A driver for ``objectives``, attached to the student."""
        combiner = self.config.combiner if objectives == self.config.objectives else None
        config = replace(self.config, objectives=objectives, combiner=combiner)
        return attached_driver(
            config, self.plugins, student, self.teacher, self.vocabulary, self._calibration_batches(), self.speed
        )

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Training text in its own order, the same on every rank."""
        size = int(self.config.train.get("per_device_train_batch_size", 8))
        rows = iter(self.data.train)
        while batch := list(islice(rows, size)):
            yield moved(self.data.collator(batch), self.device)


def attached_driver(
    config: RunConfig,
    plugins: Plugins,
    student: Any,
    teacher: Any,
    vocabulary: int,
    text: Iterable[Mapping[str, Any]],
    speed: Speed,
) -> Driver:
    """The driver of a configuration, attached to the student; ``text``: batches that calibrated components see before.

    Without an objective that needs one, no teacher runs.
    """
    rows, kernels = config.loss.chunk_rows, config.speed.kernels
    terms = build_terms(config.objectives, plugins, student, teacher, config.seed)
    source = local_teacher(teacher, terms, vocabulary, float8=kernels and speed.precision == "fp8")
    combined = combination(config.combiner, plugins)
    driver = Driver(terms, source, vocabulary, rows, config.seed, combination=combined, kernels=kernels)
    driver.attach(student)
    calibrate(driver, text)
    return driver


def assemble(config: RunConfig, plugins: Plugins) -> Assembly:
    """Loads teacher and data, builds a student, and asks every question that can be asked before training.

    Raises ``DistilyError`` for whatever does not fit.
    """
    speed = choose(config)
    plugins.check(config)
    if config.data.streaming and config.train.get("max_steps", -1) < 1:
        raise DistilyError("train.max_steps: it is missing; with data.streaming the number of steps must be given.")
    device = training_arguments(config, Path(config.output_dir), speed=speed).device
    evaluators = {plugins.find("evaluators", entry.name).name: plugins.build("evaluators", entry) for entry in config.evaluators}
    for evaluator in evaluators.values():
        evaluator.prepare()
    loggers = [plugins.build("loggers", entry) for entry in config.loggers]
    tokenizer = models.load_tokenizer(config.teacher.model, "teacher.model", config.trust_remote_code)
    if config.student.model is not None:
        other = models.load_tokenizer(config.student.model, "student.model", config.trust_remote_code)
        models.check_tokenizers(tokenizer, other)
    teacher = models.load_teacher(config.teacher, device, config.trust_remote_code)
    student = models.build_student(config.student, teacher, config.seed, config.trust_remote_code)
    vocabulary = models.vocabulary_size(tokenizer)
    _check_heads(vocabulary, student=student, teacher=teacher)
    length = models.max_length(config.data.max_length, tokenizer, teacher, student)
    with PartialState().local_main_process_first():  # the other ranks find the cache filled
        prepared = data.prepare(config.data, tokenizer, length, config.seed, speed.widths(length))
    batch_size = int(config.train.get("per_device_eval_batch_size", 8))
    heldout = HeldOut(prepared.heldout, prepared.heldout_collator, teacher, vocabulary, batch_size, speed.autocast)
    context = EvaluationContext(tokenizer, heldout.token_means, True, batch_size, config.output_dir)
    parts = Assembly(config, plugins, device, tokenizer, teacher, vocabulary, prepared, evaluators, loggers, context, speed)
    loss = _probe(parts, student.to(device))
    _check_disk(config, student)
    return replace(parts, speed=replace(speed, loss=loss))


def _check_heads(vocabulary: int, **by_role: Any) -> None:
    for role, model in by_role.items():
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < vocabulary:
            raise DistilyError(
                f"{role}: its head has {rows} rows, the tokenizer {vocabulary} tokens; allowed: a model that knows every token."
            )


def _probe(parts: Assembly, student: Any) -> str | None:
    """The driver's logits against both models' own, packing if it is asked for, and one step of the whole loss: how that was computed."""
    batch = parts.data.heldout_collator([parts.data.heldout[index] for index in range(min(2, len(parts.data.heldout)))])
    placed = moved(batch, parts.device)
    for role, model in (("teacher", parts.teacher), ("student", student)):
        probes.check_native_logits(role, model, placed)
        if parts.config.data.packing:
            probes.check_packing(role, model, parts.vocabulary)
    quantized = parts.plugins.build("quantizers", parts.config.quantizer) if parts.config.quantizer else None
    if quantized is not None:
        student = quantized.prepare(student)
    driver = parts.new_driver(student, parts.config.objectives)
    _check_step(parts, student, driver, placed)
    _check_trainer(parts, student)
    driver.close()
    return driver.path


def _check_step(parts: Assembly, student: Any, driver: Driver, batch: dict[str, Any]) -> None:
    """One forward and backward of the whole loss: what terms cannot do with these two models shows before anything is written."""
    try:
        with driver.step(batch), torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.speed.autocast):
            loss = student(**model_inputs(batch), use_cache=False)["loss"]
        if loss.requires_grad:
            loss.backward()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DistilyError(f"objectives: they cannot be computed for this teacher and student: {reason}") from error
    student.zero_grad()


def _check_trainer(parts: Assembly, student: Any) -> None:
    """The trainer of transformers with its optimizer, schedule and loader, built once where nothing stays."""
    with tempfile.TemporaryDirectory(prefix="distily-") as folder:
        arguments = training_arguments(parts.config, Path(folder), speed=parts.speed)
        try:
            trainer = Trainer(student, arguments, parts.data.collator, parts.data.train, parts.data.heldout)
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            trainer.get_train_dataloader()
        except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DistilyError(f"train: transformers refuses it: {reason}") from error
    del trainer
    gc.collect()  # a trainer is full of cycles and would keep this student's memory


def _check_disk(config: RunConfig, student: Any) -> None:
    """Room for the checkpoints that are kept at a time (weights and two moments), and for the export."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    kept = min(kept_checkpoints(config), 100) + 1
    needed = weights * (3 * kept + 1)
    place = next(
        path for path in (Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DistilyError(
            f"output_dir: {config.output_dir!r} has {free / 2**30:.2f} GiB free and the run needs about {needed / 2**30:.2f} GiB; "
            "allowed: a larger disk, or fewer checkpoints by train.save_total_limit."
        )
