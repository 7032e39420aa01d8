"""The checks of the conformance kit for the contract and for objectives; each generator yields a check's name before it.

Letters: n rows, W their width (the vocabulary for logits), H hidden width, B batch, S sequence.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distily.batch import row_seeds, supervise
from distily.errors import DistilyError
from distily.hookspecs import KINDS
from distily.loss.driver import Driver
from distily.loss.terms import Term
from distily.mappings import LayerMapping
from distily.objectives import DRIVER_INPUTS, SITES, Description
from distily.plugins import Offered
from distily.schema import conforms, describe, mistakes
from distily.state import Calibrated
from distily.teachers import LocalTeacher

WIDTH, VOCABULARY, TOKENS = 7, 11, 9
SUPPLIED = {"objectives": (2,), "layer_mappers": (2,), "projectors": (2,), "normalizers": (1,)}
CONSTRUCTED = {"objectives": (0, 2), "layer_mappers": (2,), "projectors": (2,), "normalizers": (1,), "combiners": (1,)}
"""How many positional parameters the core fills, for functions and for the constructors of classes."""


def require(condition: Any, seen: str) -> None:
    """Fails with one line of what was seen."""
    if not condition:
        raise AssertionError(seen)


def close(found: Tensor, expected: Tensor, tolerance: float, seen: str) -> None:
    """Fails where two tensors differ by more than ``tolerance`` of the largest entry, or of 1; a NaN differs."""
    difference = (found.double() - expected.double()).abs().max().item()
    require(difference <= tolerance * max(1.0, expected.abs().max().item()), f"{seen} (the difference is {difference:.2g})")


@dataclass(frozen=True)
class Rows:
    """Rows ``(n, W)`` of student and teacher, and the inputs that the driver would fill."""

    student: Tensor
    teacher: Tensor
    inputs: Mapping[str, Any]

    @classmethod
    def random(cls, n: int, student: tuple[int, ...], teacher: tuple[int, ...], scale: float = 2.0) -> Rows:
        """Random rows of these shapes, n of them."""
        generator = torch.Generator().manual_seed(n)
        mine, theirs = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) * scale for shape in (student, teacher))
        inputs = {key: torch.randint(student[-1], (n,), generator=generator) for key in ("labels", "input_ids")}
        inputs |= {"sequence_ids": torch.zeros(n, dtype=torch.long), "row_seeds": torch.arange(n)}
        return cls(mine, theirs, {**inputs, "progress": 0.25})

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        inputs = {key: change(value) if isinstance(value, Tensor) else value for key, value in self.inputs.items()}
        return Rows(change(self.student), change(self.teacher), inputs)

    def to(self, dtype: torch.dtype) -> Rows:
        return self.map(lambda value: value.to(dtype) if value.is_floating_point() else value)


class Subject:
    """The component that is checked, with its options."""

    def __init__(self, entry: Offered, options: Mapping[str, Any], reference: Callable[..., Any] | None) -> None:
        self.entry, self.options, self.reference = entry, options, reference
        self.where = f"{KINDS[entry.kind]} {entry.name}"
        self.description: Description = getattr(entry.factory, "description", None)  # type: ignore[assignment]
        self.in_sets = self.description is not None and self.description.granularity == "row_set"

    def make(self) -> Any:
        """The component, from the same seed every time."""
        torch.manual_seed(0)
        return self.entry.build(self.options)

    def rows(self, n: int = 5, width: int = WIDTH, scale: float = 2.0, equal: bool = False) -> Rows:
        """Random rows of the shape that the objective is for; ``equal``: of one width, where it would take two."""
        lead: tuple[int, ...] = (3,) if self.description.stacked or self.description.on == ("attentions",) else ()
        other = width if equal or self.description.equal_widths or "logits" in self.description.on else width + 2
        return Rows.random(n, (*lead, width), (*lead, other), scale)

    def objective(self, rows: Rows) -> Any:
        """The objective for these rows: of their widths, on their device, in their type."""
        made = self.make()
        if isinstance(self.entry.factory, type) and self.entry.from_core:
            made = made(rows.student.shape[-1], rows.teacher.shape[-1])
        if isinstance(made, Calibrated):
            seen = Rows.random(32, tuple(rows.student.shape[1:]), tuple(rows.teacher.shape[1:]))
            given = {key: seen.inputs[key] for key in self.description.inputs}
            made.observe(seen.student.float(), seen.teacher.float(), **given)
            made.conclude()
        return made.to(rows.student.device, rows.student.dtype) if isinstance(made, nn.Module) else made

    def values(self, rows: Rows, objective: Any = None) -> Tensor:
        """The objective's values on ``rows``, ``(n,)``."""
        objective = objective or self.objective(rows)
        given = {key: rows.inputs[key] for key in self.description.inputs}
        torch.manual_seed(0)
        return objective(rows.student, rows.teacher if self.description.needs_teacher else None, **given)

    def gradient(self, rows: Rows, upstream: Tensor | None = None, objective: Any = None) -> tuple[Tensor, Tensor]:
        """The values, and the student's gradient of Σ upstream · value (for a set of the mean, which is its value)."""
        student = rows.student.clone().requires_grad_()
        values = self.values(Rows(student, rows.teacher, rows.inputs), objective)
        require(values.requires_grad, "the values are detached from the student")
        upstream = torch.ones_like(values) / len(values) if upstream is None or self.in_sets else upstream
        (gradient,) = torch.autograd.grad(values, student, upstream, allow_unused=True)
        require(gradient is not None, "the values do not depend on the student")
        return values.detach(), gradient


def contract(subject: Subject) -> Iterator[str]:
    """What the core supplies is positional, options are keyword-only with defaults of their type, objectives are decorated."""
    yield "contract"
    factory, kind = subject.entry.factory, subject.entry.kind
    allowed = SUPPLIED.get(kind, (0,)) if not isinstance(factory, type) else CONSTRUCTED.get(kind, (0,))
    calls: list[tuple[Any, tuple[int, ...]]] = [(factory, allowed)]
    if kind == "objectives":
        require(isinstance(subject.description, Description), "it has neither @token_objective nor @row_set_objective")
        on = subject.description.on
        require(on and set(on) <= set(SITES), f"on is {on}; allowed: some of {', '.join(SITES)}")
        calls += [(factory.forward, (3,))] if isinstance(factory, type) else []  # type: ignore[attr-defined]
    for call, counts in calls:
        bare = isinstance(call, type) and call.__init__ is nn.Module.__init__  # type: ignore[misc]
        if bare:
            continue
        parameters = inspect.signature(call).parameters.values()
        names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        allowed_counts = " or ".join(map(str, counts))
        require(len(names) in counts, f"it takes {names} by position, not {allowed_counts} arguments; options are keyword-only")
        swallowing = [str(each) for each in parameters if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        require(not swallowing, f"{swallowing} would swallow unknown options")
        own = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in DRIVER_INPUTS]
        require(call is factory or not own, f"forward takes {own}, which nobody fills; options belong to __init__")
    for option in subject.entry.options.values():
        fits = option.required or conforms(option.default, option.hint)
        require(fits, f"the default {option.default!r} of option {option.name!r} is not {describe(option.hint)}")
    if lines := mistakes(subject.where, subject.options, subject.entry.options):
        raise DistilyError("\n".join(lines))
    subject.make()


def numbers(subject: Subject) -> Iterator[str]:
    """Values and gradients of an objective on rows."""
    yield "shape"
    for n in (1, 2, 5):
        values = subject.values(subject.rows(n))
        require(values.shape == (n,), f"{n} rows gave shape {tuple(values.shape)}, not ({n},)")
    yield "dtype"
    for dtype in (torch.float32, torch.float64):
        found = subject.values(subject.rows().to(dtype)).dtype
        require(found == dtype, f"{dtype} came back as {found}")
    yield "arguments kept"
    rows = subject.rows()
    kept, objective = rows.map(torch.clone), subject.objective(rows)
    with torch.no_grad():
        values = subject.values(rows, objective).clone()
        again = subject.values(kept.map(torch.clone), objective)
    now, before = ({"student": each.student, "teacher": each.teacher, **each.inputs} for each in (rows, kept))
    changed = [key for key in now if key != "progress" and not torch.equal(now[key], before[key])]
    require(not changed, f"it changed {', '.join(changed)} in place")
    close(again, values, 1e-12, "a second call on the same rows gave other values")
    yield "precision"
    rows = subject.rows(16, 97).to(torch.bfloat16)
    single, double = (subject.values(rows.to(dtype)) for dtype in (torch.float32, torch.float64))
    close(single, double, 1e-4, "float32 is far from float64 on values that bfloat16 holds")
    yield "gradient"
    rows, generator = subject.rows(4), torch.Generator().manual_seed(1)
    upstream = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    _, gradient = subject.gradient(rows, upstream)
    upstream = torch.full_like(upstream, 0.25) if subject.in_sets else upstream
    require((gradient != 0).any(), "the gradient at the student is 0")
    for _ in range(0 if subject.description.surrogate_gradient else 4):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = [subject.values(Rows(rows.student + step * direction, rows.teacher, rows.inputs)) for step in (1e-5, -1e-5)]
        expected, slope = ((ends[0] - ends[1]) @ upstream / 2e-5).item(), (gradient * direction).sum().item()
        allowed = (1e-2 if subject.in_sets else 1e-5) * (gradient.norm() * direction.norm()).item()  # solvers stop early
        require(abs(slope - expected) <= allowed, f"autograd gives {slope:.6g}, finite differences give {expected:.6g}")
    yield "finite"  # where probabilities underflow, too, and for a student copied from its teacher
    usual = subject.rows()
    equal = subject.rows(equal=True)
    equal = Rows(equal.teacher.clone(), equal.teacher, equal.inputs)
    cases = {"usual rows": usual, "one row alone": subject.rows(1), "rows around 100": subject.rows(scale=100.0)}
    for what, rows in {**cases, "a student equal to its teacher": equal}.items():
        for which, part in zip(("value", "gradient"), subject.gradient(rows.to(torch.float32)), strict=True):
            require(part.isfinite().all(), f"{what}: a {which} is not finite")


def relations(subject: Subject) -> Iterator[str]:
    """Of rows to each other, of student to teacher, of the objective to its reference and to the device."""
    pool = subject.rows(10)
    rows, order = pool.map(lambda value: value[:5]), torch.tensor([3, 0, 4, 1, 2])
    values, moved = subject.values(rows), subject.values(rows.map(lambda value: value[order]))
    yield "rows"
    if subject.in_sets:
        close(moved.mean(), values.mean(), 1e-4, "the set in another order has another mean")
    else:
        close(moved, values[order], 1e-9, "rows in another order did not give their values in that order")
        close(subject.values(rows.map(lambda value: value[:2])), values[:2], 1e-9, "the first two rows alone gave other values")
        for changed in range(5):
            kept = torch.arange(5) != changed
            index = torch.arange(5) + 5 * ~kept
            mixed = subject.values(pool.map(lambda value: value[index]))  # noqa: B023
            close(mixed[kept], values[kept], 1e-9, f"a change of row {changed} changed the value of another row")
            elsewhere = subject.gradient(rows, (~kept).double())[1][kept]
            require((elsewhere == 0).all(), f"the value of row {changed} has a gradient in another row")
    if subject.description.needs_teacher:
        yield "teacher"
        other = subject.values(Rows(rows.student, pool.teacher[5:], rows.inputs))
        require(not torch.equal(values, other), "another teacher gave the same values; needs_teacher=False says so")
    if subject.description.zero_at_equality and not subject.options:  # the description is of the default options
        yield "equality"
        alike = subject.rows(equal=True)
        equal = subject.values(Rows(alike.teacher.clone(), alike.teacher, alike.inputs))
        worst = (equal.mean() if subject.in_sets else equal).abs().max().item()
        require(worst <= 1e-6, f"a student equal to its teacher gave {worst:.4g}, not 0; zero_at_equality=False says so")
        mean = values.mean().item()
        require(mean > 0, f"0 at equality but {mean:.4g} on random rows: training would lead away from the teacher")
    if subject.reference is not None:
        yield "reference"
        given = {key: rows.inputs[key] for key in subject.description.inputs}
        expected = torch.as_tensor(subject.reference(rows.student, rows.teacher, **given, **subject.options), dtype=torch.float64)
        found = values if expected.shape == values.shape else values.mean()
        first = [f"{side.reshape(-1)[0].item():.6g}" for side in (found, expected)]
        close(found, expected, 1e-3 if subject.in_sets else 1e-7, f"it gave {first[0]} where the reference gave {first[1]}")
    yield "no host synchronisation"
    for device in ["meta", *(["cuda"] if torch.cuda.is_available() else [])]:
        placed = rows.to(torch.float32).map(lambda value: value.to(device))  # noqa: B023
        objective = subject.objective(placed)
        subject.gradient(placed, objective=objective)
        if device == "cuda" and not subject.description.waits:  # once more, now that everything is set up
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                subject.gradient(placed, objective=objective)
            finally:
                torch.cuda.set_sync_debug_mode(mode)


class _Positions(nn.Module):
    """A causal language model in shape only: its parameter ``states`` (B, S, H) is its input, and each position is by itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=1, hidden_size=WIDTH, num_attention_heads=1)
        self.config.get_text_config = lambda: self.config
        torch.manual_seed(seed)
        self.states = nn.Parameter(torch.randn(2, TOKENS, WIDTH))
        layers = OrderedDict[str, nn.Module]((name, nn.Linear(WIDTH, WIDTH)) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        self.blocks = nn.ModuleList([nn.Sequential(layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def at(self, site: str, places: Any) -> Tensor:
        """What a term on ``site`` reads at the positions ``places``, ``(n, W)``."""
        depth = {"queries": 1, "keys": 2, "values": 3}.get(site, 4)
        hidden = self.blocks[0][:depth](self.states[places])  # type: ignore[index]
        return self.head(hidden) if site == "logits" else hidden

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks[0](self.states))}


def through_the_driver(subject: Subject) -> Iterator[str]:
    """Loss and gradients of the driver, in chunks of any size, are those of all supervised rows at once."""
    yield "chunks"
    _compare_with_the_driver(subject, 0.0)
    yield "unsupervised"  # positions with NaN
    _compare_with_the_driver(subject, float("nan"))


def _compare_with_the_driver(subject: Subject, unsupervised: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(VOCABULARY, (2, TOKENS), generator=generator) for _ in range(2))
    labels[0, :3], labels[1, 5] = -100, -100
    supervision = supervise({"input_ids": tokens, "labels": labels})
    seeds = torch.zeros(2 * TOKENS, dtype=torch.long).index_copy(0, supervision.index, row_seeds(supervision, 0)).view(2, TOKENS)
    everywhere = [(b, s) for b in range(2) for s in range(TOKENS - 1) if labels[b, s + 1] != -100]
    groups = [[place for place in everywhere if place[0] == b] for b in range(2)] if subject.in_sets else [everywhere]
    for site in set(subject.description.on) - {"logit_lens", "attentions"}:  # the toy has neither norm nor attention
        student, teacher = _Positions(1), _Positions(2)
        for model in (student, teacher):
            idle = torch.ones(2, TOKENS, dtype=torch.bool)
            idle[tuple(zip(*everywhere, strict=True))] = False
            model.states.data[idle] = unsupervised
        objective = subject.objective(subject.rows(equal=True))
        own = objective.parameters() if isinstance(objective, nn.Module) else ()
        trained = [student.states, student.head.weight, *(parameter for parameter in own if parameter.requires_grad)]
        total = torch.zeros(())
        for group in groups:
            b, s = torch.tensor(group).unbind(1)
            inputs = {"labels": labels[b, s + 1], "input_ids": tokens[b, s], "sequence_ids": b, "row_seeds": seeds[b, s]}
            mine, theirs = student.at(site, (b, s)), teacher.at(site, (b, s)).detach()
            if subject.description.stacked:
                mine, theirs = torch.stack([mine, mine], 1), torch.stack([theirs, theirs], 1)
            rows = Rows(mine, theirs, {**inputs, "progress": 0.25})
            total = total + subject.values(rows, objective).sum() / len(everywhere)
        expected = [total, *torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)]
        pairs = [] if site == "logits" else [(1, 1)] * (2 if subject.description.stacked else 1)
        term = Term("checked", objective, subject.description, site=site, mapping=LayerMapping(pairs))
        source = LocalTeacher(teacher, VOCABULARY, term.teacher_features)
        for size in (1, 3, 100):
            driver = Driver(nn.ModuleDict({"checked": term}), source, VOCABULARY, chunk_rows=size)
            driver.attach(student)
            with driver.step({"input_ids": tokens, "labels": labels}, progress=0.25):
                loss = student()["loss"]
            driver.detach()
            found = [loss, *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]
            for what, mine, whole in zip(("loss", *["gradient"] * len(trained)), found, expected, strict=True):
                close(mine, whole, 1e-6, f"on {site} in chunks of {size} rows the {what} is not that of all rows at once")
