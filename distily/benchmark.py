"""``distily benchmark speed``: the training step of a run, with its own models and objectives on random tokens, timed on this machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distily import memory, models
from distily.arguments import optimizer, training_arguments
from distily.bare import BareTraining, random_batches
from distily.config import RunConfig
from distily.data import collator_for
from distily.environment import commit, machine, versions
from distily.errors import DistilyError, RunError
from distily.plugins import Plugins
from distily.precision import UNITS
from distily.speed import Say, Speed, choose

LEAST, MOST = 3, 50
"""Steps that are timed, however long or short they are."""
CALIBRATION = 1000
"""Batches that calibrated components may see, at most."""


class Stopwatch:
    """When a device passes named places of the program: by events, which nobody waits for, or by the clock of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.instants: dict[str, list[Any]] = {}

    def mark(self, place: str) -> None:
        """Notes that this place is passed."""
        instant: Any = time.perf_counter()
        if self.device.type == "cuda":
            instant = torch.cuda.Event(enable_timing=True)
            instant.record()
        self.instants.setdefault(place, []).append(instant)

    def between(self, first: str, second: str, times: int = 1) -> list[float]:
        """Milliseconds from each ``first`` to its ``second``, ``times`` of them added up; ask when the device is done."""
        pairs = zip(self.instants.get(first, []), self.instants.get(second, []), strict=True)
        if self.device.type == "cuda":
            each = [start.elapsed_time(end) for start, end in pairs]
        else:
            each = [1e3 * (end - start) for start, end in pairs]
        return [sum(each[place : place + times]) for place in range(0, len(each), times)]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def around(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Inside, calls ``before`` and ``after`` around each forward of ``module``."""
    handles = (module.register_forward_pre_hook(lambda *_: before()), module.register_forward_hook(lambda *_: after()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Row:
    """One way to take the step. Times are medians in milliseconds, memory is in bytes; None: there is none of it, or it is not seen."""

    name: str
    milliseconds: float | None = None
    steps: int = 0
    first_seconds: float | None = None
    """The first step, with what is compiled or planned in it."""
    memory_peak: int | None = None
    head_milliseconds: float | None = None
    """The loss head: both models' logits, the terms on them, and the gradients at hidden states and head."""
    head_memory: int | None = None
    """What it takes on a GPU over what is there before it."""
    teacher_milliseconds: float | None = None
    failed: str | None = None
    keys: list[str] = field(default_factory=list)
    """Settings that it has beside the run's own."""

    def cells(self, tokens: int) -> list[str]:
        """The row of the table; ``tokens``: of a step."""
        if self.milliseconds is None:
            return [self.name, str(self.failed), *[""] * (len(HEADINGS) - 2)]
        numbers = (self.teacher_milliseconds, self.head_milliseconds, _gib(self.head_memory), _gib(self.memory_peak))
        return [
            self.name,
            f"{self.milliseconds:.1f}",
            *("–" if number is None else f"{number:.2f}" for number in numbers),
            f"{1e3 * tokens / self.milliseconds:,.0f}",
            f"{self.first_seconds:.1f}",
        ]


HEADINGS = ("", "step ms", "teacher ms", "loss head ms", "loss head GiB", "peak GiB", "tokens/s", "first step s")


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def measure(name: str, training: BareTraining, seconds: float) -> Row:
    """The step of an applied training, timed for about ``seconds`` after it has come to rest."""
    device, driver, row, watch = training.device, training.driver, Row(name), Stopwatch(training.device)
    began = time.perf_counter()
    training.step()
    synchronize(device)
    row.first_seconds = time.perf_counter() - began
    training.settle()
    parts: dict[str, Any] = {"teacher": training.teacher}
    if driver.head is not None and any(term.on_logits for term in driver.terms):
        parts["head"] = driver.head.module
    began = time.perf_counter()
    row.head_memory = _memory_of(parts.get("head"), training)
    synchronize(device)
    row.steps = max(LEAST, min(MOST, int(seconds / (time.perf_counter() - began))))
    memory.reset_peak()
    with ExitStack() as stack:
        for part, module in parts.items():
            if module is not None:
                stack.enter_context(around(module, partial(watch.mark, part), partial(watch.mark, f"{part}, done")))
        for _ in range(row.steps):
            watch.mark("step")
            training.step()
            watch.mark("step, done")
        synchronize(device)
    row.memory_peak = memory.read()["memory_peak"]
    row.milliseconds = statistics.median(watch.between("step", "step, done"))
    found = [watch.between(part, f"{part}, done", len(training.batches)) for part in ("teacher", "head")]
    row.teacher_milliseconds, row.head_milliseconds = (statistics.median(each) if each else None for each in found)
    return row


def _memory_of(head: nn.Module | None, training: BareTraining) -> int | None:
    """One step, and the most that its loss head takes on a GPU, in bytes."""
    if head is None or training.device.type != "cuda":
        training.step()
        return None
    there: list[int] = []
    taken: list[int] = []

    def before() -> None:
        memory.reset_peak()
        there.append(memory.read()["memory_now"])

    with around(head, before, lambda: taken.append(memory.read()["memory_peak"] - there[-1])):
        training.step()
    return max(taken)


NAMED = ("distily", "python", "torch", "transformers", "triton", "torchao", "liger-kernel")
ON_CPU = (
    "There is no GPU here: this is slow, times are this CPU's and memory is the whole process's. What can be compared are objectives "
    "and models with each other. Fused kernels, attention kernels and 8 bits need a GPU and were not timed."
)


@dataclass(frozen=True)
class SpeedReport:
    """What ``distily benchmark speed`` found; ``str`` is what it prints."""

    models: str
    batch: Mapping[str, int]
    lines: Sequence[str]
    rows: Sequence[Row]
    config: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)
    machine: Mapping[str, Any] = field(default_factory=machine)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return prod(self.batch.values())

    def values(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {**asdict(self), "tokens": self.tokens}

    def __str__(self) -> str:
        hardware = ", ".join(self.machine.get("gpus", [])) or f"{self.machine['cores']} CPU cores"
        named = [f"{name} {self.versions[name]}" for name in NAMED if name in self.versions]
        size = " of ".join(f"{count:,} {what}" for what, count in self.batch.items() if what != "micro-batches" or count > 1)
        lines = [f"Machine: {hardware}; {', '.join(named)}; commit {self.commit}.", self.models, f"A step: {size}, random ones."]
        cells = [HEADINGS, *(row.cells(self.tokens) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        keys = [f"{row.name}: with {' '.join(row.keys)}." for row in self.rows if row.keys]
        return "\n".join([*lines, *self.lines, "", *table, "", *keys]).rstrip()


def benchmark_speed(config: RunConfig, plugins: Plugins, seconds: float = 15.0, say: Say = print) -> SpeedReport:
    """Times the step of the run that ``config`` asks for, about ``seconds`` for each way to take it. Reads models and writes nothing.

    Raises ``DistilyError`` for wrong input, ``RunError`` where memory does not hold the step.
    """
    speed = choose(config)
    plugins.check(config)
    arguments = training_arguments(config, Path(config.output_dir), speed=speed)
    device, trust = arguments.device, config.trust_remote_code
    tokenizer = models.load_tokenizer(config.teacher.model, "teacher.model", trust)
    if config.student.model is not None:
        models.check_tokenizers(tokenizer, models.load_tokenizer(config.student.model, "student.model", trust))
    teacher = models.load_teacher(config.teacher, device, trust)
    student = models.build_student(config.student, teacher, config.seed, trust)
    if config.quantizer is not None:
        student = plugins.build("quantizers", config.quantizer).prepare(student)
    student = student.to(device)
    vocabulary = models.vocabulary_size(tokenizer)
    length = models.max_length(config.data.max_length, tokenizer, teacher, student)
    batch = {
        "micro-batches": int(arguments.gradient_accumulation_steps),
        "rows": int(arguments.per_device_train_batch_size),
        "tokens": length,
    }
    collator = collator_for(tokenizer, config.data.packing, speed.widths(length))
    size = (vocabulary, batch["rows"], length)
    batches = list(random_batches(*size, batch["micro-batches"], collator, device, config.seed))

    def start(chosen: RunConfig, say: Say) -> BareTraining:
        text = random_batches(*size, CALIBRATION, collator, device, config.seed + 1)
        return BareTraining(chosen, plugins, student, teacher, vocabulary, batches, text, say)

    rows, path = _rows(config, start, seconds, say)
    described = (
        f"Teacher ({config.teacher.model}): {teacher.num_parameters():,} parameters. "
        f"Student ({config.student.model or 'its shape'}): {student.num_parameters():,} parameters, {student.dtype}."
    )
    lines = replace(speed, loss=path).lines(optimizer(config)) + ([] if speed.on_gpu else [ON_CPU])
    lines += ["fp16 is timed without its loss scaler."] if speed.precision == "fp16" else []
    own = {key: value for key, value in config.to_dict().items() if key != "output_dir"}
    return SpeedReport(described, batch, lines, rows, own)


def _rows(config: RunConfig, start: Callable[..., BareTraining], seconds: float, say: Say) -> tuple[list[Row], str | None]:
    """The step as it was chosen, and without what makes it fast where there is any of that; and how the first one computed its loss."""
    training = start(config, say)
    try:
        with training.applied:
            rows = [measure("as chosen", training, seconds)]
    except torch.OutOfMemoryError as error:
        raise RunError(
            "step: the GPU's memory does not hold it; allowed: a smaller train.per_device_train_batch_size or data.max_length, "
            "or train.gradient_checkpointing=true."
        ) from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, models.MACHINE):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DistilyError(f"objectives: they cannot be computed for this teacher and student: {reason}") from error
    path = training.driver.path
    training.close()
    for name, keys in _plainer(training.speed, path is not None and config.speed.kernels).items():
        other = replace(config, speed=replace(config.speed, **keys))
        rows.append(_other(name, partial(start, other, lambda line: None), seconds))
        rows[-1].keys = [f"speed.{key}={str(value).lower()}" for key, value in keys.items()]
    return rows, path


def _plainer(speed: Speed, kernels: bool) -> dict[str, dict[str, Any]]:
    """Keys of ``speed`` that take away what this step may be fast by: what is ours in the loss, then all of it."""
    loss: dict[str, Any] = {"kernels": False} if kernels else {}
    everything = dict(loss)
    everything |= {"compile": False} if speed.compiled else {}
    everything |= {"graphs": False} if speed.graphs is not False else {}
    everything |= {"attention": "flash"} if speed.attention not in (None, "flash") else {}
    everything |= {"precision": "bf16"} if speed.precision in UNITS else {}
    return {name: keys for name, keys in {"plain loss": loss, "plain": everything}.items() if keys}


def _other(name: str, start: Callable[[], BareTraining], seconds: float) -> Row:
    """A row to compare with, which may need more memory than there is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    training = start()
    try:
        with training.applied:
            return measure(name, training, seconds)
    except torch.OutOfMemoryError:
        return Row(name, failed="out of memory")
    finally:
        training.close()
