"""Checkpoints: what counts as whole, what is removed, in which order, and what a signal does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from distily import checkpoints
from distily.checkpoints import (
    MANIFEST,
    SealCheckpoints,
    SkipTrained,
    StopOnSignal,
    TrainedAlready,
    folders,
    is_whole,
    newest_whole,
    seal,
    step_of,
)
from distily.errors import DistilyError
from distily.files import whole_folder, write_text


def checkpoint(run: Path, step: int, sealed: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "shards" / "one.bin").write_bytes(b"s" * 7)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        seal(folder)
    return folder


def names(run: Path) -> list[str]:
    return [folder.name for folder in folders(run)]


def test_a_manifest_names_every_file_with_its_size(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3, sealed=False)
    assert not is_whole(folder)
    seal(folder)
    assert is_whole(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == {
        "model.safetensors": 100,
        "shards/one.bin": 7,
        "trainer_state.json": (folder / "trainer_state.json").stat().st_size,
    }
    seal(folder)  # sealing again does not put the manifest into itself
    assert json.loads((folder / MANIFEST).read_text()) == manifest


def remove_file(folder: Path) -> None:
    (folder / "shards" / "one.bin").unlink()


def cut_file(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 99)


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


BREAK = [remove_file, cut_file, remove_manifest, cut_manifest, empty_manifest]


@pytest.mark.parametrize("broken", BREAK)
def test_broken_checkpoints_are_removed_and_not_resumed_from(broken: Callable[[Path], None], tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        checkpoint(tmp_path, step)
    for step in (3, 9, 12):
        broken(tmp_path / f"checkpoint-{step}")
        assert not is_whole(tmp_path / f"checkpoint-{step}")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-6"
    assert names(tmp_path) == ["checkpoint-6"]
    assert is_whole(tmp_path / "checkpoint-6")


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    checkpoint(tmp_path, 3, sealed=False)
    assert newest_whole(tmp_path) is None
    assert names(tmp_path) == []


def test_checkpoints_are_ordered_by_step_and_nothing_else_is_touched(tmp_path: Path) -> None:
    for step in (1000, 20, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-1000"]
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1000"
    assert (tmp_path / "checkpoint-best").is_dir()
    assert (tmp_path / "checkpoint-7").is_file()
    assert step_of(tmp_path / "checkpoint-best") == -1


def save(callback: SealCheckpoints, run: Path, step: int, main: bool = True) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=main)
    callback.on_save(SimpleNamespace(output_dir=str(run)), state, TrainerControl())


def test_old_checkpoints_go_after_the_new_one_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[list[str]] = []

    def watched(folder: Path) -> None:
        there.append(names(tmp_path))
        seal(folder)

    monkeypatch.setattr(checkpoints, "seal", watched)
    callback = SealCheckpoints(keep=2)
    for step in (3, 6, 9, 12):
        checkpoint(tmp_path, step, sealed=False)
        save(callback, tmp_path, step)
        assert is_whole(tmp_path / f"checkpoint-{step}")
    assert there[-1] == ["checkpoint-6", "checkpoint-9", "checkpoint-12"]
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-12"]


def test_a_disk_that_is_full_while_sealing_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6, sealed=False)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distily.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(SealCheckpoints(keep=1), tmp_path, 6)
    monkeypatch.undo()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"


def test_only_the_main_process_seals(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3, sealed=False)
    save(SealCheckpoints(keep=1), tmp_path, 3, main=False)
    assert not is_whole(folder)


def test_a_checkpoint_that_was_not_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(DistilyError, match=r"checkpoint-3.* was not written"):
        save(SealCheckpoints(keep=1), tmp_path, 3)


@pytest.mark.parametrize(("step", "last", "trained"), [(0, 12, False), (11, 12, False), (12, 12, True), (14, 12, True)])
def test_a_training_that_is_complete_is_not_gone_on_with(step: int, last: int, trained: bool) -> None:
    state = SimpleNamespace(global_step=step, max_steps=last)
    if trained:
        with pytest.raises(TrainedAlready):
            SkipTrained().on_train_begin(None, state, None)
    else:
        SkipTrained().on_train_begin(None, state, None)


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_checkpoint_and_the_second_stops(number: int) -> None:
    before = signal.getsignal(number)
    stop, control = StopOnSignal(), TrainerControl()
    with stop:
        stop.on_step_end(None, None, control)
        assert not control.should_save
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        assert stop.stopped
        stop.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopOnSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------ files


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_text(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distily.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "student"
    (tmp_path / "student.partial").mkdir()
    (tmp_path / "student.partial" / "junk").write_text("of a kill")
    with whole_folder(path) as partial:
        (partial / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_folder(path) as partial:
        (partial / "a").write_text(f"{1 / 0}")
    assert {entry.name: entry.read_text() for entry in path.iterdir()} == {"a": "1"}
    with whole_folder(path) as partial:
        (partial / "b").write_text("3")
    assert {entry.name: entry.read_text() for entry in path.iterdir()} == {"b": "3"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]
