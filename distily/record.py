"""The run folder and what a run came to. Every file in it is written whole or not at all.

``record.json`` also remembers which phases are done, so that a resumed run repeats none of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from distily.config import RunConfig, read_file
from distily.errors import DistilyError
from distily.files import write_json, write_text
from distily.loggers import Logger

Metrics = dict[str, float]


@dataclass
class RunRecord:
    """The outcome: what was asked, what was built and what was measured."""

    output_dir: str
    config: dict[str, Any] = field(default_factory=dict)
    teacher_parameters: int = 0
    student_parameters: int = 0
    steps: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    metrics: dict[str, Metrics] = field(default_factory=dict)
    """Metrics by model: teacher, untrained, student, control."""
    control: list[dict[str, Any]] = field(default_factory=list)
    """Every control that was trained: learning_rate and metrics."""
    done: list[str] = field(default_factory=list)
    """Phases that need not run again."""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def student_dir(self) -> Path:
        return self.folder / "student"

    def save(self) -> None:
        """Writes ``record.json``, on the main process."""
        if is_main_process():
            write_json(self.folder / "record.json", asdict(self))

    def phase(self, name: str, work: Callable[[], Metrics]) -> Metrics:
        """The metrics of a phase: from the record if it was done before, otherwise worked out and saved."""
        if name not in self.done:
            self.metrics[name] = work()
            self.done.append(name)
            self.save()
        return self.metrics[name]

    @property
    def gain(self) -> float | None:
        """Held-out nats a token that distilling gained over labels alone; None without a control or perplexity."""
        return self._difference("control", "student")

    @property
    def gap_to_teacher(self) -> float | None:
        """Held-out nats a token by which the student is behind the teacher."""
        return self._difference("student", "teacher")

    def _difference(self, first: str, second: str) -> float | None:
        values = [self.metrics.get(name, {}).get("perplexity_nats") for name in (first, second)]
        return None if values[0] is None or values[1] is None else values[0] - values[1]


def open_folder(config: RunConfig, resume: bool) -> RunRecord:
    """A new run folder with its configuration, or the one to resume.

    ``check_folder`` comes first, before models are loaded.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if resume and (folder / "record.json").is_file():
        record = RunRecord(**json.loads((folder / "record.json").read_text(encoding="utf-8")))
        record.output_dir = str(folder)
        return record
    if is_main_process():
        write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    record = RunRecord(str(folder), config.to_dict())
    record.save()
    return record


def is_main_process() -> bool:
    """Whether this process writes: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0


def check_folder(config: RunConfig, resume: bool) -> None:
    """Whether the run may write where it wants to. Raises ``DistilyError``; writes nothing."""
    folder = Path(config.output_dir)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise DistilyError(f"output_dir: {config.output_dir!r} cannot be made, {str(place)!r} is a file; allowed: a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise DistilyError(f"output_dir: {config.output_dir!r} is not empty; allowed: a new folder, or --resume.")
    made = folder / "config.yaml"
    if not made.is_file():
        left = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".partial")]
        if left:
            raise DistilyError(f"output_dir: {config.output_dir!r} holds no config.yaml to resume; allowed: the folder of a run.")
        return
    before, now = read_file(made), config.to_dict()
    changed = sorted(_changed(before, {**now, "output_dir": before.get("output_dir")}))
    if changed:
        raise DistilyError(f"--resume: the run was started with another {', '.join(changed)}; allowed: the same configuration.")


def _changed(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in _changed(before.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if before == now else [prefix.rstrip(".")]


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to ``metrics.jsonl`` and hands it to the loggers."""

    def __init__(self, path: Path, loggers: list[Logger], config: Mapping[str, Any]) -> None:
        self.path, self.loggers, self.config = path, loggers, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step and state.global_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        for logger in self.loggers:
            logger.start(self.config, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps are logged too, whatever logging_steps is

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, default=float) + "\n")
        for logger in self.loggers:
            logger.log(logs, state.global_step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
