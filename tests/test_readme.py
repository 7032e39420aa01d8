"""What the README says is run as it stands: its shell commands, its Python, its plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ distily")
]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder in which the commands follow each other, as a reader would type them."""
    return tmp_path_factory.mktemp("readme")


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_as_typed(command, place):
    result = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, env=environment(), timeout=250)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()


def test_there_are_commands_and_the_promised_ones_are_among_them():
    assert len(COMMANDS) >= 5
    assert any(command.startswith("distily train --objective sinkhorn") for command in COMMANDS)
    assert "$ make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_python_example_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) > 1


def test_the_plugin_example_is_a_sound_objective():
    from distily.testing import check_objective

    scope: dict = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), scope)
    assert check_objective(scope["distily_objectives"]()["hellinger"])


def test_the_plugin_is_short():
    assert len(BLOCKS[1].splitlines()) < 30
