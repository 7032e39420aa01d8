"""Finds the plugins, checks what they offer, and turns names into components. A broken plugin is listed and stops nobody else."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal

import pluggy

from distily import hookspecs
from distily.config import RunConfig
from distily.errors import DistilyError, unknown, wrong
from distily.hookspecs import KINDS, PROJECT, Factory
from distily.objectives import DRIVER_INPUTS, RESERVED, SITES
from distily.schedules import SCHEDULES, Finite, schedule_options
from distily.schema import Between, Option, conforms, describe, mistakes, options
from distily.spec import Component, parse_component

ENVIRONMENT = "DISTILY_PLUGINS"
Share = Annotated[float, Between(0, 1, excluding=(1,))]


@dataclass(frozen=True)
class Offered:
    """One component that a plugin offers."""

    kind: str
    name: str
    factory: Factory
    plugin: str

    @property
    def aliases(self) -> tuple[str, ...]:
        description = getattr(self.factory, "description", None)
        return tuple(description.aliases if description else getattr(self.factory, "aliases", ()))

    @property
    def options(self) -> dict[str, Option]:
        """Options by name. The core's own keys of a term are not among them."""
        supplied = DRIVER_INPUTS if self.kind == "objectives" else ()
        return options(self.factory, supplied)

    @property
    def from_core(self) -> tuple[str, ...]:
        """The positional parameters of the factory, which the core fills."""
        if isinstance(self.factory, type) and self.factory.__init__ in (object.__init__, _bare_module()):  # type: ignore[misc]
            return ()
        parameters = inspect.signature(self.factory).parameters.values()
        return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))

    def build(self, chosen: Mapping[str, Any]) -> Any:
        """The component: a class constructed with its options; with them bound, a function or a class that the core completes."""
        if isinstance(self.factory, type) and not self.from_core:
            return self.factory(**chosen)
        return partial(self.factory, **chosen)


@dataclass(frozen=True)
class Package:
    """An installed plugin: where it comes from, and its components or why it cannot be used."""

    name: str
    module: str
    distribution: str
    version: str
    components: tuple[Offered, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Plugins:
    """All that is installed."""

    packages: tuple[Package, ...] = field(default_factory=tuple)

    @property
    def broken(self) -> tuple[Package, ...]:
        return tuple(package for package in self.packages if package.error)

    def offered(self, kind: str) -> dict[str, list[Offered]]:
        """Canonical names of a kind; more than one entry where plugins clash."""
        result: dict[str, list[Offered]] = {}
        for package in self.packages:
            for entry in package.components:
                if entry.kind == kind:
                    result.setdefault(entry.name, []).append(entry)
        return result

    def find(self, kind: str, name: str, where: str | None = None) -> Offered:
        """The component of this name or alias. Raises ``DistilyError`` where there is none, or more than one."""
        where = where or KINDS[kind]
        everything = [entry for entries in self.offered(kind).values() for entry in entries]
        found = [entry for entry in everything if name == entry.name or name in entry.aliases]
        if len(found) > 1:
            owners = " and ".join(sorted(f"{entry.plugin} ({entry.name})" for entry in found))
            raise DistilyError(f"{where} {name!r} is offered by {owners}; remove one, or set {ENVIRONMENT}.")
        if found:
            return found[0]
        known = {entry.name for entry in everything} | {alias for entry in everything for alias in entry.aliases}
        line = unknown(where, name, known)
        line += "".join(f" Plugin {package.name} is broken: {package.error}." for package in self.broken)
        raise DistilyError(line)

    def build(self, kind: str, component: Component) -> Any:
        """The component that ``component`` names. Raises ``DistilyError`` with a line for each mistake."""
        where = f"{KINDS[kind]} {component.name}"
        entry = self.find(kind, component.name)
        lines = mistakes(where, component.options, entry.options)
        if lines:
            raise DistilyError("\n".join(lines))
        try:
            return entry.build(component.options)
        except (TypeError, ValueError) as error:
            raise DistilyError(f"{where}: {error}") from error

    def check(self, config: RunConfig) -> None:
        """Every component that the configuration names: all mistakes in one ``DistilyError``, before anything is loaded."""
        lines: list[str] = []
        for component in config.objectives:
            lines += self._check_term(component)
        lines += self._check_combiner(config)
        groups = {"quantizers": (config.quantizer,), "evaluators": config.evaluators, "loggers": config.loggers}
        for kind, components in groups.items():
            named = [component for component in components if component]
            for component in named:
                lines += self._check_component(kind, component)
            lines += self._check_repeats(kind, named)
        if not config.objectives:
            lines.append(wrong("objectives", [], "at least one objective, such as forward_kl"))
        if lines:
            raise DistilyError("\n".join(lines))

    def _check_combiner(self, config: RunConfig) -> list[str]:
        """The combiner with the core's own keys, and whether this run has terms for it."""
        if config.combiner is None:
            return []
        try:
            entry = self.find("combiners", config.combiner.name)
        except DistilyError as error:
            return [str(error)]
        where = f"combiner {config.combiner.name}"
        scopes = tuple(entry.factory.scopes) if entry.factory.measures == "gradients" else ("step",)  # type: ignore[attr-defined]
        core = (Option("scope", Literal[scopes], "step"), Option("decay", Share, 0.9), Option("divided", bool, False))
        lines = mistakes(where, config.combiner.options, {option.name: option for option in core} | entry.options)
        if len(config.objectives) < 2:
            lines.append(f"{where}: it needs at least two objectives, and this run has {len(config.objectives)}.")
        divided = int(config.train.get("gradient_accumulation_steps", 1)) > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
        chosen = config.combiner.options
        if chosen.get("scope") == "micro_batch" and divided and chosen.get("divided") is not True:
            lines.append(f"{where}: scope micro_batch depends on how the batch is divided; allowed: scope=step, or divided=true.")
        return lines

    def _check_repeats(self, kind: str, components: Iterable[Component]) -> list[str]:
        """A line for each component that is there twice: one of the two would be lost without a word."""
        names = []
        for component in components:
            with suppress(DistilyError):  # an unknown name has a line of its own
                names.append(self.find(kind, component.name).name)
        return [f"{kind}: {name!r} is named twice; allowed: once." for name in sorted(set(names)) if names.count(name) > 1]

    def _check_component(self, kind: str, component: Component, where: str | None = None) -> list[str]:
        try:
            entry = self.find(kind, component.name, where)
        except DistilyError as error:
            return [str(error)]
        return mistakes(where or f"{KINDS[kind]} {component.name}", component.options, entry.options)

    def _check_term(self, component: Component) -> list[str]:
        try:
            entry = self.find("objectives", component.name)
        except DistilyError as error:
            return [str(error)]
        where = f"objective {component.name}"
        description = getattr(entry.factory, "description", None)
        if description is None:
            return [f"{where}: plugin {entry.plugin} made it without @token_objective or @row_set_objective."]
        reserved = {key: Option(key, Any, None) for key in RESERVED if key != "temperature" or not description.own_temperature}
        lines = mistakes(where, component.options, {**reserved, **entry.options})
        chosen = component.options
        site = chosen.get("on", description.on[0])
        if site not in description.on:
            lines.append(wrong(f"{where}: on", site, ", ".join(description.on)))
        for key, kind in (("mapper", "layer_mappers"), ("projector", "projectors"), ("normalizer", "normalizers")):
            if key in chosen:
                if site == "logits" and site in SITES:
                    lines.append(f"{where}: {key} is for terms on features; this one is on logits.")
                elif site in ("logit_lens", "attentions") and key != "mapper":
                    lines.append(f"{where}: {key} is for rows of hidden width; on {site} it has nothing to do.")
                else:
                    nested = chosen[key] if isinstance(chosen[key], (Component, str, Mapping)) else str(chosen[key])
                    try:
                        parsed = parse_component(nested, f"{where}: {key}")
                        lines += self._check_component(kind, parsed, f"{where}: {KINDS[kind]}")
                    except DistilyError as error:
                        lines.append(str(error))
        for key, allowed in (("normalized", ("both", "teacher")), ("projector_for", ("pair", "block", "all"))):
            if key in chosen and chosen[key] not in allowed:
                lines.append(wrong(f"{where}: {key}", chosen[key], ", ".join(allowed)))
        lines += _check_weight(where, chosen.get("weight", 1.0))
        if description.temperature_scale is None and not description.own_temperature:
            lines += [f"{where}: it takes no {key}." for key in ("temperature", "temperature_scale") if key in chosen]
        elif not description.own_temperature:
            temperature = chosen.get("temperature", 1.0)
            if not conforms(temperature, Finite) or temperature <= 0:
                lines.append(wrong(f"{where}: temperature", temperature, "a number above 0"))
            scale = chosen.get("temperature_scale", "t2")
            if scale not in ("t2", "t", "none"):
                lines.append(wrong(f"{where}: temperature_scale", scale, "t2, t, none"))
        return lines


def _bare_module() -> Any:
    """The constructor that a ``torch.nn.Module`` without one of its own inherits; it takes anything. None where torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch.nn.Module.__init__ if torch else None


def _check_weight(where: str, weight: Any) -> list[str]:
    """A weight is a number or a schedule such as ``linear(start=…, end=…, until=…)`` over the share of training done."""
    if conforms(weight, Finite):
        return []
    if not isinstance(weight, Component) or weight.name not in SCHEDULES:
        return [wrong(f"{where}: weight", str(weight), f"a number, or linear(start=1,end=0) and so on: {', '.join(SCHEDULES)}")]
    return mistakes(f"{where}: weight {weight.name}", weight.options, schedule_options(weight.name))


def load(found: Iterable[EntryPoint] | None = None) -> Plugins:
    """Every plugin of the entry-point group ``distily``, in the order of their names.

    ``DISTILY_PLUGINS=a,b`` restricts them by entry-point name; set to nothing, none is loaded.
    """
    found = entry_points(group=PROJECT) if found is None else found
    chosen = os.environ.get(ENVIRONMENT)
    wanted = None if chosen is None else {name.strip() for name in chosen.split(",") if name.strip()}
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    entries = sorted(found, key=lambda entry: (entry.name, entry.value))
    return Plugins(tuple(_load_one(entry, manager) for entry in entries if wanted is None or entry.name in wanted))


def _load_one(entry: EntryPoint, manager: pluggy.PluginManager) -> Package:
    distribution = entry.dist.name if entry.dist else "?"
    version = entry.dist.version if entry.dist else "?"
    package = partial(Package, entry.name, entry.value, distribution, version)
    try:
        module = entry.load()
        manager.register(module, name=f"{distribution}:{entry.name}")
        return package(components=tuple(_components(entry.name, module, manager)))
    except Exception as error:  # a stranger's import may raise anything; it is shown, not hidden
        reason = str(error).splitlines()[0] if str(error) else ""
        return package(error=f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


def _components(plugin: str, module: Any, manager: pluggy.PluginManager) -> Iterable[Offered]:
    specified = {f"{PROJECT}_{kind}": kind for kind in KINDS}
    for caller in manager.get_hookcallers(module) or []:
        if caller.name not in specified:
            raise ValueError(unknown("hook", caller.name, specified))
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not module:
                continue
            offered = implementation.function()
            if not isinstance(offered, Mapping) or not all(callable(factory) for factory in offered.values()):
                raise TypeError(f"hook {caller.name} must return {{name: factory}}, not {type(offered).__name__}")
            kind = specified[caller.name]
            for name, factory in offered.items():
                entry = Offered(kind, name, factory, plugin)
                clash = set(entry.options) & (set(RESERVED) - {"temperature"}) if kind == "objectives" else set()
                if clash:
                    raise ValueError(f"objective {name!r} has an option {min(clash)!r}, which belongs to the core")
                yield entry


def signature_line(entry: Offered) -> str:
    """The options of a component on one line, with defaults: ``k: an integer = 1``."""
    parts = []
    for option in entry.options.values():
        default = "" if option.required else f" = {option.default!r}"
        parts.append(f"{option.name}: {describe(option.hint)}{default}")
    return "; ".join(parts)
