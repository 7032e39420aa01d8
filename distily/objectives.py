"""The contract of an objective: one value per supervised token; the driver alone masks, shifts, chunks, weighs and reduces.

Letters: B batch, S sequence, N supervised tokens, V vocabulary, H hidden width, P pairs of layers, K keys.

An objective is a pure function ``(student, teacher, *, options) -> (N,)``, student first, made a component by one decorator:

``@token_objective``
    Row i of the result depends on row i of ``student`` and ``teacher`` only. On ``logits`` the rows are ``(N, V)``,
    on features ``(N, H)``. Chunks of any size give the same numbers.
``@row_set_objective``
    The rows, in the order of the text, are one set (a transport plan, a kernel matrix). The driver gives a seeded sample of at
    most ``max_rows`` supervised rows of one sequence, so that the objective still adds over micro-batches and ranks; the set's
    value is the mean of the rows' values and counts once for every supervised token of its sequence.

On ``attentions`` the rows are ``(N, heads, K)``: what query i gives to each of K keys before the softmax, -inf where it may not
look. A stacked objective gets all mapped pairs of layers at once, as ``(N, P, H)``. ``logit_lens`` reads mapped hidden states with
each model's own final norm and head; every objective on logits acts there too.

A ``nn.Module`` subclass with the same call (and the decorator on the class) may own parameters; they train with the student and
are left out of the export. Its positional parameters, if it has any, are ``(student_width, teacher_width)``: then every mapped pair
of layers gets an instance of its own. State that moves while training is in ``distily.state``.
Keyword-only names in ``DRIVER_INPUTS`` are inputs that the driver fills, never options.
An objective does no reduction, no masking, no ``.item()``; it receives float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distily.forms import Form

if TYPE_CHECKING:  # the configuration is checked without torch
    from torch import Tensor

DRIVER_INPUTS = ("labels", "input_ids", "sequence_ids", "row_seeds", "progress")
"""Filled by name: ``labels`` (N,), the next token; ``input_ids`` (N,), the token at the position; ``sequence_ids`` (N,), the
document it belongs to; ``row_seeds`` (N,), a seed for each row and step, see ``uniform``; ``progress``, the share of training
done, 0 to 1."""

SITES = ("logits", "hidden_states", "queries", "keys", "values", "attention_outputs", "attentions", "logit_lens")
"""Where a term can act: the logits; a block's output; the q/k/v projections of a block before rotary embedding; what its attention
adds to the residual stream; its attention scores; the logits that the final norm and the head read off a block's output."""

FEATURES = ("hidden_states", "queries", "keys", "values", "attention_outputs")
"""The sites whose rows are features ``(N, H)``."""

RESERVED = (
    "weight", "on", "mapper", "projector", "projector_for", "normalizer", "normalized", "temperature", "temperature_scale",
)  # fmt: skip
"""Keys of a term that belong to the core: no objective may have an option of this name, except ``temperature``."""

TemperatureScale = Literal["t2", "t", "none"]
Granularity = Literal["token", "row_set"]


@dataclass(frozen=True)
class Description:
    """What the driver and the documentation know of an objective besides its signature.

    ``temperature_scale`` is the default factor by which the driver multiplies the value after dividing the logits by the
    temperature T: T² (``t2``) for divergences of second order, T (``t``) for those of first order, 1 (``none``);
    None where a temperature makes no sense. ``zero_at_equality``: the value is 0 when student and teacher are equal.
    ``equal_widths``: on features both sides must have one width, so that a projector stands between by default.
    ``stacked``: it gets at least two pairs of layers at once. ``surrogate_gradient``: the gradient is by intent not that of the value,
    since a part of the formula is held constant. ``waits``: its linear algebra makes the host wait for a GPU.
    ``forms``: of the options (of the instance, where the objective is a class), the same value as a sum of forms that the fused kernels
    know; an empty sequence where there is none.
    """

    granularity: Granularity
    on: tuple[str, ...] = ("logits",)
    temperature_scale: TemperatureScale | None = "t2"
    needs_teacher: bool = True
    zero_at_equality: bool = True
    equal_widths: bool = True
    stacked: bool = False
    surrogate_gradient: bool = False
    waits: bool = False
    aliases: tuple[str, ...] = ()
    formula: str = ""
    source: str = ""
    inputs: tuple[str, ...] = ()
    own_temperature: bool = False
    forms: Callable[..., Sequence[Form]] | None = None


def _describe(granularity: Granularity, target: Any, **facts: Any) -> Any:
    called: Any = vars(target).get("forward") if isinstance(target, type) else target
    names = inspect.signature(called).parameters
    inputs = tuple(name for name in DRIVER_INPUTS if name in names)
    on = facts.get("on", ("logits",))
    own_temperature = "temperature" in inspect.signature(target).parameters
    if "logits" in on:
        facts["on"] = (*on, *({"logit_lens"} - set(on)))
    elif own_temperature or "attentions" not in on:
        facts["temperature_scale"] = None
    if own_temperature:
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


def uniform(row_seeds: Tensor, count: int) -> Tensor:
    """``count`` numbers in (0, 1) for each row, from the row's seed alone: ``(N,) -> (N, count)``, float64.

    A counter-based generator: whatever the chunk, the micro-batch or the device, a row draws the same numbers.
    """
    import torch

    counters = torch.arange(1, count + 1, device=row_seeds.device, dtype=torch.int64)
    return _unit(_mix(row_seeds[:, None] + counters * -7046029254386353131))


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right; that of int64 would copy the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _unit(bits: Tensor) -> Tensor:
    """The upper 53 bits as float64 in (0, 1)."""
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53
