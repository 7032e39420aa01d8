"""``distily plugins new``: a small plugin package that works and tests itself, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from pathlib import Path

from distily.errors import DistilyError, wrong
from distily.plugins import load

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
ALLOWED = "lower-case letters, digits and single underscores, a letter first, no Python keyword, such as my_loss"

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "distily-{dashed}"
version = "0.1.0"
description = "An objective for Distily."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["distily"]

[project.entry-points.distily]
{name} = "distily_{name}"

[tool.pytest.ini_options]
pythonpath = ["."]
"""

MODULE = '''\
"""Objective ``{name}``: total variation distance. Change it into your own.

Letters: N supervised tokens, V vocabulary.
"""

from torch import Tensor

from distily import hookimpl
from distily.objectives import token_objective


@token_objective(
    temperature_scale="t",  # of first order in the difference: its gradient falls as 1/T
    formula="1/2 sum_v |t_v - s_v|",
    source="Wen et al. 2023, arXiv:2307.15190",
)
def {name}(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation distance: half the L1 distance between the next-token distributions.

    Shapes: ``(N, V), (N, V) -> (N,)``, one value for each row and no reduction over rows. Range [0, 1]; zero where the
    distributions are equal. Options are keyword-only parameters with a type and a default, after a bare ``*``.
    """
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {{"{name}": {name}}}
'''

TEST = '''\
import torch
from distily_{name} import {name}

from distily.testing import check_objective


def reference(student, teacher):
    """1 - sum_v min(s_v, t_v): the same distance by another formula."""
    s, t = (torch.exp(rows) / torch.exp(rows).sum(1, keepdim=True) for rows in (student, teacher))
    return 1 - torch.minimum(s, t).sum(1)


def test_contract():
    check_objective({name}, reference=reference)
'''

README = """\
# distily-{dashed}

The objective `{name}` for [Distily](https://pypi.org/project/distily/).

    pip install -e .
    distily plugins check {name}
    pytest
    distily train --objective {name}:temperature=2
"""


def write_plugin(name: str, directory: Path) -> Path:
    """Writes the package ``distily-<name>`` with one objective into a new folder of ``directory``, whole or not at all.

    Raises ``DistilyError`` for a name that cannot be one or is taken, and for a folder that exists.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise DistilyError(wrong("plugin name", name, ALLOWED))
    _check_free(name)
    directory = Path(directory)
    if not directory.is_dir():
        raise DistilyError(f"--directory: {str(directory)!r} is no folder; allowed: a folder that exists.")
    dashed = name.replace("_", "-")
    folder = directory / f"distily-{dashed}"
    if folder.exists():
        raise DistilyError(f"{str(folder)!r} exists already; allowed: another name or --directory.")
    files = {
        "pyproject.toml": PYPROJECT,
        f"distily_{name}.py": MODULE,
        f"tests/test_{name}.py": TEST,
        "README.md": README,
    }
    draft = Path(tempfile.mkdtemp(prefix=".distily-", dir=directory))
    try:
        for path, text in files.items():
            (draft / path).parent.mkdir(exist_ok=True)
            (draft / path).write_text(text.format(name=name, dashed=dashed), encoding="utf-8")
        draft.chmod(0o755)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _check_free(name: str) -> None:
    """The plugin and its objective have the same name, which nothing installed may have."""
    plugins = load()
    objectives = [entry for entries in plugins.offered("objectives").values() for entry in entries]
    taken = {package.name for package in plugins.packages} | {entry.name for entry in objectives}
    taken |= {alias for entry in objectives for alias in entry.aliases}
    if name in taken:
        raise DistilyError(wrong("plugin name", name, f"a name that is not taken; these are: {', '.join(sorted(taken))}"))
