"""The whole run on one screen: config → plugins → teacher, student, data → driver → trainer → evaluation → export, card."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback

from distily.arguments import kept_checkpoints, optimizer, training_arguments
from distily.assembly import Assembly, assemble
from distily.card import model_card
from distily.checkpoints import SealCheckpoints, SkipTrained, StopOnSignal, TrainedAlready, newest_whole
from distily.config import RunConfig, resolve
from distily.environment import commit, machine, versions
from distily.errors import Interrupted
from distily.evaluation import measure
from distily.export import export_student
from distily.files import write_json
from distily.plugins import Plugins
from distily.plugins import load as load_plugins
from distily.record import Metrics, MetricsFile, RunRecord, check_folder, is_main_process, open_folder, read_metrics
from distily.report import write_report
from distily.spec import Component
from distily.trainer import DistillationTrainer

CONTROL_OBJECTIVE = Component("cross_entropy")
Say = Callable[[str], None]


def distill(
    config: RunConfig | Mapping[str, Any], plugins: Plugins | None = None, *, resume: bool = False, say: Say | None = None
) -> RunRecord:
    """Distils a student as ``config`` asks, a ``RunConfig`` or the mapping of a configuration file, and returns what came of it.

    Raises ``DistilyError`` for wrong input (nothing is written then) and ``Interrupted`` when a signal stopped the training.
    """
    config = config if isinstance(config, RunConfig) else resolve(config)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    check_folder(config, resume)
    parts = assemble(config, plugins or load_plugins())
    _introduce(parts, say)
    with PartialState().main_process_first():
        record = open_folder(config, resume)
    if "export" in record.done:
        say("This run is complete already.")
        return record
    provenance = _provenance(parts)
    if is_main_process():
        write_json(record.folder / "provenance.json", provenance)

    student, quantizer = parts.new_student()
    record.teacher_parameters, record.student_parameters = parts.teacher.num_parameters(), student.num_parameters()
    record.supervised_tokens = parts.data.report["train"].supervised if "train" in parts.data.report else 0
    record.phase("teacher", lambda: measure(parts.evaluators, parts.teacher, parts.context))
    record.phase("untrained", lambda: measure(parts.evaluators, student, parts.context))

    train(parts, student, quantizer, config.objectives, record.folder, record, say)
    record.phase("student", lambda: measure(parts.evaluators, student, parts.context))
    if config.control is not None:
        record.phase("control", lambda: _control(parts, record, say))

    if is_main_process():
        _publish(parts, record, student, quantizer, provenance)
    record.done.append("export")
    record.save()
    return record


def train(
    parts: Assembly,
    student: Any,
    quantizer: Any,
    objectives: tuple[Component, ...],
    folder: Path,
    record: RunRecord | None,
    say: Say = print,
    **overrides: Any,
) -> None:
    """Trains ``student`` in place, from the newest whole checkpoint in ``folder`` where there is one.

    Afterwards the student is the plain model again. ``record`` receives steps and seconds; None for a control.
    """
    sinks = [logger.report_to for logger in parts.loggers if logger.report_to] if record is not None else []
    arguments = training_arguments(parts.config, folder, speed=parts.speed, report_to=sinks, **overrides)
    driver = parts.new_driver(student, objectives)
    loggers = [logger for logger in parts.loggers if not logger.report_to]
    stop = StopOnSignal()
    applied = parts.speed.applied(student, parts.teacher if driver.teacher is not None else None, say)
    trainer = DistillationTrainer(
        driver,
        parts.evaluators,
        parts.context,
        quantizer,
        applied,
        model=student,
        args=arguments,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.heldout,
        data_collator=parts.data.collator,
        processing_class=parts.tokenizer,
        callbacks=[
            MetricsFile(folder / "metrics.jsonl", loggers, parts.config.to_dict()),
            SealCheckpoints(kept_checkpoints(parts.config)),
            SkipTrained(),
            stop,
        ],
    )
    trainer.remove_callback(PrinterCallback)  # loggers print
    with PartialState().main_process_first():
        newest = newest_whole(folder)
    with ExitStack() as stack:
        stack.enter_context(stop)
        for logger in loggers:
            stack.callback(logger.finish)
        stack.enter_context(suppress(TrainedAlready))
        stack.enter_context(applied)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if stop.stopped:
        raise Interrupted(f"interrupted at step {trainer.state.global_step}; a checkpoint is written, go on with --resume.")
    if quantizer is not None:
        quantizer.on_progress(student, trainer.state.max_steps, trainer.state.max_steps)
    driver.close()
    trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    if record is not None:
        record.steps = trainer.state.global_step
        record.train_seconds = sum(row.get("train_seconds", 0.0) for row in read_metrics(folder / "metrics.jsonl"))


def _control(parts: Assembly, record: RunRecord, say: Say) -> Metrics:
    """The same student on labels alone, at every rate of the grid; the best by held-out nats is the control."""
    assert parts.config.control is not None
    rates: list[float | None] = list(parts.config.control.learning_rates) or [None]
    known = {entry["learning_rate"]: entry["metrics"] for entry in record.control}
    for place, rate in enumerate(rates):
        folder = record.folder / "control" / str(place)
        if rate not in known:
            say(f"Control {place + 1} of {len(rates)}: labels only" + (f", learning rate {rate:g}" if rate else ""))
            folder.mkdir(parents=True, exist_ok=True)
            student, quantizer = parts.new_student()
            overrides = {"learning_rate": rate} if rate else {}
            train(parts, student, quantizer, (CONTROL_OBJECTIVE,), folder, None, say, **overrides)
            known[rate] = measure(parts.evaluators, student, parts.context)
            record.control.append({"learning_rate": rate, "metrics": known[rate]})
            record.save()
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return min(known.values(), key=lambda metrics: metrics.get("perplexity_nats", float("inf")))


def _publish(parts: Assembly, record: RunRecord, student: Any, quantizer: Any, provenance: dict[str, Any]) -> None:
    """The student with its card and metrics, the report, and the upload if one is asked for."""
    extra = {
        "README.md": model_card(record, provenance),
        "config.yaml": (record.folder / "config.yaml").read_text(encoding="utf-8"),
        "metrics.json": json.dumps(record.metrics, indent=2) + "\n",
    }
    export_student(student, parts.tokenizer, quantizer, record.student_dir, extra)
    write_report(record)
    if parts.config.push_to_hub:
        _push(record.student_dir, parts.config.push_to_hub)


def _provenance(parts: Assembly) -> dict[str, Any]:
    """What the run ran on and with: versions, commit, machine, data."""
    reports = {name: report.__dict__ for name, report in parts.data.report.items()}
    speed = {**parts.speed.described(optimizer(parts.config)), "notes": list(parts.speed.notes)}
    return {"versions": versions(), "commit": commit(), "machine": machine(), "speed": speed, "data": reports}


def _introduce(parts: Assembly, say: Say) -> None:
    """What this run is, in a few lines."""
    config = parts.config
    if config.teacher.model == "demo":
        say("Teacher: the demo teacher that comes with Distily (no --teacher was named).")
    if config.data.dataset == "demo":
        say("Data: the demo text that comes with Distily (no --dataset was named).")
    rows = {"teacher": parts.teacher.get_output_embeddings().weight.shape[0]}
    if rows["teacher"] != parts.vocabulary:
        say(f"Vocabulary: {rows['teacher']} rows of the head cut to the tokenizer's {parts.vocabulary} tokens.")
    for name, report in parts.data.report.items():
        say(f"Data, {name}: {report}.")
    for line in parts.speed.lines(optimizer(config)):
        say(line)


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Distilled with Distily")
