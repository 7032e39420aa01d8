"""A term: one objective with its weight, the place it acts on, and the modules between student and teacher.

Letters: N supervised tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distily.errors import DistilyError
from distily.features import Feature, width
from distily.heads import upcast
from distily.layers import LayerPair, layer_pairs
from distily.objectives import RESERVED, Description
from distily.spec import Component, parse_component

DEFAULT_MAPPER, DEFAULT_PROJECTOR, DEFAULT_NORMALIZER = "penultimate_k", "linear", "none"
DEFAULT_MAX_ROWS = 256


class Builder(Protocol):
    """What this module needs of the plugins."""

    def find(self, kind: str, name: str) -> Any: ...
    def build(self, kind: str, component: Component) -> Any: ...


@dataclass(frozen=True)
class Weight:
    """A constant weight, or one that moves from ``start`` to ``end`` while the share of training done goes from 0 to ``until``."""

    start: float
    end: float
    until: float = 1.0
    shape: str = "linear"

    @classmethod
    def of(cls, value: float | Component) -> Weight:
        return cls(**value.options, shape=value.name) if isinstance(value, Component) else cls(float(value), float(value))

    def at(self, progress: float) -> float:
        share = min(1.0, progress / self.until) if self.until > 0 else 1.0
        if self.shape == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return self.start + (self.end - self.start) * share


class Term(nn.Module):
    """One weighted objective of the loss. As a module it owns what trains beside the student: projectors, learned objectives."""

    def __init__(
        self,
        key: str,
        objective: Any,
        description: Description,
        *,
        weight: float | Component = 1.0,
        site: str = "logits",
        temperature: float = 1.0,
        temperature_scale: str | None = None,
        max_rows: int = DEFAULT_MAX_ROWS,
        pairs: Sequence[LayerPair] = (),
        projectors: Sequence[nn.Module] = (),
        normalizer: Any = None,
    ) -> None:
        super().__init__()
        self.key = key
        self.objective = objective
        self.description = description
        self.weight = Weight.of(weight)
        self.site = site
        self.temperature = float(temperature)
        scale = temperature_scale or description.temperature_scale or "none"
        self.factor = {"t2": self.temperature**2, "t": self.temperature, "none": 1.0}[scale]
        self.max_rows = max_rows
        self.pairs = list(pairs)
        self.projectors = nn.ModuleList(projectors)
        self.normalizer = normalizer

    @property
    def on_logits(self) -> bool:
        return self.site == "logits"

    @property
    def is_row_set(self) -> bool:
        return self.description.granularity == "row_set"

    @property
    def student_features(self) -> list[Feature]:
        return [(self.site, student) for student, _ in self.pairs]

    @property
    def teacher_features(self) -> list[Feature]:
        return [(self.site, teacher) for _, teacher in self.pairs] if self.description.needs_teacher else []

    def values(self, student: Tensor, teacher: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        """The objective on rows ``(n, ·)``, in float32, with temperature and its factor: ``(n,)``."""
        if self.temperature != 1.0:
            student = student / self.temperature
            teacher = teacher if teacher is None else teacher / self.temperature
        given = {name: inputs[name] for name in self.description.inputs}
        result = self.objective(student, teacher, **given)
        if result.shape != student.shape[:1]:
            raise DistilyError(
                f"objective {self.key}: it returned shape {tuple(result.shape)}, not one value for each of {student.shape[0]} rows."
            )
        return result * self.factor if self.factor != 1.0 else result

    def matched(self, pair: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher rows of one pair, projected and normalised: ``(N, H_s), (N, H_t) -> (N, H), (N, H)``."""
        student, teacher = upcast(student), upcast(teacher)
        if len(self.projectors):
            student = self.projectors[pair](student)
        if self.normalizer is not None:
            student, teacher = self.normalizer(student), self.normalizer(teacher)
        return student, teacher


def build_terms(
    components: Sequence[Component], builder: Builder, student: Any, teacher: Any | None, seed: int = 0
) -> nn.ModuleDict:
    """The terms of a run by key (the objective's name, numbered when repeated).

    Raises ``DistilyError`` for an objective that needs a teacher where there is none.
    """
    terms = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):  # projectors draw from the seed, whatever was drawn before
        torch.manual_seed(seed)
        for component in components:
            entry = builder.find("objectives", component.name)
            repeats = sum(key.split("-")[0] == entry.name for key in terms)
            key = f"{entry.name}-{repeats + 1}" if repeats else entry.name
            terms[key] = _term(key, component, entry.factory, builder, student, teacher)
    return terms


def _term(key: str, component: Component, factory: Any, builder: Builder, student: Any, teacher: Any | None) -> Term:
    description: Description = factory.description
    if description.needs_teacher and teacher is None:
        raise DistilyError(f"objective {component.name}: it needs a teacher, and this run has none.")
    settings = dict(component.options)
    own = {"temperature"} if description.own_temperature else set()
    options = {name: settings.pop(name) for name in list(settings) if name not in RESERVED or name in own}
    mapper, projector, normalizer = (settings.pop(name, None) for name in ("mapper", "projector", "normalizer"))
    objective = builder.build("objectives", Component(component.name, options))
    rows = options.get("max_rows", _default_rows(factory))
    site = settings.pop("on", description.on[0])
    term = Term(key, objective, description, site=site, max_rows=rows, **settings)
    if not term.on_logits:
        _connect(term, mapper, projector, normalizer, builder, student, teacher)
    return term


def _default_rows(factory: Any) -> int:
    parameter = inspect.signature(factory).parameters.get("max_rows")
    return DEFAULT_MAX_ROWS if parameter is None else int(parameter.default)


def _connect(
    term: Term, mapper: Any, projector: Any, normalizer: Any, builder: Builder, student: Any, teacher: Any | None
) -> None:
    """Layer pairs, one projector for each, and the normalizer of a term on features."""
    if teacher is None:
        raise DistilyError(f"objective {term.key}: it compares features, and this run has no teacher with features.")
    depths = [model.config.get_text_config().num_hidden_layers for model in (student, teacher)]
    chosen = parse_component(mapper or DEFAULT_MAPPER, "mapper")
    term.pairs = layer_pairs(chosen.name, builder.build("layer_mappers", chosen), *depths)
    widths = [
        (width(student, (term.site, student_block)), width(teacher, (term.site, teacher_block)))
        for student_block, teacher_block in term.pairs
    ]
    default = "identity" if all(mine == theirs for mine, theirs in widths) else DEFAULT_PROJECTOR
    between = parse_component(projector or default, "projector")
    make = builder.build("projectors", between)
    try:
        term.projectors = nn.ModuleList(make(mine, theirs) for mine, theirs in widths)
    except ValueError as error:
        raise DistilyError(f"objective {term.key}: projector {between.name}: {error}.") from error
    after = parse_component(normalizer or DEFAULT_NORMALIZER, "normalizer")
    term.normalizer = builder.build("normalizers", after)
