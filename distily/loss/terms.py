"""A term: one objective with its weight, the place it acts on, and the modules between student and teacher.

Letters: N supervised tokens, n rows of a chunk or a set, V vocabulary, H hidden width, P mapped pairs of layers, M matches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distily.compilation import Compiled
from distily.errors import DistilyError
from distily.forms import Form
from distily.layers import LayerPair
from distily.loss.features import Feature, width
from distily.mappings import LayerMapping, layer_mapping
from distily.objectives import RESERVED, Description
from distily.products import upcast
from distily.schedules import schedule
from distily.spec import Component, parse_component

DEFAULT_MAPPER, DEFAULT_PROJECTOR, DEFAULT_NORMALIZER = "penultimate_k", "linear", "none"
DEFAULT_MAX_ROWS = 256
LOGIT_SITES = ("logits", "logit_lens")
READ_SITES = ("logit_lens", "attentions")
"""Sites whose rows are large, so that they are formed a chunk at a time."""


class Builder(Protocol):
    """What this module needs of the plugins."""

    def find(self, kind: str, name: str) -> Any: ...
    def build(self, kind: str, component: Component) -> Any: ...


class Term(nn.Module):
    """One weighted objective of the loss. As a module it owns what trains beside the student: projectors, learned objectives.

    ``objectives``: one for every pair of layers where the objective learns for each pair, else one alone.
    """

    def __init__(
        self,
        key: str,
        objectives: Any,
        description: Description,
        *,
        weight: float | Component = 1.0,
        site: str = "logits",
        temperature: float = 1.0,
        temperature_scale: str | None = None,
        max_rows: int = DEFAULT_MAX_ROWS,
        mapping: LayerMapping | None = None,
        projectors: Sequence[nn.Module] = (),
        normalizers: Sequence[Any] = (),
        normalized: str = "both",
    ) -> None:
        super().__init__()
        self.key = key
        self.objectives = list(objectives) if isinstance(objectives, (list, tuple)) else [objectives]
        self.description = description
        self.schedule = schedule(weight)
        self.site = site
        self.temperature = float(temperature)
        scale = temperature_scale or description.temperature_scale or "none"
        self.factor = {"t2": self.temperature**2, "t": self.temperature, "none": 1.0}[scale]
        self.max_rows = max_rows
        self.mapping = mapping or LayerMapping([])
        self.projectors = list(projectors)
        self.normalizers = list(normalizers)
        self.normalized = normalized
        parts = [*self.objectives, *self.projectors, *self.normalizers]
        unique = {id(part): part for part in parts if isinstance(part, nn.Module)}
        self.learned = nn.ModuleList(unique.values())
        self._calls: list[Any] = list(self.objectives)

    @property
    def on_logits(self) -> bool:
        return self.site == "logits"

    @property
    def is_row_set(self) -> bool:
        return self.description.granularity == "row_set"

    @property
    def pairs(self) -> list[LayerPair]:
        return self.mapping.pairs

    @property
    def captured(self) -> str:
        """The site whose tensors the models have to give."""
        return "hidden_states" if self.site == "logit_lens" else self.site

    @property
    def student_features(self) -> list[Feature]:
        return [(self.captured, student) for student, _ in self.pairs]

    @property
    def teacher_features(self) -> list[Feature]:
        return [(self.captured, teacher) for _, teacher in self.pairs] if self.description.needs_teacher else []

    def compile_functions(self) -> None:
        """Lets torch.compile join the operations of objectives that are plain functions, at their first call.

        A GPU then reads a chunk of logits a few times, not once an operation. Objectives with state stay as they are.
        """
        self._calls = [each if isinstance(each, nn.Module) else Compiled(_call_of(each)) for each in self.objectives]

    @property
    def refused(self) -> str | None:
        """Why a function of it is not compiled though it was to be, in the compiler's words."""
        return next((call.refused for call in self._calls if isinstance(call, Compiled) and call.refused), None)

    def forms(self) -> Sequence[Form]:
        """The objective as a sum of forms for the fused kernels; empty where it is none, or does not read a chunk of logits."""
        make = self.description.forms
        if make is None or not self.on_logits or self.is_row_set:
            return ()
        objective = self.objectives[0]
        if isinstance(objective, nn.Module):
            return make(objective)
        options = {name: option.default for name, option in inspect.signature(objective).parameters.items()}
        return make(**{name: options[name] for name in inspect.signature(make).parameters})

    def values(self, student: Tensor, teacher: Tensor | None, inputs: Mapping[str, Any], match: int = 0) -> Tensor:
        """The objective on rows ``(n, …)``, in float32, with temperature and its factor: ``(n,)``."""
        if self.temperature != 1.0:
            student = student / self.temperature
            teacher = teacher if teacher is None else teacher / self.temperature
        given = {name: inputs[name] for name in self.description.inputs}
        result = self._calls[match if len(self._calls) > 1 else 0](student, teacher, **given)
        if result.shape != student.shape[:1]:
            raise DistilyError(
                f"objective {self.key}: it returned shape {tuple(result.shape)}, not one value for each of {student.shape[0]} rows."
            )
        return result * self.factor if self.factor != 1.0 else result

    def matches(self, student: Sequence[Tensor], teacher: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[Any]:
        """What is compared: rows of every pair, P times ``(N, Hs)`` and ``(N, Ht)``, projected, normalised and matched."""
        rows = self._projected([upcast(each) for each in student])
        pairs = [self._normalized(pair, *sides) for pair, sides in enumerate(zip(rows, map(upcast, teacher), strict=True))]
        mine, theirs = ([pair[side] for pair in pairs] for side in range(2))
        if self.description.stacked:
            return [(torch.stack(mine, 1), torch.stack(theirs, 1))]
        return self.mapping.matches(mine, theirs, inputs["sequence_ids"])

    def _projected(self, student: list[Tensor]) -> list[Tensor]:
        """The student's rows of every pair after its projector; pairs that share block and projector share the product."""
        if not self.projectors:
            return student
        keys = [(id(projector), block) for projector, (block, _) in zip(self.projectors, self.pairs, strict=True)]
        made: dict[tuple[int, int], Tensor] = {}
        for key, projector, rows in zip(keys, self.projectors, student, strict=True):
            if key not in made:
                made[key] = projector(rows)
        return [made[key] for key in keys]

    def _normalized(self, pair: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if not self.normalizers:
            return student, teacher
        normalizer = self.normalizers[pair]
        both = normalizer(student, teacher) if isinstance(normalizer, nn.Module) else (normalizer(student), normalizer(teacher))
        return (both[0] if self.normalized == "both" else student), both[1]

    def observers(self, pair: int) -> list[Any]:
        """The modules of a pair that may have to be calibrated."""
        objective = self.objectives[pair if len(self.objectives) > 1 else 0]
        return [objective, *self.projectors[pair : pair + 1], *self.normalizers[pair : pair + 1]]


def _call_of(objective: Any) -> Any:
    """The objective as one function, which the compiler names and guards better than one with bound options."""

    def call(student: Tensor, teacher: Tensor | None, **inputs: Any) -> Any:
        return objective(student, teacher, **inputs)

    return call


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
    between = {name: settings.pop(name, None) for name in ("mapper", "projector", "projector_for", "normalizer")}
    objective = builder.build("objectives", Component(component.name, options))
    rows = options.get("max_rows", _default_rows(factory))
    site = settings.pop("on", description.on[0])
    if site == "logits":
        return Term(key, objective, description, site=site, max_rows=rows, **settings)
    if teacher is None:
        raise DistilyError(f"objective {key}: it compares features, and this run has no teacher with features.")
    connection = _Connection(key, site, description, builder, student, teacher, between)
    return Term(key, connection.objectives(objective), description, site=site, max_rows=rows, **connection.modules(), **settings)


def _default_rows(factory: Any) -> int:
    parameter = inspect.signature(factory).parameters.get("max_rows")
    return DEFAULT_MAX_ROWS if parameter is None else int(parameter.default)


class _Connection:
    """What stands between student and teacher for a term on features: pairs of layers, and the modules of each pair."""

    def __init__(
        self,
        key: str,
        site: str,
        description: Description,
        builder: Builder,
        student: Any,
        teacher: Any,
        chosen: Mapping[str, Any],
    ) -> None:
        self.key, self.site, self.description, self.builder, self.chosen = key, site, description, builder, chosen
        depths = [model.config.get_text_config().num_hidden_layers for model in (student, teacher)]
        mapper = parse_component(chosen["mapper"] or DEFAULT_MAPPER, "mapper")
        self.mapping = layer_mapping(mapper.name, builder.build("layer_mappers", mapper), *depths)
        if description.stacked and len(self.mapping.pairs) < 2:
            raise DistilyError(
                f"objective {key}: it compares how layers follow each other, and mapper {mapper.name} pairs only one; "
                "allowed: a mapper of two pairs or more, such as last_k(k=2)."
            )
        self.widths = [(0, 0) for _ in self.mapping.pairs]
        if site not in READ_SITES:
            self.widths = [(width(student, (site, mine)), width(teacher, (site, theirs))) for mine, theirs in self.mapping.pairs]

    def objectives(self, objective: Any) -> list[Any]:
        """One for each pair where the objective is made for two widths, else the one."""
        if not isinstance(getattr(objective, "func", None), type):
            return [objective]
        if type(self.mapping).matches is not LayerMapping.matches:
            raise DistilyError(f"objective {self.key}: it learns for each pair of layers, so its mapper cannot mix layers.")
        projected = bool(self._projector())
        return [objective(theirs if projected else mine, theirs) for mine, theirs in self.widths]

    def modules(self) -> dict[str, Any]:
        """Mapping, projectors and normalizers, as ``Term`` takes them."""
        if self.site in READ_SITES:
            given = [name for name in ("projector", "normalizer") if self.chosen[name] is not None]
            if given:
                raise DistilyError(f"objective {self.key}: on {self.site} there is nothing for a {given[0]} to do.")
            return {"mapping": self.mapping}
        return {"mapping": self.mapping, "projectors": self._projectors(), "normalizers": self._normalizers()}

    def _projector(self) -> Component | None:
        """The projector by name; None where the objective takes two widths and nobody asked for one."""
        if self.chosen["projector"] is not None:
            return parse_component(self.chosen["projector"], "projector")
        if not self.description.equal_widths:
            return None
        return Component("identity" if all(mine == theirs for mine, theirs in self.widths) else DEFAULT_PROJECTOR)

    def _projectors(self) -> list[nn.Module]:
        between = self._projector()
        if between is None:
            return []
        make = self.builder.build("projectors", between)
        shared = self.chosen["projector_for"] or self.mapping.projector_for
        made: dict[Any, nn.Module] = {}
        result = []
        try:
            for place, (widths, (block, _)) in enumerate(zip(self.widths, self.mapping.pairs, strict=True)):
                identity = {"pair": place, "block": (block, widths), "all": widths}[shared]
                if identity not in made:
                    made[identity] = make(*widths)
                result.append(made[identity])
        except ValueError as error:
            raise DistilyError(f"objective {self.key}: projector {between.name}: {error}.") from error
        return result

    def _normalizers(self) -> list[Any]:
        after = parse_component(self.chosen["normalizer"] or DEFAULT_NORMALIZER, "normalizer")
        normalizer = self.builder.build("normalizers", after)
        if not isinstance(getattr(normalizer, "func", None), type):
            return [normalizer for _ in self.widths]
        if self._projector() is None and any(mine != theirs for mine, theirs in self.widths):
            raise DistilyError(
                f"objective {self.key}: normalizer {after.name} holds the teacher's statistics, and the student's width is another; "
                "allowed: with a projector, such as projector=linear."
            )
        return [normalizer(theirs) for _, theirs in self.widths]
