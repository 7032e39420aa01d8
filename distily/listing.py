"""What is installed, in lines for people and in values for programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from distily.catalogue import read, sections, summary
from distily.errors import DistilyError, nearest
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
    """The components that ``word`` asks for: all, those of a kind, of a name or alias, or those that mention it."""
    everything = [entry for kind in KINDS for entries in plugins.offered(kind).values() for entry in entries]
    if word is None:
        return everything
    kinds = {name: kind for kind, singular in KINDS.items() for name in (kind, singular, kind.replace("_", "-"))}
    if word in kinds:
        return [entry for entry in everything if entry.kind == kinds[word]]
    named = [entry for entry in everything if word.lower() in (entry.name, *entry.aliases)]
    found = named or [entry for entry in everything if word.lower() in _searched(entry)]
    if not found:
        close = nearest(word, [*KINDS, *(name for entry in everything for name in (entry.name, *entry.aliases))])
        guess = f"; did you mean {close!r}?" if close else "."
        raise DistilyError(
            f"component {word!r} is unknown{guess} Allowed: {', '.join(KINDS)}, a name, an alias, or a word to find."
        )
    return found


def _searched(entry: Offered) -> str:
    """Where a word is searched for, in lower case."""
    values = _values(entry)
    return " ".join([values["name"], *values["aliases"], values["source"], values["documentation"]]).lower()


def _values(entry: Offered) -> dict[str, Any]:
    description = getattr(entry.factory, "description", None)
    documentation = inspect.getdoc(entry.factory) or ""
    return {
        "kind": entry.kind,
        "name": entry.name,
        "aliases": list(entry.aliases),
        "plugin": entry.plugin,
        "options": signature_line(entry),
        "formula": getattr(description, "formula", ""),
        "source": getattr(description, "source", "") or read(documentation, ()).source,
        "documentation": documentation,
    }


def component_values(plugins: Plugins, word: str | None) -> list[dict[str, Any]]:
    """Every chosen component: kind, name, aliases, plugin, options, formula, source, documentation."""
    return [_values(entry) for entry in _chosen(plugins, word)]


def component_lines(plugins: Plugins, word: str | None) -> Iterator[str]:
    """One line a component under its kind; its whole entry when it is asked for by a name."""
    kind = None
    for entry in _chosen(plugins, word):
        if word and word.lower() in (entry.name, *entry.aliases):
            if word.lower() != entry.name:
                yield f"{word} is an alias of {entry.name}."
            yield f"{KINDS[entry.kind]} {entry.name}"
            for section in sections(entry):
                yield f"\n{section}"
            continue
        if entry.kind != kind:
            kind = entry.kind
            yield f"{kind.replace('_', ' ')}:"
        also = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
        yield f"  {entry.name}{also}  {summary(entry)}"
