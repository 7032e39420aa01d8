"""The reference text of components, from their signatures, descriptions and docstrings: what the command line and the page show.

A docstring is read by paragraphs. The first says what the component computes; ``Options:`` and ``Source:`` are taken out to stand
with types and defaults; ``>>>`` is the example; all else is kept as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distily.hookspecs import KINDS
from distily.plugins import Offered, Plugins
from distily.schema import describe
from distily.spec import Component, written

if TYPE_CHECKING:
    from distily.objectives import Description

PAGE = ("objectives", "layer_mappers", "projectors", "normalizers", "combiners")
"""Kinds on the page, in its order: all that makes a loss."""

INTRODUCTION = """\
# Objectives and what surrounds them

Generated from the plugins by `distily components --markdown`; a test fails where this page is not what they say.
`distily components NAME` shows an entry, by its name or any alias; any other word is searched for.

A loss is a weighted sum of terms. A term is an objective with a weight, the site `on` which it acts, and for features a
layer mapper, a projector and a normalizer; a combiner may weigh the terms by their values or gradients. Everywhere the student
comes first, logarithms are natural, one value belongs to one supervised token, and the driver alone masks, divides the logits by
the temperature, and takes the mean over the supervised tokens of the whole batch. Letters: N or n rows, V vocabulary, H widths;
s and t are the distributions of student and teacher, a and b their features.
"""

TEMPERATURES = {
    "t2": "logits are divided by T, the value is multiplied by T²",
    "t": "logits are divided by T, the value is multiplied by T",
    "none": "logits are divided by T",
}
GRANULARITIES = {"token": "each row by itself", "row_set": "the rows of a document as one set, at most `max_rows`"}
BESIDE = "--objective forward_kl --objective "
USES = {
    "objectives": '--objective "{}"',
    "layer_mappers": BESIDE + '"cosine:mapper={}"',
    "projectors": BESIDE + '"cosine:projector={}"',
    "normalizers": BESIDE + '"mse:normalizer={}"',
    "combiners": BESIDE + '"cosine:weight=0.3" --combiner "{}"',
    "quantizers": '--quantizer "{}"',
    "evaluators": '--evaluator "{}"',
    "loggers": '--logger "{}"',
}
"""How a component of each kind is asked for on the command line."""


@dataclass(frozen=True)
class Documentation:
    """A docstring by its parts."""

    summary: str
    meanings: Mapping[str, str]
    source: str
    text: str
    example: str


def read(docstring: str, options: Iterable[str]) -> Documentation:
    """The parts of a docstring; what it says of each option by the option's name."""
    parts: dict[str, list[str]] = {"Options:": [], "Source:": [], ">>>": [], "": []}
    for paragraph in re.split(r"\n\n+|\s(?=Options:|Source:)", inspect.cleandoc(docstring)):
        start = next(start for start in parts if paragraph.startswith(start))
        parts[start].append(paragraph if start == ">>>" else paragraph.removeprefix(start))
    summary, *text = parts[""] or [""]
    return Documentation(
        " ".join(summary.split()),
        _meanings(" ".join(" ".join(parts["Options:"]).split()), options),
        " ".join(" ".join(parts["Source:"]).split()).removesuffix("."),
        "\n\n".join(text),
        "\n\n".join(parts[">>>"]),
    )


def _meanings(text: str, options: Iterable[str]) -> dict[str, str]:
    """What stands between an option, named at the start of a sentence, and the next one; options named together share it."""
    names = "|".join(options)
    if not names:
        return {}
    heads = list(re.finditer(rf"(?:^|(?<=[.;,] )|(?<= and ))(?:``({names})``|({names})(?=:))", text))
    found: dict[str, str] = {}
    end, shared = len(text), ""
    for head in reversed(heads):
        meaning = re.sub(r"\s*Default \S+?\.(?=\s|$)", "", text[head.end() : end]).strip(" :,;").removeprefix(".")
        shared = found[head[1] or head[2]] = shared if meaning in ("", "and", "or") else meaning
        end = head.start()
    return found if heads else dict.fromkeys(options, text.replace("those of", "as in"))


def command(entry: Offered) -> str:
    """The component on the command line with its defaults; what has no default as the docstring shows it."""
    shown = {}
    for option in entry.options.values():
        example = re.search(rf"\b{option.name}=(\[.*\]|[^,)`\s]+)", entry.factory.__doc__ or "")
        shown[option.name] = option.default if not option.required else example[1].replace(" ", "") if example else "…"
    spec = str(Component(entry.name, shown))
    if entry.kind in ("layer_mappers", "projectors", "normalizers") and shown:
        spec = f"{entry.name}({spec.partition(':')[2]})"
    description: Description | None = getattr(entry.factory, "description", None)
    alone = description is None or (description.granularity == "token" and "logits" in description.on)
    return (USES[entry.kind] if alone else BESIDE + '"{}"').format(spec)


def sections(entry: Offered) -> Iterator[str]:
    """The entry of a component, paragraph by paragraph."""
    documentation = read(inspect.getdoc(entry.factory) or "", entry.options)
    yield documentation.summary
    yield "\n".join(_facts(entry, documentation))
    if documentation.text:
        yield re.sub(r"::$", ":", documentation.text, flags=re.MULTILINE)
    if documentation.example:
        yield f"```python\n{documentation.example}\n```"


def _facts(entry: Offered, documentation: Documentation) -> Iterator[str]:
    description: Description | None = getattr(entry.factory, "description", None)
    if entry.aliases:
        yield f"- aliases: {', '.join(f'`{alias}`' for alias in entry.aliases)}"
    if description is not None:
        yield from _of_objective(description)
    for option in entry.options.values():
        default = "required" if option.required else f"default `{written(option.default)}`"
        meaning = documentation.meanings.get(option.name)
        yield f"- option `{option.name}` ({describe(option.hint)}; {default}){': ' if meaning else ''}{meaning or ''}"
    source = documentation.source or (description.source if description else "")
    if source:
        yield f"- source: {source}"
    yield f"- use: `{command(entry)}` (plugin {entry.plugin})"


def _of_objective(description: Description) -> Iterator[str]:
    if description.formula:
        yield f"- formula: `{description.formula}`"
    stacked = ", all mapped layers at once" if description.stacked else ""
    yield f"- on: {', '.join(f'`{site}`' for site in description.on)}; {GRANULARITIES[description.granularity]}{stacked}"
    if description.temperature_scale is not None:
        yield f"- temperature: {TEMPERATURES[description.temperature_scale]}"
    if not description.needs_teacher:
        yield "- needs no teacher"
    if description.surrogate_gradient:
        yield "- gradient: by intent not that of the value; a part of the formula is held constant"


def page(plugins: Plugins) -> str:
    """All components of the kinds in ``PAGE`` as one Markdown page: for each kind what there is, then every entry."""
    blocks = [INTRODUCTION.rstrip()]
    for kind in PAGE:
        offered = [entry for entries in plugins.offered(kind).values() for entry in entries]
        entries = sorted(offered, key=lambda entry: entry.name)
        if entries:
            blocks += [
                f"## {KINDS[kind].capitalize()}s",
                "\n".join(f"- [{entry.name}](#{entry.name}): {summary(entry)}" for entry in entries),
            ]
        for entry in entries:
            blocks += [f"### {entry.name}", *sections(entry)]
    return "\n\n".join(blocks)


def summary(entry: Offered) -> str:
    """The first paragraph of what a component says of itself, on one line."""
    return read(inspect.getdoc(entry.factory) or "", ()).summary
