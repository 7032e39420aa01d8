"""The whole table of ``python tests/oracles``, asserted; that it has every item and component; that it can fail; what oracles share."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles.case import Case, Check
from oracles.measure import ITEMS, LEFT_OUT, TOLERANCES, batches, cases, driven, idle_filled, measure, step

from distily.objectives import token_objective
from distily.plugins import Offered, Package, Plugins

ORACLES = Path(__file__).parent / "oracles"
ROOT = Path(__file__).parent.parent
ENGINE = ("__init__", "__main__", "case", "installed", "measure")
KINDS = ("objectives", "layer_mappers", "projectors", "normalizers", "combiners")
CASES = cases()


def named(case: Case | Check) -> str:
    return f"{case.item}-{case.component}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_it_computes_what_it_says(case: Case | Check) -> None:
    row = measure(case)
    assert row.errors
    assert {column: row.errors[column] for column in row.failures} == {}


# --- nothing is missing ---


def test_every_item_of_the_catalogue_has_a_row() -> None:
    assert set(ITEMS) - {case.item for case in CASES} == set(LEFT_OUT)


def test_every_built_in_component_of_a_loss_has_a_row() -> None:
    built_in = [package for package in tiny.plugins().packages if package.distribution == "distily"]
    offered = {entry.name for package in built_in for entry in package.components if entry.kind in KINDS}
    assert offered - {case.component.partition(":")[0] for case in CASES} == set()


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, Case)], ids=named)
def test_a_column_is_left_out_for_a_reason(case: Case) -> None:
    assert case.oracles
    assert case.floor is not None or case.note
    assert case.note or not case.tolerances


# --- each column can fail ---


@token_objective
def squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().mean(-1)


@token_objective
def of_the_batch(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Breaks its promise: every row depends on all."""
    return squared(student, teacher) * student.std()


@token_objective
def rounded(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cancels: the difference is lost beside a large number."""
    return ((student + 1e7) - (teacher + 1e7)).square().mean(-1)


@token_objective
def detached(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return squared(student, teacher) + (student - student.detach()).sum(-1)


@token_objective
def undefined(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return squared(student, teacher) * torch.nan


WRONG = {each.__name__: each for each in (squared, of_the_batch, rounded, detached, undefined)}


def failures(name: str, oracle: Callable[..., Any], **facts: Any) -> list[str]:
    entries = tuple(Offered("objectives", key, factory, "wrong") for key, factory in WRONG.items())
    plugins = Plugins((*tiny.plugins().packages, Package("wrong", "wrong", "wrong", "0", entries)))
    return measure(Case("A14", name, {"oracle": oracle}, **facts), plugins).failures


def test_a_right_objective_has_no_failure() -> None:
    assert failures("squared", lambda s, t: (s - t).square().mean(-1)) == []
    assert failures("squared", lambda s, t: (s - t).numpy().__pow__(2).mean(-1)) == []


def test_a_wrong_formula_is_seen() -> None:
    assert failures("squared", lambda s, t: (s - t).square().mean(-1) * (1 + 1e-7)) == ["value", "gradient"]
    assert failures("squared", lambda s, t: ((s - t).numpy() ** 2).mean(-1) * (1 + 1e-6)) == ["value", "gradient"]


def test_a_wrong_gradient_is_seen() -> None:
    assert failures("detached", lambda s, t: (s - t).square().mean(-1)) == ["gradient"]


def test_rows_that_depend_on_each_other_are_seen() -> None:
    assert failures("of_the_batch", lambda s, t: (s - t).square().mean(-1) * s.std()) == ["chunks", "micro"]


def test_a_value_that_is_no_number_is_seen_everywhere() -> None:
    assert failures("undefined", lambda s, t: (s - t).square().mean(-1)) == list(TOLERANCES)


def test_lost_precision_is_seen() -> None:
    assert "bf16" in failures("rounded", lambda s, t: (s - t).square().mean(-1), tolerances={"value": 1, "gradient": 1})


def test_a_wrong_floor_is_seen() -> None:
    assert failures("squared", lambda s, t: (s - t).square().mean(-1), floor=0.1) == ["equal"]


@pytest.mark.parametrize("spec", ["forward_kl", "mse", "mse:on=queries", "mse:on=attention_outputs", "attention_kl"])
def test_nan_where_there_is_supervision_reaches_the_loss(spec: str) -> None:
    """So what ``idle_filled`` writes is what the driver reads."""
    name, _, site = spec.partition(":on=")
    case = Case("A1", name, {}, term={"on": site} if site else {})
    (batch,), _ = batches()
    with driven(case, tiny.plugins(), torch.float64) as (driver, student, teacher):
        assert step(driver, student, [batch])[0].isfinite()
        everywhere = torch.ones_like(batch["shift_labels"], dtype=torch.bool)
        with idle_filled((student, teacher), everywhere, torch.nan):
            assert step(driver, student, [batch])[0].isnan()


# --- oracles share no code with what they judge ---


def reached(function: Any, seen: dict[int, Any] | None = None) -> dict[int, Any]:
    """What a function of the oracles names in its code: functions, modules and imports, and what those functions name."""
    seen = {} if seen is None else seen
    function = function.func if isinstance(function, partial) else function
    if id(function) in seen:
        return seen
    seen[id(function)] = function
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("oracles"):
        return seen
    named = [cell.cell_contents for cell in function.__closure__ or ()] + list(function.__defaults__ or ())
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]  # functions and lambdas inside
        for each in dis.get_instructions(code):
            named += [function.__globals__.get(each.argval)] if each.opname == "LOAD_GLOBAL" else []
            named += [each.argval] if each.opname == "IMPORT_NAME" else []
    for value in named:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]:
            reached(each, seen)
    return seen


def of_distily(value: Any) -> bool:
    """Whether a name that was reached belongs to the core or a plugin."""
    module = value if isinstance(value, str) else getattr(value, "__module__", None) or getattr(value, "__name__", "")
    return str(module).partition(".")[0].partition("_")[0] == "distily"


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, Case)], ids=named)
def test_an_oracle_reaches_no_function_of_distily(case: Case) -> None:
    functions = [*case.oracles.values(), *([case.floor] if callable(case.floor) else [])]
    assert [value for function in functions for value in reached(function).values() if of_distily(value)] == []


def test_a_shared_function_would_be_found() -> None:
    import distily_divergences

    def shared(student: Any, teacher: Any) -> Any:
        return distily_divergences.forward_kl(student, teacher)

    def imported(student: Any, teacher: Any) -> Any:
        def inside() -> Any:
            from distily_divergences import forward_kl

            return forward_kl

        return inside()(student, teacher)

    for function in (shared, imported, partial(shared, 1)):
        getattr(function, "func", function).__module__ = "oracles.x"
        assert any(of_distily(value) for value in reached(function).values())


def bodies(paths: Iterator[Path]) -> dict[str, str]:
    """Functions of at least two statements by their code, without names, docstrings and annotations."""
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if len(body) > 1:
                    found["\n".join(ast.unparse(statement) for statement in body)] = f"{path.stem}.{node.name}"
    return found


def test_no_oracle_is_a_copy_of_the_code_it_judges() -> None:
    oracles = bodies(path for path in ORACLES.glob("*.py") if path.stem not in ENGINE)
    judged = bodies(path for folder in ("plugins", "distily") for path in (ROOT / folder).rglob("*.py"))
    assert {oracles[body]: judged[body] for body in oracles.keys() & judged.keys()} == {}


@pytest.mark.parametrize("path", [path for path in ORACLES.glob("*.py") if path.stem not in ENGINE], ids=lambda path: path.stem)
def test_modules_of_oracles_import_the_engine_alone(path: Path) -> None:
    """At module level; a ``Check`` calls the component that it checks, which it imports inside its function."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert [name for name in names if name.partition(".")[0].partition("_")[0] == "distily"] == []
