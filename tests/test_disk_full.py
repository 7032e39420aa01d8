"""A disk that fills up in mid-run: exit code 1, one line, sealed checkpoints whole, and a run that goes on to the same weights.

Each write under the run's folder fails once. ``DISTILY_ALL_WRITES=1`` takes every write, otherwise a spread of them.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedTokenizerBase

from distily.checkpoints import MANIFEST, folders, is_whole, step_of
from distily.cli import main

SPREAD = 12
RESUMED = 4
"""Every fourth of the runs that failed is gone on with."""
FULL = "No space left on device"


class Disk:
    """Counts the writes under ``folder``; the one of number ``full_at`` leaves half a file and fails as the writer would."""

    def __init__(self, folder: Path, full_at: int | None = None) -> None:
        self.folder, self.full_at = str(folder), full_at
        self.events: list[str] = []
        self.inside = False

    def write(self, kind: str, target: Any, error: type[Exception] = OSError) -> None:
        path = os.fspath(target) if isinstance(target, (str, os.PathLike)) else ""
        if self.inside or not path.startswith(self.folder):
            return
        self.events.append(f"{kind} {path.removeprefix(self.folder).lstrip('/')}")
        if len(self.events) != self.full_at:
            return
        if kind == "write":
            self.inside = True
            Path(path).write_bytes(b"half a fi")
            self.inside = False
        raise OSError(errno.ENOSPC, FULL, path) if error is OSError else error(f"{FULL} (os error 28)")

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            self._patch(patch)
            yield self

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        opened, replace, fsync, mkdir = io.open, os.replace, os.fsync, os.mkdir
        save, serialize, tokenizer = torch.save, safetensors.torch.serialize_file, PreTrainedTokenizerBase.save_pretrained

        def open_file(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if set(mode) & set("wax+"):
                self.write("write", file)
            return opened(file, mode, *rest, **named)

        def rename(source: Any, target: Any, **named: Any) -> None:
            self.write("replace", target)
            replace(source, target, **named)

        def flush(descriptor: int) -> None:
            self.write("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        def make(path: Any, *rest: Any, **named: Any) -> None:
            if not os.path.lexists(path):  # otherwise it takes no room
                self.write("mkdir", path)
            mkdir(path, *rest, **named)

        def save_torch(value: Any, file: Any, *rest: Any, **named: Any) -> None:
            self.write("write", file, RuntimeError)
            save(value, file, *rest, **named)

        def save_tensors(tensors: Any, file: Any, *rest: Any, **named: Any) -> None:
            self.write("write", file, safetensors.SafetensorError)
            serialize(tensors, file, *rest, **named)

        def save_tokenizer(this: Any, folder: Any, *rest: Any, **named: Any) -> Any:
            self.write("write", f"{folder}/tokenizer.json", RuntimeError)
            return tokenizer(this, folder, *rest, **named)

        for owner, name, function in (
            (builtins, "open", open_file), (io, "open", open_file), (os, "replace", rename), (os, "fsync", flush),
            (os, "mkdir", make), (torch, "save", save_torch), (safetensors.torch, "serialize_file", save_tensors),
            (PreTrainedTokenizerBase, "save_pretrained", save_tokenizer),
        ):  # fmt: skip
            patch.setattr(owner, name, function)


class Runs:
    """Runs of four steps with a checkpoint every second one."""

    def __init__(self, root: Path, teacher: Path, text: Path) -> None:
        self.root = root
        settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 4}
        self.words = ["train", "--teacher", str(teacher), "--dataset", str(text), "--set", "data.eval_samples=2"]
        self.words += [word for key, value in settings.items() for word in ("--train", f"{key}={value}")]

    def arguments(self, folder: Path, *more: str) -> list[str]:
        return [*self.words, "--output-dir", str(folder), *more]

    def run(self, folder: Path, *more: str) -> Result:
        return CliRunner().invoke(main, self.arguments(folder, *more))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("full"), tiny_llama, tiny_text)


@pytest.fixture(scope="module")
def clean(runs: Runs) -> tuple[list[str], bytes]:
    """The writes of a run that nothing stops, and the weights that it exports."""
    with Disk(runs.root / "clean").watched() as disk:
        result = runs.run(runs.root / "clean")
    assert result.exit_code == 0, result.stderr
    return disk.events, (runs.root / "clean" / "student" / "model.safetensors").read_bytes()


def places(count: int) -> list[int]:
    """Numbers of writes, 1 to ``count``: all of them, or a spread that keeps the first and the last."""
    if os.environ.get("DISTILY_ALL_WRITES"):
        return list(range(1, count + 1))
    return sorted({1 + round(step * (count - 1) / (SPREAD - 1)) for step in range(SPREAD)})


def check_line(result: Result) -> None:
    """Exit code 1 and one line that names the log with the traceback."""
    assert result.exit_code == 1, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("distily: "))
    assert FULL in line
    log = re.search(r"traceback: (.+\.log)\)", line)
    assert log, line
    assert "Traceback" in Path(log[1]).read_text()
    Path(log[1]).unlink()


def test_every_part_of_a_run_is_watched(clean: tuple[list[str], bytes]) -> None:
    events = clean[0]
    for written in (
        "mkdir ", "replace config.yaml", "replace provenance.json", "replace record.json", "write metrics.jsonl",
        "write checkpoint-2/model.safetensors", "write checkpoint-2/optimizer.pt", "write checkpoint-2/trainer_state.json",
        "write checkpoint-2/tokenizer.json", "fsync checkpoint-2/model.safetensors", "replace checkpoint-2/manifest.json",
        "write student.partial/model.safetensors", "replace student", "write report.partial/comparison.png", "replace report",
    ):  # fmt: skip
        assert written in events, written


def test_disk_full_at_a_write(runs: Runs, clean: tuple[list[str], bytes]) -> None:
    events, weights = clean
    for turn, place in enumerate(places(len(events))):
        folder = runs.root / f"full-{place}"
        with Disk(folder, place).watched() as disk:
            result = runs.run(folder)
        told = f"write {place} of {len(events)}, {events[place - 1]}"
        assert disk.events[:place] == events[:place], told
        print(told, result.stderr, sep="\n")
        check_line(result)
        sealed = [event for event in events[: place - 1] if event.startswith("replace checkpoint-") and event.endswith(MANIFEST)]
        whole = [entry for entry in folders(folder) if is_whole(entry)]
        assert len(whole) == len(sealed), told
        assert all(is_whole(entry) or not (entry / MANIFEST).exists() for entry in folders(folder)), told
        if sealed:
            assert step_of(whole[-1]) == 2 * len(sealed), told
        if turn % RESUMED:
            shutil.rmtree(folder)
            continue
        again = runs.run(folder, "--resume")
        assert again.exit_code == 0, f"{told}: {again.stderr}"
        assert (folder / "student" / "model.safetensors").read_bytes() == weights, told
        assert not list(folder.rglob("*.partial")), told
        shutil.rmtree(folder)


REAL = """
    # in a mount namespace of its own: a small disk, filled up once the first checkpoint is sealed
    import json, pathlib, subprocess, sys, time

    disk, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (disk / "run" / "checkpoint-2" / "manifest.json").exists():
        time.sleep(0.002)
    with (disk / "filler").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
    _, stderr = run.communicate()
    (disk / "filler").unlink()
    again = subprocess.run([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    print(json.dumps([run.returncode, stderr, again.returncode, again.stderr]))
"""


@pytest.mark.slow
def test_a_real_full_disk(runs: Runs, tmp_path: Path) -> None:
    """The same on a small tmpfs that really fills up, where the system allows a user namespace."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this system allows no mount in a user namespace")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(REAL))
    command = [sys.executable, "-m", "distily", *runs.arguments(disk / "run", "--train", "max_steps=30")]
    command = [*inside, sys.executable, str(script), str(disk), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    code, stderr, again, stderr_again = json.loads(done.stdout)
    lines = [line for line in stderr.splitlines() if line.startswith("distily: ")]
    assert code == 1, stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    assert again == 0, stderr_again
