"""A complete plugin package of another author, of under 30 lines: built, installed, listed, checked and trained with."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent / "plugin_example"


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DISTILY_PLUGINS")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment | offline, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_it_has_under_30_lines() -> None:
    sources = [path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".toml")]
    assert sum(len(path.read_text().splitlines()) for path in sources) < 30


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of a fresh environment in which the example is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    run(sys.executable, "-m", "venv", "--system-site-packages", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    # The system is the interpreter below ours: where ours is an environment too, its packages have to be named.
    # addsitedir, and not its path alone, for the .pth files in there, by which editable installs are found.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (Path(purelib) / "tests.pth").write_text("\n".join(lines) + "\n")
    shutil.copytree(EXAMPLE, folder / "source")
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *flags, folder / "source", cwd=folder)
    return python


def test_it_is_listed(python: Path, tmp_path: Path) -> None:
    listed = json.loads(run(python, "-m", "distily", "plugins", "list", "--json", cwd=tmp_path))
    assert {
        "name": "hellinger",
        "module": "distily_hellinger",
        "distribution": "distily-hellinger",
        "version": "0.1.0",
        "components": {"objectives": ["hellinger"]},
        "error": None,
    } in listed


def test_it_passes_the_kit(python: Path, tmp_path: Path) -> None:
    checked = run(python, "-m", "distily", "plugins", "check", "hellinger", cwd=tmp_path)
    assert checked == "objective hellinger: 13 checks passed\n"


def test_it_trains(python: Path, tmp_path: Path) -> None:
    words = ("--objective", "hellinger:temperature=2", "--train", "max_steps=2", "--output-dir", "run")
    small = ("data.samples=32", "data.eval_samples=4", "data.max_length=64", "train.logging_steps=1")
    run(python, "-m", "distily", "train", *words, *(f"--set={setting}" for setting in small), cwd=tmp_path)
    assert (tmp_path / "run" / "student" / "config.json").is_file()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [entry["term_hellinger"] for entry in metrics if "term_hellinger" in entry]
    assert values
    assert all(0 < value <= 2 for value in values)  # a distance in [0, 1], times T
