"""``--dry-run``: what would run, how large it is, and the memory that it is predicted to need. No weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from distily import data, models
from distily.arguments import optimizer, training_arguments
from distily.config import RunConfig
from distily.plugins import load
from distily.prediction import predict_memory
from distily.products import without_kernels
from distily.record import check_folder
from distily.speed import choose


def describe(config: RunConfig, resume: bool = False) -> str:
    """The resolved configuration, both models' sizes, tokens, steps and predicted peak memory, as text.

    Raises ``DistilyError`` for whatever can be found wrong without weights. Tokenised data go to the cache.
    """
    check_folder(config, resume)
    plugins = load()
    speed = choose(config)
    arguments = training_arguments(config, Path(config.output_dir), speed=speed)
    plugins.check(config)
    tokenizer = models.load_tokenizer(config.teacher.model, "teacher.model", config.trust_remote_code)
    teacher = models.shape_of_teacher(config.teacher, config.trust_remote_code)
    student = models.shape_of_student(config.student, teacher, config.trust_remote_code)
    if config.quantizer:
        student = plugins.build("quantizers", config.quantizer).prepare(student)
    length = models.max_length(config.data.max_length, tokenizer, teacher, student)
    prepared = data.prepare(config.data, tokenizer, length, config.seed, speed.widths(length))
    memory = predict_memory(
        student=student,
        teacher=teacher,
        objectives=config.objectives,
        builder=plugins,
        vocabulary=models.vocabulary_size(tokenizer),
        rows=arguments.per_device_train_batch_size,
        length=length,
        arguments=arguments,
        chunk_rows=config.loss.chunk_rows,
        mixed_precision=speed.autocast,
        packed=config.data.packing,
        device_type=arguments.device.type,
        combiner=config.combiner,
        kernels=config.speed.kernels and without_kernels(arguments.device) is None,
    )
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True).rstrip(), ""]
    lines += [_size("Teacher", config.teacher.model, teacher), _size("Student", config.student.model or "its shape", student)]
    lines += [f"Data, {name}: {report}." for name, report in prepared.report.items()]
    lines += speed.lines(optimizer(config))
    lines += [f"Steps: {_steps(arguments, prepared)} of {_batch(arguments)} sequences, {length} tokens at most."]
    lines += [f"Training, {memory}."]
    return "\n".join(lines)


def _size(role: str, name: str, model: Any) -> str:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return f"{role} ({name}): {model.num_parameters():,} parameters, {weights / 2**20:,.1f} MiB of weights."


def _batch(arguments: Any) -> int:
    ranks = arguments.world_size * max(1, arguments.n_gpu if torch.cuda.is_available() else 1)
    return int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * ranks)


def _steps(arguments: Any, prepared: data.PreparedData) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return max(1, round(len(prepared.train) / _batch(arguments) * arguments.num_train_epochs))
