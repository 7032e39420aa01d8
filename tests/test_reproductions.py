"""The published losses of ``docs/reproductions.md`` are what the installed components accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from distily.config import resolve

PAGE = (Path(__file__).parent.parent / "docs" / "reproductions.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)]
COMBINERS = re.findall(r"--combiner (\w+)", PAGE)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0])
def test_every_loss_is_accepted(block):
    tiny.plugins().check(resolve({"objectives": block, "output_dir": "never"}))


@pytest.mark.parametrize("combiner", COMBINERS)
def test_every_combiner_is_accepted(combiner):
    tiny.plugins().check(resolve({"objectives": ["forward_kl", "cosine"], "combiner": combiner, "output_dir": "never"}))


def test_there_are_some():
    assert len(BLOCKS) >= 10
    assert COMBINERS
