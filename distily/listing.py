"""What is installed, in lines for people and in values for programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from distily.errors import DistilyError, unknown
from distily.hookspecs import KINDS
from distily.plugins import Offered, Plugins, signature_line


def plugin_values(plugins: Plugins) -> list[dict[str, Any]]:
    """Every package: name, module, distribution, version, components by kind, error."""
    return [
        {
            "name": package.name,
            "module": package.module,
            "distribution": package.distribution,
            "version": package.version,
            "components": {
                kind: [entry.name for entry in package.components if entry.kind == kind]
                for kind in KINDS
                if any(entry.kind == kind for entry in package.components)
            },
            "error": package.error,
        }
        for package in sorted(plugins.packages, key=lambda package: (package.error is not None, package.name))
    ]


def plugin_lines(plugins: Plugins) -> Iterator[str]:
    """One line a package; the broken ones last, with the reason."""
    for values in plugin_values(plugins):
        if values["error"]:
            yield f"{values['name']}  {values['distribution']} {values['version']}  BROKEN: {values['error']}"
            continue
        offered = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in values["components"].items())
        yield f"{values['name']}  {values['distribution']} {values['version']}  {offered}"


def _chosen(plugins: Plugins, word: str | None) -> list[Offered]:
    """The components that ``word`` asks for: all, those of a kind, or those of a name or alias."""
    everything = [entry for kind in KINDS for entries in plugins.offered(kind).values() for entry in entries]
    if word is None:
        return everything
    kinds = {name: kind for kind, singular in KINDS.items() for name in (kind, singular, kind.replace("_", "-"))}
    if word in kinds:
        return [entry for entry in everything if entry.kind == kinds[word]]
    found = [entry for entry in everything if word == entry.name or word in entry.aliases]
    if not found:
        raise DistilyError(unknown("component", word, {*KINDS, *(entry.name for entry in everything)}))
    return found


def component_values(plugins: Plugins, word: str | None) -> list[dict[str, Any]]:
    """Every chosen component: kind, name, aliases, plugin, options, formula, source, documentation."""
    return [
        {
            "kind": entry.kind,
            "name": entry.name,
            "aliases": list(entry.aliases),
            "plugin": entry.plugin,
            "options": signature_line(entry),
            "formula": getattr(getattr(entry.factory, "description", None), "formula", ""),
            "source": getattr(getattr(entry.factory, "description", None), "source", ""),
            "documentation": inspect.getdoc(entry.factory) or "",
        }
        for entry in _chosen(plugins, word)
    ]


def component_lines(plugins: Plugins, word: str | None) -> Iterator[str]:
    """One line a component under its kind; everything about it when it is asked for by name."""
    values = component_values(plugins, word)
    by_name = word is not None and all(word == entry["name"] or word in entry["aliases"] for entry in values)
    kind = None
    for entry in values:
        if by_name:
            yield from _whole(entry)
            continue
        if entry["kind"] != kind:
            kind = entry["kind"]
            yield f"{kind.replace('_', ' ')}:"
        summary = entry["documentation"].split("\n\n")[0].replace("\n", " ")
        options = f" [{entry['options']}]" if entry["options"] else ""
        yield f"  {entry['name']}{options}  {summary}"


def _whole(entry: dict[str, Any]) -> Iterator[str]:
    yield f"{KINDS[entry['kind']]} {entry['name']} (plugin {entry['plugin']})"
    for key in ("aliases", "options", "formula", "source"):
        value = ", ".join(entry[key]) if isinstance(entry[key], list) else entry[key]
        if value:
            yield f"{key}: {value}"
    yield ""
    yield entry["documentation"]
