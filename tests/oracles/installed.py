"""What is under test, by its name: the only door from an oracle's module to a component."""

from __future__ import annotations

from typing import Any

import tiny

from distily.spec import Component


def component(kind: str, name: str, **options: Any) -> Any:
    """The component of this kind and name with these options, as the core builds it."""
    return tiny.plugins().build(kind, Component(name, options))
