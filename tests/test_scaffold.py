"""``distily plugins new`` writes a package that works, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from distily.cli import main
from distily.errors import DistilyError
from distily.plugins import load
from distily.scaffold import write_plugin
from distily.testing import check_package


def test_the_package_is_complete_and_passes_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_plugin("my_loss", tmp_path)
    assert folder == tmp_path / "distily-my-loss"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {"pyproject.toml", "distily_my_loss.py", "tests/test_my_loss.py", "README.md"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    entry_points = project["project"]["entry-points"]["distily"]
    assert entry_points == {"my_loss": "distily_my_loss"}
    assert list(tmp_path.iterdir()) == [folder]

    monkeypatch.syspath_prepend(str(folder))
    plugins = load([EntryPoint(name, value, "distily") for name, value in entry_points.items()])
    assert list(check_package(plugins, "my_loss")) == ["objective my_loss: 13 checks passed"]


def test_its_own_test_passes(tmp_path: Path) -> None:
    folder = write_plugin("loss2", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


BAD_NAMES = ["My_Loss", "my-loss", "2loss", "", "_loss", "loss_", "a__b", "../up", "lambda", "match", "größe"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(DistilyError, match=r"plugin name: .* is not allowed; allowed: lower-case letters") as caught:
        write_plugin(name, tmp_path)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["jsd", "kl", "divergences"])
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(DistilyError, match=f"plugin name: '{name}' is not allowed; allowed: a name that is not taken"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "distily-loss").mkdir()
    with pytest.raises(DistilyError, match="distily-loss' exists already"):
        write_plugin("loss", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["distily-loss"]
    with pytest.raises(DistilyError, match=r"'.*nowhere' is no folder"):
        write_plugin("loss", tmp_path / "nowhere")


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk full"):
        write_plugin("loss", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plugins", "new", "loss", "--directory", str(tmp_path)])
    assert done.exit_code == 0
    assert "distily plugins check loss" in done.output
    assert CliRunner().invoke(main, ["plugins", "new", "loss", "--directory", str(tmp_path)]).exit_code == 2
