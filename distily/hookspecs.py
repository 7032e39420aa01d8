"""The hooks: what a plugin offers. A hook takes nothing, returns ``{name: factory}`` and is called once, before anything is built.

Where each kind of component works in a run (no hook runs inside the training step)::

    config -> plugins              every hook is called, once
    teacher, student, data         distily_quantizers: prepare
    driver                         distily_objectives, with distily_layer_mappers,
                                   distily_projectors and distily_normalizers for terms on features;
                                   distily_combiners where terms meet
    evaluation (before)            distily_evaluators
    trainer                        distily_loggers; the objectives' functions, called by the driver
    evaluation (after)             distily_evaluators
    export, card                   distily_quantizers: convert

One rule makes a factory: **positional parameters are what the core supplies, keyword-only parameters are the options.**
A class is constructed with its options, a function is called with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pluggy

PROJECT = "distily"
Factory = Callable[..., Any]
Named = TypeVar("Named", bound=Factory)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def aliased(*names: str) -> Callable[[Named], Named]:
    """Gives a component its other names, unique over all plugins; an objective names them in its own decorator."""

    def name(factory: Named) -> Named:
        factory.aliases = names  # type: ignore[attr-defined]
        return factory

    return name


@hookspec
def distily_objectives() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """Terms of the loss: functions ``(student, teacher, *, options) -> (N,)`` made by ``@token_objective`` or
    ``@row_set_objective``, or ``nn.Module`` classes with the same call. See ``distily.objectives``.
    """


@hookspec
def distily_layer_mappers() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """Functions ``(student_layers, teacher_layers, *, options)`` that return pairs ``[(student_block, teacher_block), ...]`` or a
    ``LayerMapping``. See ``distily.layers`` and ``distily.mappings``.
    """


@hookspec
def distily_projectors() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """``(student_width, teacher_width, *, options) -> nn.Module`` that maps ``(..., student_width)`` to ``(..., teacher_width)``."""


@hookspec
def distily_normalizers() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """Functions ``(features, *, options) -> features`` of rows ``(N, H)``, each row by itself, called for each side after projection.
    Or ``nn.Module`` classes, constructed with the teacher's width H for every pair of layers, whose call takes both sides:
    ``(student, teacher) -> (student, teacher)``. One with constants or running statistics is such a class, see ``distily.state``.
    The term's key ``normalized`` says whether the student's side is replaced too.
    """


@hookspec
def distily_combiners() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """``Combiner`` classes: coefficients for the terms of the loss from their measured gradients or values. See ``distily.combiners``."""


@hookspec
def distily_quantizers() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """``Quantizer`` classes: ``prepare`` the student before training, ``convert`` it for export. See ``distily.quantization``."""


@hookspec
def distily_evaluators() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """``Evaluator`` classes: a model and a context in, named numbers out. See ``distily.evaluation``."""


@hookspec
def distily_loggers() -> Mapping[str, Factory]:  # type: ignore[empty-body]
    """``Logger`` classes: send metrics somewhere. See ``distily.loggers``."""


KINDS = {
    "objectives": "objective",
    "layer_mappers": "layer mapper",
    "projectors": "projector",
    "normalizers": "normalizer",
    "combiners": "combiner",
    "quantizers": "quantizer",
    "evaluators": "evaluator",
    "loggers": "logger",
}
"""Every kind of component: the plural in hooks and commands, the singular in messages."""
