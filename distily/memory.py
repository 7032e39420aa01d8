"""Memory of this process or its GPU, in bytes, with peaks that can be started anew."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_graphs = {"kept": 0, "peak before": 0}
"""Bytes that CUDA graphs keep, and the peak before they kept that many."""


def reset_peak() -> None:
    """Starts a new peak."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _graphs["peak before"] = 0
    else:
        with contextlib.suppress(OSError):  # without /proc, or where it is forbidden, the peak is the process's own
            CLEAR.write_text("5")


def read() -> dict[str, int]:
    """``{"memory_now": bytes, "memory_peak": bytes}``: of the GPU where there is one, otherwise of the process."""
    import torch

    if torch.cuda.is_available():
        kept, before = _graphs["kept"], _graphs["peak before"]
        peak = max(before, torch.cuda.max_memory_allocated() + kept)
        return {"memory_now": torch.cuda.memory_allocated() + kept, "memory_peak": peak}
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return {
            "memory_now": int(lines["VmRSS"].split()[0]) * 1024,
            "memory_peak": int(lines["VmHWM"].split()[0]) * 1024,
        }
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"memory_now": peak, "memory_peak": peak}


def free(device: torch.device | None = None) -> int:
    """Bytes that PyTorch can still give on a GPU: what nobody has, and what it holds in reserve, without what CUDA graphs keep."""
    import torch

    stats = torch.cuda.memory_stats_as_nested_dict(device)  # memory_reserved flattens all of it, at each call
    held, given = (stats[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
    return int(torch.cuda.mem_get_info(device)[0] + held - given - _graphs["kept"])


def count_graphs(kept: int) -> None:
    """``read`` counts from now on what CUDA graphs keep for what they compute in between: PyTorch does not count that as allocated."""
    import torch

    before = read()["memory_peak"]
    torch.cuda.reset_peak_memory_stats()
    _graphs.update({"kept": kept, "peak before": before})


def kept_by_graphs() -> int:
    """Bytes of the GPU that all CUDA graphs keep and no tensor has. Takes a while."""
    import torch

    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
    return int(sum(segment["total_size"] - segment["allocated_size"] for segment in segments))
