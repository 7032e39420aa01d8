"""A component in words: ``{name: …, option: …}`` in YAML, ``name:option=value,option=value`` on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from distily.errors import DistilyError


class Yaml(yaml.SafeLoader):
    """YAML as people mean it (and as YAML 1.2 says): ``on`` is a word, ``1e-4`` a number."""


_BOOLEAN, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|false|True|False|TRUE|FALSE)$"), list("tTfF"))
Yaml.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=Yaml)


OPENING, CLOSING = "([{", ")]}"
NESTED = re.compile(r"([A-Za-z_][\w-]*)\((.*)\)", re.DOTALL)
FORM = 'name or name:option=value,option=value, such as "cosine:mapper=last_k(k=2),weight=0.3"'


@dataclass(frozen=True)
class Component:
    """A named component and its options; an option's value may be a component again."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}:{','.join(f'{key}={written(value)}' for key, value in self.options.items())}"


def written(value: Any) -> str:
    """An option's value as the command line takes it."""
    if isinstance(value, Component):
        inner = ",".join(f"{key}={written(item)}" for key, item in value.options.items())
        return f"{value.name}({inner})" if inner else value.name
    if isinstance(value, (list, tuple)):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def parse_component(value: Any, key: str) -> Component:
    """A component from a text or a mapping. ``key`` is where it stands, named in the ``DistilyError`` of a bad form."""
    if isinstance(value, Component):
        return value
    if isinstance(value, Mapping):
        options = {
            "on" if option is True else option: item for option, item in value.items()
        }  # a mapping from another reader, of YAML 1.1
        name = options.pop("name", None)
        if not isinstance(name, str) or not name:
            raise DistilyError(f"{key}: {dict(value)!r} has no name; allowed: {{name: …, option: …}}.")
        return Component(name, {option: _nested(item, key) for option, item in options.items()})
    if not isinstance(value, str) or not value.strip():
        raise DistilyError(f"{key}: {value!r} is not allowed; allowed: {FORM}.")
    name, _, rest = value.strip().partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise DistilyError(f"{key}: {value!r} is not allowed; allowed: {FORM}.")
    return Component(name, _options(rest, key))


def _nested(value: Any, key: str) -> Any:
    """A mapping with a name inside a mapping is a component; a text with parentheses is one too."""
    if isinstance(value, Mapping) and "name" in value:
        return parse_component(value, key)
    if isinstance(value, str) and NESTED.fullmatch(value.strip()):
        return _value(value, key)
    return value


def _options(text: str, key: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in _split(text, key):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise DistilyError(f"{key}: {part!r} is not allowed; allowed: option=value.")
        if name.strip() in options:
            raise DistilyError(f"{key}: option {name.strip()!r} is given twice.")
        options[name.strip()] = _value(value, key)
    return options


def _value(text: str, key: str) -> Any:
    match = NESTED.fullmatch(text.strip())
    if match:
        return Component(match[1], _options(match[2], key))
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise DistilyError(f"{key}: {text!r} is not a value; allowed: a YAML scalar or list.") from error


def _split(text: str, key: str) -> Iterator[str]:
    """The parts of ``text`` between commas that stand outside every bracket."""
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if depth < 0:
            break
        if character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise DistilyError(f"{key}: the brackets in {text!r} do not match.")
    if text.strip():
        yield text[start:]
