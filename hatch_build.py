"""Build hook: wheel and sdist carry the commit that they were built from, so that every run can name it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """Adds ``distily/COMMIT`` in a git checkout; an sdist has it already, and an editable install asks git itself."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or (Path(self.root) / "distily" / "COMMIT").is_file():
            return
        command = ["git", "-C", self.root, "rev-parse", "HEAD"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return
        target = Path(tempfile.mkdtemp()) / "COMMIT"
        target.write_text(f"{commit}\n", encoding="utf-8")
        build_data["force_include"][str(target)] = "distily/COMMIT"
