"""Computes what is proved of every catalogue item; nothing is stored. ``python tests/oracles`` prints it.

Rows first: an objective in float64 against its oracles, value and gradient. Then the same objective as the one term of the real
driver, on two small Llama models of unequal widths and documents of unequal lengths with prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
from torch import Tensor, nn

from distily.conformance.objectives import Rows, Subject
from distily.loss.attention import AttentionScores
from distily.loss.calibration import calibrate
from distily.loss.driver import Driver, local_teacher
from distily.loss.terms import build_terms
from distily.plugins import Plugins
from distily.spec import Component
from oracles.case import Case, Check

ITEMS = [f"{letter}{number}" for letter, count in (("A", 27), ("B", 26), ("C", 4), ("D", 18)) for number in range(1, count + 1)]
"""Every item of the catalogue."""

ON_POLICY = "needs text that the student or the teacher wrote: a later round"
CROSS_TOKENIZER = "compares models with different tokenizers: a later round"
LEFT_OUT = {"A19": CROSS_TOKENIZER, "A20": CROSS_TOKENIZER, "A25": ON_POLICY, "A26": ON_POLICY, "A27": ON_POLICY}
"""Items without a component, and why."""

TOLERANCES = {
    "value": 1e-9,
    "gradient": 1e-8,
    "bf16": 2e-2,
    "masked": 0.0,
    "chunks": 1e-9,
    "micro": 1e-9,
    "equal": 1e-9,
}
"""The largest error allowed in each column, unless the case names its own."""

EXPLAINED = {
    "value": "error in float64 against the oracle, relative to its largest value",
    "gradient": "likewise of the gradient at the student; the oracle's by autograd, or by finite differences where it is not in torch",
    "bf16": "error of the loss with both models in bfloat16, against float64 with the same weights",
    "masked": "change of loss and gradients by NaN at every position without supervision, where there were zeros; exactly 0",
    "chunks": "error in chunks of 1 and 3 rows against all rows at once, loss and gradients",
    "micro": "error of micro-batches against the whole batch, loss and gradients; row sets are one document's",
    "equal": "distance from 0, or from the documented floor, where student and teacher are equal",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: errors by column; a column that makes no sense for the item is not there."""

    item: str
    component: str
    oracles: str
    errors: Mapping[str, float] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def failures(self) -> list[str]:
        """Columns whose error is too large, or NaN."""
        return [column for column, error in self.errors.items() if not error <= self.tolerances[column]]


def cases() -> list[Case | Check]:
    """The cases of every module beside this one, in the order of the catalogue."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    found = [case for name in names for case in getattr(import_module(f"oracles.{name}"), "CASES", [])]
    return sorted(found, key=lambda case: ITEMS.index(case.item))


def table(words: Collection[str] = ()) -> Iterator[Row]:
    """A row for every case, as it is measured, and one for every item that was left out, in the order of the catalogue.

    ``words``: items or components, where not all are wanted.
    """
    everything = cases()
    for item in ITEMS:
        for case in everything:
            if case.item == item and (not words or {item, case.component.partition(":")[0]} & set(words)):
                yield measure(case)
        if item in LEFT_OUT and (not words or item in words):
            yield Row(item, "–", "left out", note=LEFT_OUT[item])


def measure(case: Case | Check, plugins: Plugins | None = None) -> Row:
    """What is proved of one case."""
    if isinstance(case, Check):
        return Row(case.item, case.component, case.oracle, {case.of: case.error()}, {case.of: case.tolerance}, case.note)
    subject = Subject((plugins or tiny.plugins()).find("objectives", case.component), case.options, None)
    component = str(Component(case.component, {**case.options, **case.term}))
    errors = {**on_rows(case, subject), **through_the_driver(case, plugins or tiny.plugins())}
    tolerances = {**TOLERANCES, **case.tolerances}
    ordered = {column: errors[column] for column in TOLERANCES if column in errors}
    return Row(case.item, component, ", ".join(case.oracles), ordered, tolerances, case.note)


# --- rows ---


def on_rows(case: Case, subject: Subject) -> dict[str, float]:
    """Errors of the objective on rows, by column."""
    rows = Rows(*case.rows()) if case.rows else subject.rows(6, 11)
    objective = subject.objective(rows)
    upstream = torch.linspace(0.5, 1.5, len(rows.student), dtype=torch.float64)
    values, gradient = subject.gradient(rows, upstream, objective)
    answers = [asking(oracle, case, rows, objective)(rows.student) for oracle in case.oracles.values()]
    expected = [torch.as_tensor(answer, dtype=torch.float64) for answer in answers]
    found = [values if each.shape == values.shape else values.mean() for each in expected]
    errors = {"value": worst(map(distance, found, expected))}
    slope = oracle_gradient(case, rows, objective, upstream, subject.description.surrogate_gradient)
    if slope is not None:
        errors["gradient"] = distance(gradient, slope)
    if case.floor is not None:
        errors["equal"] = above_floor(case, subject)
    return errors


def asking(oracle: Callable[..., Any], case: Case, rows: Rows, objective: Any) -> Callable[[Tensor], Any]:
    """The oracle as a function of the student: it is given what it names."""
    offered = {**rows.inputs, **case.options, "component": objective}
    parameters = inspect.signature(oracle).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        given = {key: value for key, value in offered.items() if key != "component"}
    else:
        given = {each.name: offered[each.name] for each in list(parameters)[2:] if each.name in offered}
    return lambda student: oracle(student, rows.teacher, **given)


def oracle_gradient(case: Case, rows: Rows, objective: Any, upstream: Tensor, surrogate: bool) -> Tensor | None:
    """The gradient at the student by the first oracle that autograd can follow, else by differences of the first one.

    None where the objective's gradient is by intent not that of its value, and no oracle says what it is.
    """
    asked = [asking(oracle, case, rows, objective) for oracle in case.oracles.values()]

    def weighed(values: Any) -> Tensor:
        values = torch.as_tensor(values, dtype=torch.float64)
        return (values * upstream).sum() if values.dim() else values

    for ask in asked:
        student = rows.student.clone().requires_grad_()
        try:
            total = weighed(ask(student))
        except (RuntimeError, TypeError):  # numpy asks for a tensor without gradient
            continue
        if total.requires_grad:
            return torch.autograd.grad(total, student)[0]
    return None if surrogate else differences(lambda student: weighed(asked[0](student)), rows.student)


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """The gradient by the central difference of fourth order, one entry after the other."""
    gradient = torch.empty_like(at)
    for place in range(at.numel()):
        moved = torch.zeros_like(at)
        moved.view(-1)[place] = step
        near, far = (function(at + k * moved) - function(at - k * moved) for k in (1, 2))
        gradient.view(-1)[place] = (8 * near - far) / (12 * step)
    return gradient


def above_floor(case: Case, subject: Subject) -> float:
    """How far the value is from the floor where the student is the teacher."""
    rows = Rows(*case.rows()) if case.rows else subject.rows(6, 11, equal=True)
    equal = Rows(rows.teacher.clone(), rows.teacher, rows.inputs)
    objective = subject.objective(equal)
    values = subject.values(equal, objective)
    floor = asking(case.floor, case, equal, objective)(equal.student) if callable(case.floor) else case.floor
    expected = torch.as_tensor(floor, dtype=torch.float64)
    return (values.mean() - expected.mean()).abs().item()


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value that was expected (or over 1e-3, where all are smaller)."""
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return (difference / expected.detach().abs().max().clamp(min=1e-3)).item()


def worst(errors: Iterable[float]) -> float:
    """The largest, and NaN where there is one: Python's ``max`` would pass over it."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


# --- the driver ---


@cache
def models(dtype: torch.dtype) -> tuple[Any, Any]:
    """Student and teacher of unequal widths, with weights that bfloat16 holds."""
    shapes = {"dtype": torch.bfloat16, "intermediate_size": 24}
    pair = tiny.model(seed=1, hidden_size=16, **shapes), tiny.model(seed=2, hidden_size=24, **shapes)
    return pair[0].to(dtype), pair[1].to(dtype)


@cache
def batches() -> tuple[list[dict], list[dict]]:
    """Five documents, the last without supervision: as one batch, and as micro-batches of 1, 2 and 2."""
    documents = [*tiny.documents(4), {"input_ids": [5] * 9, "labels": [-100] * 9}]
    return [tiny.collate(documents)], [tiny.collate(part) for part in (documents[:1], documents[1:3], documents[3:])]


@contextmanager
def driven(case: Case, plugins: Plugins, dtype: torch.dtype) -> Iterator[tuple[Driver, Any, Any]]:
    """A driver with the objective as its one term, the student to which it is attached, and the teacher."""
    student, teacher = models(dtype)
    terms = build_terms([Component(case.component, {**case.options, **case.term})], plugins, student, teacher)
    terms = terms.double() if dtype == torch.float64 else terms
    driver = Driver(terms, local_teacher(teacher, terms, tiny.VOCABULARY), tiny.VOCABULARY, chunk_rows=100)
    driver.attach(student)
    try:
        calibrate(driver, batches()[0])
        yield driver, student, teacher
    finally:
        driver.detach()


def through_the_driver(case: Case, plugins: Plugins) -> dict[str, float]:
    """Errors of the objective as a term of the driver, by column."""
    whole, parts = batches()
    with driven(case, plugins, torch.float64) as (driver, student, teacher):
        reference = step(driver, student, whole)
        filled = []
        for value in (0.0, torch.nan):  # the same hooks both times, so that autograd adds up in the same order
            with idle_filled((student, teacher), whole[0]["shift_labels"] == -100, value):
                filled.append(step(driver, student, whole))
        errors = {"masked": gap(filled[1], filled[0])}
        errors["micro"] = gap(step(driver, student, parts), reference)
        chunked = []
        for driver.chunk_rows in (1, 3):
            chunked.append(gap(step(driver, student, whole), reference))
        errors["chunks"] = worst(chunked)
    with driven(case, plugins, torch.bfloat16) as (driver, student, _):
        errors["bf16"] = distance(step(driver, student, whole)[0], reference[0])
    return errors


def step(driver: Driver, student: Any, batch: list[dict]) -> list[Tensor]:
    """The loss of an optimizer step and all gradients."""
    loss, gradients = tiny.accumulate(driver, student, batch, progress=0.25)
    return [loss, *gradients.values()]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of loss and gradients, over the largest value of either kind."""
    assert len(found) == len(expected)
    largest = worst(value.abs().max().item() for value in expected[1:])
    gradients = worst((mine - theirs).abs().max().item() for mine, theirs in zip(found[1:], expected[1:], strict=True))
    return worst([distance(found[0], expected[0]), gradients / max(largest, 1e-12)])


@contextmanager
def idle_filled(networks: Iterable[Any], idle: Tensor, value: float) -> Iterator[None]:
    """Inside, the driver reads ``value`` at the positions ``idle`` (B, S) in the output of every module of the models, in the input
    of their heads, and in the queries of attention scores; in the keys, where no position that is not idle may look.

    The models themselves do not, or a NaN would come back through their attention.
    """
    unseen = (~idle).flip(-1).cumsum(-1).flip(-1) == 0

    def fill(values: Tensor, where: Tensor) -> Tensor:
        return values.masked_fill(where[..., None], value)

    def swapped(module: nn.Module) -> list[Any]:
        """Hooks around those of the driver: the first swaps the module's output for the filled one, the last swaps it back."""
        kept: list[Any] = []

        def swap(module: nn.Module, arguments: Any, output: Any) -> Any:
            kept.append(output)
            is_rows = isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == idle.shape
            return fill(output, idle) if is_rows else output

        first = module.register_forward_hook(swap, prepend=True)
        return [first, module.register_forward_hook(lambda module, arguments, output: kept.pop())]

    def scores(query: Tensor, key: Tensor, scoring: Any) -> AttentionScores:
        return AttentionScores(fill(query, idle[:, None]), fill(key, unseen[:, None]), scoring)

    handles = []
    for network in networks:
        for module in network.modules():
            handles += swapped(module)
        head = network.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda module, arguments: (fill(arguments[0], idle),)))
    try:
        with patch("distily.loss.features.AttentionScores", scores):
            yield
    finally:
        for handle in handles:
            handle.remove()
