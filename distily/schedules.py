"""Schedules of a term's weight over the share of training done, 0 to 1. ``cosine(start=1,end=0,until=0.2)`` on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from distily.schema import Between, Option, options
from distily.spec import Component

Share = Annotated[float, Between(0, 1)]
Finite = Annotated[float, Between(excluding=(-math.inf, math.inf))]


class Schedule(Protocol):
    """A weight that moves."""

    def at(self, progress: float) -> float:
        """The weight when this share of the training is done."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same weight throughout."""

    value: Finite = 1.0

    def at(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``start`` before ``begin``, ``end`` after ``until``, a straight line between."""

    start: Finite
    end: Finite
    begin: Share = 0.0
    until: Share = 1.0

    def shape(self, share: float) -> float:
        return share

    def at(self, progress: float) -> float:
        length = self.until - self.begin
        share = (progress - self.begin) / length if length > 0 else float(progress >= self.until)
        return self.start + (self.end - self.start) * self.shape(min(1.0, max(0.0, share)))


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """``start`` before ``begin``, ``end`` after ``until``, half a cosine between: slow at both ends."""

    def shape(self, share: float) -> float:
        return (1.0 - math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """``start``, and from ``at_progress`` on ``end``: such as hints that stop after the first 5 % of training."""

    start: Finite
    end: Finite
    at_progress: Share

    def at(self, progress: float) -> float:
        return self.end if progress >= self.at_progress else self.start


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Rises from 0 to ``peak`` during the share ``warmup``, stays, and falls to ``end`` during the last share ``decay``."""

    peak: Finite = 1.0
    end: Finite = 0.0
    warmup: Share = 0.1
    decay: Share = 0.2

    def at(self, progress: float) -> float:
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        if progress > 1.0 - self.decay:
            return self.peak + (self.end - self.peak) * (progress - 1.0 + self.decay) / self.decay
        return self.peak


SCHEDULES: dict[str, type] = {"constant": Constant, "linear": Linear, "cosine": Cosine, "step": Step, "wsd": WarmupStableDecay}


def schedule(weight: float | Component) -> Schedule:
    """The schedule that a term's ``weight`` names: a number, or one of ``SCHEDULES`` with its options."""
    if isinstance(weight, Component):
        made: Schedule = SCHEDULES[weight.name](**weight.options)
        return made
    return Constant(value=float(weight))


def schedule_options(name: str) -> dict[str, Option]:
    """The options of a schedule by name."""
    cls: Any = SCHEDULES[name]
    return options(cls)
