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
        self._plain: list[tuple[Any, Any, int]] = []
        self._ahead: list[tuple[Any, Any]] = []
        self._host: list[float] = []
        self._begun: tuple[Any, float, int] | None = None
        self._size = 0

    def begins(self, size: int) -> None:
        """A micro-batch with so many numbers begins, right behind the one before."""
        if len(self._ahead) == AHEAD:
            return
        now, here = time.perf_counter(), _event()
        begun, self._begun = self._begun, None
        if begun is not None and len(self._plain) < PLAIN:
            self._plain.append((begun[0], here, begun[2]))
            self._host.append(now - begun[1])
            self._size = statistics.mode(each for _, _, each in self._plain)
        elif begun is not None:
            self._ahead.append((begun[0], here))
        if len(self._plain) < PLAIN:
            self._begun = here, now, size
        elif size == self._size and len(self._ahead) < AHEAD:
            torch.cuda._sleep(int(CYCLES * min(LONGEST, LEAD * statistics.median(self._host))))
            self._begun = _event(), now, size

    def interrupted(self) -> None:
        """Something else came in between."""
        self._begun = None

    def found(self) -> tuple[float, float] | None:
        """Milliseconds that a micro-batch takes, and that the device works on it; None: not known yet."""
        if len(self._ahead) < AHEAD or not self._ahead[-1][1].query():
            return None
        return _lower_quarter([(start, end) for start, end, size in self._plain if size == self._size]), _lower_quarter(
            self._ahead
        )


def _lower_quarter(timed: Sequence[tuple[Any, Any]]) -> float:
    return sorted(start.elapsed_time(end) for start, end in timed)[len(timed) // 4]


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
