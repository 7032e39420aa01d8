"""Checkpoints that are known to be whole: a manifest of files and sizes is written last, and only such a folder is resumed from."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from distily.errors import DistilyError
from distily.files import sync, write_json

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 where there is none."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() else -1


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    found = [entry for entry in run.glob(f"{PREFIX}*") if entry.is_dir() and step_of(entry) >= 0]
    return sorted(found, key=step_of)


def seal(folder: Path) -> None:
    """Puts every file on the disk, then writes the manifest."""
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file() and entry.name != MANIFEST)
    for file in files:
        sync(file)
    write_json(folder / MANIFEST, {str(file.relative_to(folder)): file.stat().st_size for file in files})


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and every file in it has its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in manifest.items()
    )


def newest_whole(run: Path) -> Path | None:
    """The newest whole checkpoint; the others that a kill left behind, half written or half removed, go."""
    newest = None
    for folder in folders(run):
        if is_whole(folder):
            newest = folder
        else:
            shutil.rmtree(folder)
    return newest


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint after it was saved, then removes the oldest ones beyond ``keep``."""

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        run = Path(args.output_dir)
        current = run / f"{PREFIX}{state.global_step}"
        if not current.is_dir():
            raise DistilyError(f"checkpoint {str(current)!r} was not written.")
        seal(current)
        for folder in folders(run)[: -self.keep]:
            shutil.rmtree(folder)


class TrainedAlready(Exception):
    """The checkpoint that a training was resumed from is that of its last step."""


class SkipTrained(TrainerCallback):
    """Raises ``TrainedAlready`` once the weights are loaded; transformers would do one step more."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise TrainedAlready


class StopOnSignal(TrainerCallback):
    """The first interrupt ends the step, writes a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
