"""Whether the device waits for the host: how long a micro-batch takes, and how long the device works on it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

PLAIN, AHEAD = 9, 3
"""Micro-batches that are timed as they come, of which some may be behind a log or something compiled; and then those before which the
device is kept busy.
"""
LEAD, LONGEST = 1.5, 0.25
"""For how long it is kept busy, in times that the host needs, since batches differ; and in seconds at most."""
CYCLES = 2e9
"""A GPU's in a second, or a few more than it has."""


class Watch:
    """Times micro-batches without waiting for the device.

    What the device's own work takes is seen where the device is kept busy first, for as long as the host needs for a micro-batch: the host
    is ahead then, and the device never waits for it. Times are by events on the device and for as many numbers in a batch as is usual.
    """

    def __init__(self) -> None:
        self._timed: list[tuple[Any, Any, int]] = []
        self._host: list[float] = []
        self._begun: tuple[Any, float, int] | None = None

    def begins(self, numbers: int) -> None:
        """A micro-batch with so many ``numbers`` begins, right behind the one before."""
        if len(self._timed) == PLAIN + AHEAD:
            return
        now, here = time.perf_counter(), _event()
        if self._begun is not None:
            start, since, count = self._begun
            self._timed.append((start, here, count))
            self._host.append(now - since)
        if PLAIN <= len(self._timed) < PLAIN + AHEAD:
            torch.cuda._sleep(int(CYCLES * min(LONGEST, LEAD * statistics.median(self._host[:PLAIN]))))
            here = _event()
        self._begun = here, now, numbers

    def interrupted(self) -> None:
        """Something else came in between."""
        self._begun = None

    def found(self) -> tuple[float, float] | None:
        """Milliseconds that a micro-batch takes, and that the device works on it; None: not known yet."""
        if len(self._timed) < PLAIN + AHEAD or not self._timed[-1][1].query():
            return None
        usual = statistics.median(count for _, _, count in self._timed)
        rates = [start.elapsed_time(end) / count for start, end, count in self._timed]
        return usual * statistics.median(rates[:PLAIN]), usual * statistics.median(rates[PLAIN:])


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
