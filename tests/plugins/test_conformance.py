"""Every component that is installed, of every kind and from whatever package, keeps its contract."""

from __future__ import annotations

from typing import Any

import pytest

from distily.errors import DistilyError
from distily.plugins import Offered, load
from distily.testing import (
    check_combiner,
    check_evaluator,
    check_layer_mapper,
    check_logger,
    check_normalizer,
    check_objective,
    check_projector,
    check_quantizer,
)

CHECKS: dict[str, Any] = {
    "objectives": check_objective,
    "layer_mappers": check_layer_mapper,
    "projectors": check_projector,
    "normalizers": check_normalizer,
    "combiners": check_combiner,
    "quantizers": check_quantizer,
    "evaluators": check_evaluator,
    "loggers": check_logger,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{"beta": 0.1, "normalize": "beta"}],
    "sinkhorn": [{"value": "plan_cost"}, {"value": "dual", "rho": 1.0}],
    "index": [{"pairs": [[1, 2], [-1, -1]]}],
    "last_k": [{"k": 2}],
    "penultimate_k": [{"k": 2}],
    "linear": [{"bias": True}],
    "pca": [{"frozen": True}],
    "least_squares": [{"frozen": True}],
    "whiten": [{"method": "cholesky"}],
    "ternary": [{"warmup": 0.0}, {"warmup": 1.0, "skip": ["o_proj"]}],
}
"""Options besides the defaults, by component."""

PLUGINS = load()
CASES = [
    pytest.param(entry, options, id=f"{entry.kind}-{entry.name}{'-' + str(number) if number else ''}")
    for package in PLUGINS.packages
    for entry in package.components
    for number, options in enumerate([{}, *VARIANTS.get(entry.name, [])])
]


def test_no_plugin_is_broken() -> None:
    assert [f"{package.name}: {package.error}" for package in PLUGINS.broken] == []


@pytest.mark.parametrize(("entry", "options"), CASES)
def test_component(entry: Offered, options: dict[str, Any]) -> None:
    missing = [option.name for option in entry.options.values() if option.required and option.name not in options]
    if missing:
        pytest.skip(f"option {missing[0]!r} has no default")
    try:
        passed = CHECKS[entry.kind](entry.factory, **options)
    except DistilyError as error:
        pytest.skip(str(error))
    assert "contract" in passed
    assert len(passed) > 1
    if entry.kind == "objectives":
        assert {"gradient", "rows", "chunks", "unsupervised", "no host synchronisation"} <= set(passed)
