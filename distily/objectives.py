"""The contract of an objective: one value per supervised token; the driver alone masks, shifts, chunks, weighs and reduces.

Letters: B batch, S sequence, N supervised tokens, V vocabulary, H hidden width.

An objective is a pure function ``(student, teacher, *, options) -> (N,)``, student first, made a component by one decorator:

``@token_objective``
    Row i of the result depends on row i of ``student`` and ``teacher`` only. On ``logits`` the rows are ``(N, V)``,
    on features ``(N, H)``. Chunks of any size give the same numbers.
``@row_set_objective``
    The rows are one set (a transport plan, a kernel matrix). The driver gives a seeded sample of at most ``max_rows``
    supervised rows of one sequence, so that the objective still adds over micro-batches and ranks; the set's value is
    the mean of the rows' values and counts once for every supervised token of its sequence.

A ``nn.Module`` subclass with the same call (and the decorator on the class) may own parameters; they train with the student and
are left out of the export. Keyword-only names in ``DRIVER_INPUTS`` are inputs that the driver fills, never options.
An objective does no reduction, no masking, no ``.item()``; it receives float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

DRIVER_INPUTS = ("labels", "input_ids", "sequence_ids", "progress")
"""Filled by name: ``labels`` (N,), the next token; ``input_ids`` (N,), the token at the position; ``sequence_ids`` (N,), the
document it belongs to; ``progress``, the share of training done, 0 to 1."""

SITES = ("logits", "hidden_states", "queries", "keys", "values")
"""Where a term can act: the logits, a block's output, or the q/k/v projections of a block before rotary embedding."""

RESERVED = ("weight", "on", "mapper", "projector", "normalizer", "temperature", "temperature_scale")
"""Keys of a term that belong to the core: no objective may have an option of this name, except ``temperature``."""

TemperatureScale = Literal["t2", "t", "none"]
Granularity = Literal["token", "row_set"]


@dataclass(frozen=True)
class Description:
    """What the driver and the documentation know of an objective besides its signature.

    ``temperature_scale`` is the default factor by which the driver multiplies the value after dividing the logits by the
    temperature T: T² (``t2``) for divergences of second order, T (``t``) for those of first order, 1 (``none``);
    None where a temperature makes no sense. ``zero_at_equality``: the value is 0 when student and teacher are equal.
    """

    granularity: Granularity
    on: tuple[str, ...] = ("logits",)
    temperature_scale: TemperatureScale | None = "t2"
    needs_teacher: bool = True
    zero_at_equality: bool = True
    aliases: tuple[str, ...] = ()
    formula: str = ""
    source: str = ""
    inputs: tuple[str, ...] = ()
    own_temperature: bool = False


def _describe(granularity: Granularity, target: Any, **facts: Any) -> Any:
    called: Any = vars(target).get("forward") if isinstance(target, type) else target
    names = inspect.signature(called).parameters
    inputs = tuple(name for name in DRIVER_INPUTS if name in names)
    on = facts.get("on", ("logits",))
    own_temperature = "temperature" in inspect.signature(target).parameters
    if own_temperature or "logits" not in on:
        facts["temperature_scale"] = None
    target.description = Description(granularity, inputs=inputs, own_temperature=own_temperature, **facts)
    return target


def token_objective(target: Callable[..., Any] | None = None, **facts: Any) -> Any:
    """Make a function of rows a token objective. ``facts`` are fields of ``Description``: aliases, on, temperature_scale, …"""
    if target is None:
        return lambda wrapped: _describe("token", wrapped, **facts)
    return _describe("token", target, **facts)


def row_set_objective(target: Callable[..., Any] | None = None, **facts: Any) -> Any:
    """Make a function of a set of rows a row-set objective. Its option ``max_rows`` (if it has one) bounds the set."""
    if target is None:
        return lambda wrapped: _describe("row_set", wrapped, **facts)
    return _describe("row_set", target, **facts)
