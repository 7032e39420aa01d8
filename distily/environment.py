"""What a run ran on: versions, machine and the commit of this package. For provenance.json and for bug reports."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import distily

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pluggy",
    "POT", "lm-eval", "peft", "triton", "liger-kernel", "torchao", "bitsandbytes",
)  # fmt: skip


def commit() -> str | None:
    """The commit of this package: embedded in its wheel, recorded by pip, or asked of the checkout; None where nobody knows."""
    embedded = Path(__file__).with_name("COMMIT")
    if embedded.is_file():
        return embedded.read_text(encoding="utf-8").strip()
    try:
        recorded = json.loads(distribution("distily").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        recorded = {}
    if "commit_id" in recorded.get("vcs_info", {}):
        return str(recorded["vcs_info"]["commit_id"])
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {"distily": distily.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, memory and GPUs."""
    import torch

    described: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    with contextlib.suppress(ValueError, OSError):
        described["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        described["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        described["cuda"] = torch.version.cuda
        described["cudnn"] = torch.backends.cudnn.version()
    return described
