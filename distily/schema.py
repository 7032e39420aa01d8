"""Type hints as the option schema: keys, types and ranges of dataclasses and of keyword-only parameters."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from distily.errors import unknown, wrong


@dataclass(frozen=True)
class Between:
    """A numeric range for ``Annotated``: closed by default, open at an end that is named in ``excluding``."""

    low: float = float("-inf")
    high: float = float("inf")
    excluding: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.excluding

    def __str__(self) -> str:
        opening = "(" if self.low in self.excluding or self.low == float("-inf") else "["
        closing = ")" if self.high in self.excluding or self.high == float("inf") else "]"
        return f"in {opening}{self.low:.10g}, {self.high:.10g}{closing}"


@dataclass(frozen=True)
class Option:
    """One option of a component: its name, type, default and, if it has one, its range."""

    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def describe(hint: Any) -> str:
    """A type hint in the words of an error message."""
    if hint is Any or hint is inspect.Parameter.empty:
        return "any value"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return f"{describe(arguments[0])} {' '.join(str(extra) for extra in arguments[1:])}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(repr(argument) for argument in arguments)
    if origin in (list, tuple) and arguments:
        return f"a list of {describe(arguments[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def conforms(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type (and lies in the range) that ``hint`` asks for; an integer is also a number."""
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Between)]
        return conforms(value, arguments[0]) and all(value in extra for extra in ranges)
    if origin in (Union, types.UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def options(factory: Callable[..., Any], supplied: Collection[str] = ()) -> dict[str, Option]:
    """The options of a component: its keyword-only parameters, less those that the core supplies by name."""
    function: Any = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        parameter.name: Option(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in supplied
    }


def mistakes(where: str, values: Mapping[str, Any], allowed: Mapping[str, Option]) -> list[str]:
    """Every mistake in ``values`` against the options ``allowed``, one line each."""
    lines = [unknown(f"{where}: option", str(key), allowed) for key in values if key not in allowed]
    for name, option in allowed.items():
        if name in values:
            if not conforms(values[name], option.hint):
                lines.append(wrong(f"{where}: {name}", values[name], describe(option.hint)))
        elif option.required:
            lines.append(f"{where}: option {name!r} is missing; it takes {describe(option.hint)}.")
    return lines
