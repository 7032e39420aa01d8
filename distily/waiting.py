"""Whether the device waits for the host: how long a micro-batch takes, and how long the device works on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

PLAIN, AHEAD = 9, 3
"""Micro-batches that are timed as they come; and then those before which the device is kept busy."""
LEAD, LONGEST = 2.0, 0.25
"""For how long it is kept busy, in times that the host needs, since batches differ; and in seconds at most."""
CYCLES = 2e9
"""About as many as a GPU has in a second."""


class Watch:
    """Times micro-batches without waiting for the device, by events on it.

    What the device's own work takes is seen where the device is kept busy first, for as long as the host needs for a micro-batch. The host
    is ahead then, by as much as a stream holds, and the device does not wait for it. Compared are micro-batches of the commonest size, and
    of each kind the lower quarter: others are behind a log, hold the optimizer's step, or have something compiled.
    """

    def __init__(self) -> None:
        self._timed: list[tuple[Any, Any, int, float]] = []
        """Begin, end, size, and the host's seconds: first the plain ones, then those ahead."""
        self._begun: tuple[Any, float, int] | None = None

    def begins(self, size: int) -> None:
        """A micro-batch with so many numbers begins, right behind the one before."""
        if len(self._timed) == PLAIN + AHEAD:
            return
        now, here = time.perf_counter(), _event()
        if self._begun is not None:
            start, since, before = self._begun
            self._timed.append((start, here, before, now - since))
            self._begun = None
        if len(self._timed) < PLAIN:
            self._begun = here, now, size
        elif len(self._timed) < PLAIN + AHEAD and size == self._commonest():
            needed = statistics.median(host for *_, host in self._timed[:PLAIN])
            torch.cuda._sleep(int(CYCLES * min(LONGEST, LEAD * needed)))
            self._begun = _event(), now, size

    def interrupted(self) -> None:
        """Something else came in between."""
        self._begun = None

    def found(self) -> tuple[float, float] | None:
        """Milliseconds that a micro-batch takes, and that the device works on it; None: not known yet."""
        if len(self._timed) < PLAIN + AHEAD or not self._timed[-1][1].query():
            return None
        return self._lower_quarter(self._timed[:PLAIN]), self._lower_quarter(self._timed[PLAIN:])

    def _commonest(self) -> int:
        return statistics.mode(size for _, _, size, _ in self._timed[:PLAIN])

    def _lower_quarter(self, timed: Sequence[tuple[Any, Any, int, float]]) -> float:
        commonest = self._commonest()
        took = sorted(start.elapsed_time(end) for start, end, size, _ in timed if size == commonest)
        return took[len(took) // 4]


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
