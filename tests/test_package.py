"""The wheel: what it holds, and that it works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without isolation and unpacked."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_core_plugins_demo_recipes_types_and_commit(wheel):
    for name in ("distily/run.py", "distily_divergences.py", "distily/demo/demo.yaml", "distily/demo/teacher/model.safetensors",
                 "distily/demo/text/train.jsonl.gz", "distily/recipes/gpt2.yaml", "distily/py.typed"):  # fmt: skip
        assert (wheel / name).is_file(), name
    if (ROOT / ".git").exists():
        assert len((wheel / "distily" / "COMMIT").read_text().strip()) == 40
    assert not (wheel / "tests").exists()


def run(wheel: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    return subprocess.run(
        [sys.executable, "-m", "distily", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=250
    )


def test_the_demo_pair_trains_from_the_wheel(wheel, tmp_path):
    result = run(wheel, "train", "--train", "max_steps=1", "--set", "data.samples=8", "--set", "data.eval_samples=2",
                 "--output-dir", "out", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_recipes_are_valid_configurations():
    from distily.arguments import check_train
    from distily.config import read_file, resolve
    from distily.plugins import load

    recipes = [*(ROOT / "recipes").glob("*.yaml"), ROOT / "distily" / "demo" / "demo.yaml"]
    assert len(recipes) >= 2
    for recipe in recipes:
        config = resolve({**read_file(recipe), "output_dir": "x"})
        load().check(config)
        check_train(config.train)
