"""What is proved of each catalogue item: a component against independent implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

RowMaker = Callable[[], tuple[Tensor, Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """An objective and functions that share no code with it: ``(student, teacher, **inputs, **options) -> (n,)`` or a set's mean.

    An oracle is given, of the inputs and options, those that it names; ``component`` is the objective that is checked, for what it
    learned or measured. ``floor``: the value where student and teacher are equal, a number or a function like an oracle; None where
    it has no meaning, which ``note`` then explains. ``rows``: float64 rows and inputs, where random ones do not fit. ``term``: keys
    of the term in the driver, such as ``mapper``. ``tolerances``: by column, where the usual one is not right; ``note`` says why.
    """

    item: str
    component: str
    oracles: Mapping[str, Callable[..., Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: RowMaker | None = None
    floor: float | Callable[..., Any] | None = 0.0
    note: str = ""
    term: Mapping[str, Any] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Any other proof: ``error`` computes how far a component is from what ``oracle`` says."""

    item: str
    component: str
    oracle: str
    of: Literal["value", "gradient"]
    error: Callable[[], float]
    tolerance: float
    note: str = ""
