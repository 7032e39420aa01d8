"""A killed run, resumed by the same command, ends with the uninterrupted run's weights, bit for bit.

Runs a short part of ``benchmarks/kill_test.py``: a kill within a checkpoint, one within the control, and an interrupt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_test.py"
PLACES = {
    "checkpoint: no trainer_state.json yet": "student step 3",  # the newest folder is half-written: an older one is taken
    "control: between two steps": "control step 6",  # the student is trained: it gets no step more
    "training: SIGINT": "student step 8",  # exit code 130, with a checkpoint of that step
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the script prints: the uninterrupted run, a line for each place, the verdict."""
    if not hasattr(os, "fork"):
        pytest.skip("it forks")
    places = [word for place in PLACES for word in ("--only", place)]
    folder = tmp_path_factory.mktemp("kill") / "runs"
    command = [sys.executable, str(SCRIPT), "--random", "0", "--lives", "0", "--folder", str(folder), *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_run_ends_as_the_uninterrupted_one(lines: list[str], place: str) -> None:
    (line,) = [line for line in lines if line.startswith(place)]
    assert f"resumed from {PLACES[place]} " in line
    assert line.endswith("  equal"), "\n".join(lines)
