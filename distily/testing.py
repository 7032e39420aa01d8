"""The conformance kit: what every kind of component promises, checked in seconds on a CPU, without downloads.

    def test_tvd():
        check_objective(tvd, reference=my_own_tvd, temperature=2.0)

Every ``check_…`` takes a factory and its options and returns the names of the checks that passed. A check that fails raises
``AssertionError`` with one line: the component, the check, what was seen. ``distily plugins check NAME`` checks a whole plugin.

Letters: n rows, W their width (the vocabulary for logits), N supervised tokens, H hidden width, B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distily.driver import Driver
from distily.errors import DistilyError, RunError, unknown
from distily.evaluation import EvaluationContext, Evaluator, measure
from distily.hookspecs import KINDS, Factory
from distily.layers import layer_pairs
from distily.loggers import Logger
from distily.objectives import DRIVER_INPUTS, SITES, Description
from distily.plugins import Offered, Plugins
from distily.quantization import Quantizer
from distily.schema import conforms, describe, mistakes
from distily.teachers import LocalTeacher
from distily.terms import Term

WIDTH, VOCABULARY, TOKENS = 7, 11, 9
SUPPLIED = {"objectives": 2, "layer_mappers": 2, "projectors": 2, "normalizers": 1}
"""Positional parameters that the core fills, for functions; the other kinds are classes, which take none."""


def check_objective(factory: Factory, *, reference: Callable[..., Any] | None = None, **options: Any) -> list[str]:
    """Checks an objective. ``reference``: an independent implementation, called with the same float64 rows, inputs and options;
    it returns the rows' values, or a row set's mean. Without one, a wrong formula and swapped arguments go unnoticed.

    That an objective never waits for the device is checked on ``meta``, a device whose values nobody can read, and, where there
    is a GPU, there too. So an objective may have a solver of its own for the CPU, as long as other devices do not come to it.
    """
    return _check("objectives", factory, options, reference=reference)


def check_layer_mapper(factory: Factory, **options: Any) -> list[str]:
    """Checks a layer mapper at several depths; a depth may be refused by ``ValueError``."""
    return _check("layer_mappers", factory, options)


def check_projector(factory: Factory, **options: Any) -> list[str]:
    """Checks a projector at equal and unequal widths; widths may be refused by ``ValueError``."""
    return _check("projectors", factory, options)


def check_normalizer(factory: Factory, **options: Any) -> list[str]:
    """Checks a normalizer, also on a row of zeros."""
    return _check("normalizers", factory, options)


def check_quantizer(factory: Factory, **options: Any) -> list[str]:
    """Checks a quantizer on a tiny Llama: what it keeps, that it trains, that it holds no state, its export."""
    return _check("quantizers", factory, options)


def check_evaluator(factory: Factory, **options: Any) -> list[str]:
    """Checks an evaluator on a tiny Llama, with a teacher and without."""
    return _check("evaluators", factory, options)


def check_logger(factory: Factory, **options: Any) -> list[str]:
    """Checks a logger through a run and through one that fails before it starts."""
    return _check("loggers", factory, options)


def check_package(plugins: Plugins, name: str) -> Iterator[str]:
    """Checks every component of an installed plugin with its default options, and yields a line for each.

    Raises ``DistilyError`` for an unknown plugin and ``RunError``, one line for each failure, at the end.
    """
    package = next((entry for entry in plugins.packages if entry.name == name), None)
    if package is None:
        raise DistilyError(unknown("plugin", name, [entry.name for entry in plugins.packages]))
    if package.error or not package.components:
        raise RunError(f"plugin {name}: {package.error or 'it offers no component'}.")
    failures = []
    for entry in package.components:
        where = f"{KINDS[entry.kind]} {entry.name}"
        missing = [option.name for option in entry.options.values() if option.required]
        try:
            if missing:
                raise DistilyError(f"option {missing[0]!r} has no default; a test can give one to distily.testing.")
            yield f"{where}: {len(_check(entry.kind, entry.factory, {}, entry.name))} checks passed"
        except DistilyError as error:
            yield f"{where}: not checked: {error}"
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        raise RunError("\n".join(failures))


def _check(kind: str, factory: Factory, given: Mapping[str, Any], name: str = "", reference: Any = None) -> list[str]:
    """Runs the checks of a kind. Raises ``DistilyError`` for wrong options and for a component that cannot work here."""
    entry = Offered(kind, name or getattr(factory, "__name__", str(factory)), factory, "")
    where = f"{KINDS[kind]} {entry.name}"
    subject = _Subject(entry, given, reference)
    passed: list[str] = []
    for check in (_contract, *CHECKS[kind]):
        label = check.__name__.strip("_").replace("_", " ")
        try:
            with _one_thread():
                passed += [] if check(subject) is False else [label]
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            seen = reason if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {reason}"
            raise AssertionError(f"{where}: {label}: {seen}") from error
        if check is _contract:
            if lines := mistakes(where, given, entry.options):
                raise DistilyError("\n".join(lines))
            subject.make()
    return passed


def _require(condition: Any, seen: str) -> None:
    if not condition:
        raise AssertionError(seen)


def _close(found: Tensor, expected: Tensor, tolerance: float, seen: str) -> None:
    """Fails where two tensors differ by more than ``tolerance`` of the largest entry, or of 1; a NaN differs."""
    difference = (found.double() - expected.double()).abs().max().item()
    _require(difference <= tolerance * max(1.0, expected.abs().max().item()), f"{seen} (the difference is {difference:.2g})")


@dataclass(frozen=True)
class _Rows:
    """Rows ``(n, W)`` of student and teacher, and the inputs that the driver would fill."""

    student: Tensor
    teacher: Tensor
    inputs: Mapping[str, Any]

    @classmethod
    def random(cls, n: int = 5, width: int = WIDTH, scale: float = 2.0) -> _Rows:
        generator = torch.Generator().manual_seed(n)
        student, teacher = (torch.randn(n, width, generator=generator, dtype=torch.float64) * scale for _ in range(2))
        labels, tokens = (torch.randint(width, (n,), generator=generator) for _ in range(2))
        sequence_ids = torch.zeros(n, dtype=torch.long)
        return cls(student, teacher, {"labels": labels, "input_ids": tokens, "sequence_ids": sequence_ids, "progress": 0.25})

    def map(self, change: Callable[[Tensor], Tensor]) -> _Rows:
        inputs = {key: change(value) if isinstance(value, Tensor) else value for key, value in self.inputs.items()}
        return _Rows(change(self.student), change(self.teacher), inputs)

    def mixed(self, other: _Rows, kept: Tensor) -> _Rows:
        """These rows where ``kept`` (n,) is true, and those of ``other`` elsewhere."""
        tensors = {key: torch.where(kept, self.inputs[key], other.inputs[key]) for key in ("labels", "input_ids")}
        sides = [torch.where(kept[:, None], *both) for both in ((self.student, other.student), (self.teacher, other.teacher))]
        return _Rows(sides[0], sides[1], {**self.inputs, **tensors})

    def to(self, dtype: torch.dtype) -> _Rows:
        return self.map(lambda value: value.to(dtype) if value.is_floating_point() else value)


@dataclass(frozen=True)
class _Subject:
    """The component that is checked."""

    entry: Offered
    options: Mapping[str, Any]
    reference: Callable[..., Any] | None

    @property
    def description(self) -> Description:
        return self.entry.factory.description  # type: ignore[attr-defined]

    @property
    def in_sets(self) -> bool:
        return self.description.granularity == "row_set"

    def make(self) -> Any:
        """The component, from the same seed every time."""
        with _seeded():
            return self.entry.build(self.options)

    def objective(self, like: Tensor) -> Any:
        made = self.make()
        return made.to(like.device, like.dtype) if isinstance(made, nn.Module) else made

    def values(self, rows: _Rows, objective: Any = None) -> Tensor:
        """The objective's values on ``rows``, ``(n,)``."""
        objective = objective or self.objective(rows.student)
        given = {key: rows.inputs[key] for key in self.description.inputs}
        with _seeded():
            return objective(rows.student, rows.teacher if self.description.needs_teacher else None, **given)

    def gradient(self, rows: _Rows, upstream: Tensor | None = None, objective: Any = None) -> tuple[Tensor, Tensor]:
        """The values, and the student's gradient of Σ upstream · value (for a set of the mean, which is its value)."""
        student = rows.student.clone().requires_grad_()
        values = self.values(_Rows(student, rows.teacher, rows.inputs), objective)
        _require(values.requires_grad, "the values are detached from the student")
        upstream = torch.ones_like(values) / len(values) if upstream is None or self.in_sets else upstream
        (gradient,) = torch.autograd.grad(values, student, upstream, allow_unused=True)
        _require(gradient is not None, "the values do not depend on the student")
        return values.detach(), gradient


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a few numbers gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _contract(subject: _Subject) -> None:
    """What the core supplies is positional, options are keyword-only with defaults of their type, objectives are decorated."""
    factory, kind = subject.entry.factory, subject.entry.kind
    calls = [(factory, 0 if isinstance(factory, type) else SUPPLIED.get(kind, 0))]
    if kind == "objectives":
        described = isinstance(getattr(factory, "description", None), Description)
        _require(described, "it has neither @token_objective nor @row_set_objective")
        on = subject.description.on
        _require(on and set(on) <= set(SITES), f"on is {on}; allowed: some of {', '.join(SITES)}")
        calls += [(factory.forward, 3)] if isinstance(factory, type) else []  # type: ignore[attr-defined]
    for call, count in calls:
        parameters = inspect.signature(call).parameters.values()
        names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        _require(len(names) == count, f"it takes {names} by position, not {count} arguments; options are keyword-only")
        swallowing = [str(each) for each in parameters if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        inherited = isinstance(call, type) and call.__init__ is nn.Module.__init__  # type: ignore[misc]
        _require(inherited or not swallowing, f"{swallowing} would swallow unknown options")
        own = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in DRIVER_INPUTS]
        _require(call is factory or not own, f"forward takes {own}, which nobody fills; options belong to __init__")
    for option in subject.entry.options.values():
        fits = option.required or conforms(option.default, option.hint)
        _require(fits, f"the default {option.default!r} of option {option.name!r} is not {describe(option.hint)}")


# --- objectives ---


def _shape(subject: _Subject) -> None:
    for n in (1, 2, 5):
        values = subject.values(_Rows.random(n))
        _require(values.shape == (n,), f"{n} rows gave shape {tuple(values.shape)}, not ({n},)")


def _dtype(subject: _Subject) -> None:
    for dtype in (torch.float32, torch.float64):
        found = subject.values(_Rows.random().to(dtype)).dtype
        _require(found == dtype, f"{dtype} came back as {found}")


def _arguments_kept(subject: _Subject) -> None:
    """Nothing is changed in place, and nothing is remembered from one call to the next."""
    rows = _Rows.random()
    kept, objective = rows.map(torch.clone), subject.objective(rows.student)
    with torch.no_grad():
        values = subject.values(rows, objective).clone()
        again = subject.values(kept.map(torch.clone), objective)
    pairs = {"student": (rows.student, kept.student), "teacher": (rows.teacher, kept.teacher)}
    pairs |= {key: (rows.inputs[key], kept.inputs[key]) for key in ("labels", "input_ids", "sequence_ids")}
    changed = [key for key, (now, before) in pairs.items() if not torch.equal(now, before)]
    _require(not changed, f"it changed {', '.join(changed)} in place")
    _close(again, values, 1e-12, "a second call on the same rows gave other values")


def _precision(subject: _Subject) -> None:
    """float32 against float64, on values that bfloat16 holds exactly."""
    rows = _Rows.random(16, 97).to(torch.bfloat16)
    single, double = (subject.values(rows.to(dtype)) for dtype in (torch.float32, torch.float64))
    _close(single, double, 1e-4, "float32 is far from float64")


def _gradient(subject: _Subject) -> None:
    """Against central differences in float64 along random directions."""
    rows, generator = _Rows.random(4), torch.Generator().manual_seed(1)
    upstream = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    _, gradient = subject.gradient(rows, upstream)
    upstream = torch.full_like(upstream, 0.25) if subject.in_sets else upstream
    _require((gradient != 0).any(), "the gradient at the student is 0")
    for _ in range(4):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = [subject.values(_Rows(rows.student + step * direction, rows.teacher, rows.inputs)) for step in (1e-5, -1e-5)]
        expected, found = ((ends[0] - ends[1]) @ upstream / 2e-5).item(), (gradient * direction).sum().item()
        allowed = (1e-2 if subject.in_sets else 1e-5) * (gradient.norm() * direction.norm()).item()  # solvers stop early
        _require(abs(found - expected) <= allowed, f"autograd gives {found:.6g}, finite differences give {expected:.6g}")


def _finite(subject: _Subject) -> None:
    """Also for one row, on confident rows, where probabilities underflow, and where the student equals the teacher."""
    usual, large = _Rows.random().to(torch.float32), _Rows.random(scale=100.0).to(torch.float32)
    equal = _Rows(usual.teacher.clone(), usual.teacher, usual.inputs)
    one = _Rows.random(1).to(torch.float32)
    named = {"usual rows": usual, "one row alone": one, "rows around 100": large, "a student equal to its teacher": equal}
    for what, rows in named.items():
        for which, found in zip(("value", "gradient"), subject.gradient(rows), strict=True):
            _require(found.isfinite().all(), f"{what}: a {which} is not finite")


def _rows(subject: _Subject) -> None:
    """Row i of the result depends on row i alone; a set has the same mean in every order."""
    rows, order = _Rows.random(), torch.tensor([3, 0, 4, 1, 2])
    values, moved = subject.values(rows), subject.values(rows.map(lambda value: value[order]))
    if subject.in_sets:
        _close(moved.mean(), values.mean(), 1e-4, "the set in another order has another mean")
        return
    _close(moved, values[order], 1e-9, "rows in another order did not give their values in that order")
    _close(subject.values(rows.map(lambda value: value[:2])), values[:2], 1e-9, "the first two rows alone gave other values")
    other = _Rows.random(6).map(lambda value: value[:5])
    for changed in range(5):
        kept = torch.arange(5) != changed
        mixed = subject.values(rows.mixed(other, kept))
        _close(mixed[kept], values[kept], 1e-9, f"a change of row {changed} changed the value of another row")
        alone = subject.gradient(rows, (~kept).double())[1]
        _require((alone[kept] == 0).all(), f"the value of row {changed} has a gradient in another row")


def _teacher(subject: _Subject) -> bool | None:
    if not subject.description.needs_teacher:
        return False
    rows = _Rows.random()
    other = subject.values(_Rows(rows.student, rows.teacher.flip(1), rows.inputs))
    _require(not torch.equal(subject.values(rows), other), "another teacher gave the same values; needs_teacher=False says so")
    return None


def _equality(subject: _Subject) -> bool | None:
    """0 where the student equals the teacher, above 0 elsewhere: what the description says of the default options."""
    if not subject.description.zero_at_equality or subject.options:
        return False
    rows = _Rows.random(16)
    values = subject.values(_Rows(rows.teacher.clone(), rows.teacher, rows.inputs))
    worst = (values.mean() if subject.in_sets else values).abs().max().item()
    _require(worst <= 1e-6, f"a student equal to its teacher gave {worst:.4g}, not 0; zero_at_equality=False says so")
    mean = subject.values(rows).mean().item()
    _require(mean > 0, f"0 at equality but {mean:.4g} on random rows: training would lead away from the teacher")
    return None


def _reference(subject: _Subject) -> bool | None:
    if subject.reference is None:
        return False
    rows = _Rows.random()
    given = {key: rows.inputs[key] for key in subject.description.inputs}
    expected = torch.as_tensor(subject.reference(rows.student, rows.teacher, **given, **subject.options), dtype=torch.float64)
    found = subject.values(rows)
    found = found if expected.shape == found.shape else found.mean()
    first = [f"{side.reshape(-1)[0].item():.6g}" for side in (found, expected)]
    _close(found, expected, 1e-3 if subject.in_sets else 1e-7, f"it gave {first[0]} where the reference gave {first[1]}")
    return None


class _Positions(nn.Module):
    """A causal language model in shape only: its parameter ``states`` (B, S, H) is its input, and each position is by itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=1, hidden_size=WIDTH, num_attention_heads=1)
        self.config.get_text_config = lambda: self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states = nn.Parameter(torch.randn(2, TOKENS, WIDTH))
            names = ("q_proj", "k_proj", "v_proj")
            self.blocks = nn.ModuleList([nn.Sequential(OrderedDict((name, nn.Linear(WIDTH, WIDTH)) for name in names))])
            self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def at(self, site: str, places: tuple[Tensor, Tensor]) -> Tensor:
        """What a term on ``site`` reads at the positions ``places``, ``(n, W)``."""
        depth = {"queries": 1, "keys": 2}.get(site, 3)
        hidden = self.blocks[0][:depth](self.states[places])  # type: ignore[index]
        return self.head(hidden) if site == "logits" else hidden

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks[0](self.states))}


def _chunks(subject: _Subject) -> None:
    """The driver, in chunks of any size, gives the value and the gradients of all supervised rows at once."""
    _through_the_driver(subject, unsupervised=0.0)


def _unsupervised(subject: _Subject) -> None:
    """NaN at positions that are not supervised changes nothing."""
    _through_the_driver(subject, unsupervised=float("nan"))


def _through_the_driver(subject: _Subject, unsupervised: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(VOCABULARY, (2, TOKENS), generator=generator) for _ in range(2))
    labels[0, :3], labels[1, 5] = -100, -100
    everywhere = [(b, s) for b in range(2) for s in range(TOKENS - 1) if labels[b, s + 1] != -100]
    groups = [[place for place in everywhere if place[0] == b] for b in range(2)] if subject.in_sets else [everywhere]
    idle = torch.ones(2, TOKENS, dtype=torch.bool)
    idle[tuple(zip(*everywhere, strict=True))] = False
    for site in subject.description.on:
        student, teacher = _Positions(1), _Positions(2)
        for model in (student, teacher):
            model.states.data[idle] = unsupervised
        objective = subject.objective(student.states)
        trained = [student.states, student.head.weight, *(objective.parameters() if isinstance(objective, nn.Module) else ())]
        total = torch.zeros(())
        for group in groups:
            b, s = torch.tensor(group).unbind(1)
            inputs = {"labels": labels[b, s + 1], "input_ids": tokens[b, s], "sequence_ids": b, "progress": 0.25}
            rows = _Rows(student.at(site, (b, s)), teacher.at(site, (b, s)).detach(), inputs)
            total = total + subject.values(rows, objective).sum() / len(everywhere)
        expected = [total, *torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)]
        pairs = [] if site == "logits" else [(1, 1)]
        terms = nn.ModuleDict({"checked": Term("checked", objective, subject.description, site=site, pairs=pairs)})
        source = LocalTeacher(teacher, VOCABULARY, terms["checked"].teacher_features)  # type: ignore[arg-type]
        for size in (1, 3, 100):
            driver = Driver(terms, source, VOCABULARY, chunk_rows=size)
            driver.attach(student)
            with driver.step({"input_ids": tokens, "labels": labels}, progress=0.25):
                loss = student()["loss"]
            driver.detach()
            found = [loss, *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]
            for what, mine, whole in zip(("loss", *["gradient"] * len(trained)), found, expected, strict=True):
                _close(mine, whole, 1e-6, f"on {site} in chunks of {size} rows the {what} is not that of all rows at once")


def _no_host_synchronisation(subject: _Subject) -> None:
    """Runs where no value can be read: ``.item()``, ``.cpu()``, a branch on a value or a mask that selects raise."""
    for device in ["meta", *(["cuda"] if torch.cuda.is_available() else [])]:
        rows = _Rows.random().to(torch.float32).map(lambda value: value.to(device))  # noqa: B023
        objective = subject.objective(rows.student)
        subject.gradient(rows, objective=objective)
        if device == "cuda":  # once more, warm
            torch.cuda.set_sync_debug_mode("error")
            try:
                subject.gradient(rows, objective=objective)
            finally:
                torch.cuda.set_sync_debug_mode("default")


# --- the other kinds ---


def _pairs(subject: _Subject) -> None:
    worked = 0
    for depths in ((1, 1), (2, 2), (2, 6), (6, 12), (12, 12), (6, 4)):
        mapper = subject.make()
        try:
            pairs = list(mapper(*depths))
        except ValueError:
            continue
        whole = all(len(pair) == 2 and {type(block) for block in pair} == {int} for pair in pairs)
        _require(whole, f"{pairs} are not pairs of integers")
        _require(pairs == list(mapper(*depths)), f"the pairs for depths {depths} are not the same twice")
        try:
            worked += len(layer_pairs(subject.entry.name, mapper, *depths))
        except DistilyError as error:  # options may name blocks that small models lack
            _require(subject.options, str(error))
    _require(worked, "it refused every depth")


def _projection(subject: _Subject) -> None:
    worked = 0
    for widths in ((8, 8), (6, 8), (8, 6)):
        try:
            with _seeded():
                module = subject.make()(*widths)
        except ValueError:
            continue
        _require(isinstance(module, nn.Module), f"it made {type(module).__name__}, not a module")
        module, features = module.double(), torch.randn(2, 3, widths[0], dtype=torch.float64, requires_grad=True)
        projected = module(features)
        _require(projected.shape == (2, 3, widths[1]), f"widths {widths}: (2, 3, {widths[0]}) became {tuple(projected.shape)}")
        _close(module(features[1:, 1:2]), projected[1:, 1:2], 1e-9, "a row's projection depends on other rows")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(projected.square().sum(), [features, *trained], allow_unused=True)
        _require(all(each is not None and each.isfinite().all() for each in gradients), "a gradient is missing or not finite")
        worked += 1
    _require(worked, "it refused all widths")


def _normalization(subject: _Subject) -> None:
    normalize = subject.make()
    for dtype in (torch.float32, torch.float64):
        features = torch.randn(2, 3, 8, dtype=dtype)
        features[0, 0] = 0.0
        kept = features.clone()
        result = normalize(features)
        _require(result.shape == kept.shape, f"{tuple(kept.shape)} became {tuple(result.shape)}")
        _require(result.dtype == dtype, f"{dtype} became {result.dtype}")
        _require(result.isfinite().all(), "a value is not finite; one row was 0")
        _require(torch.equal(features, kept), "it changed its argument in place")
        _close(normalize(kept[1:, 1:2]), result[1:, 1:2], 1e-6, "a row depends on other rows")
        _require(normalize(kept[1].requires_grad_()).requires_grad, "it cuts the gradient off")
    normalize(torch.empty(2, 3, 8, device="meta"))


def _tiny_llama(vocabulary: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    with _seeded():
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, pad_token_id=None, **sizes)).eval()


def _snapshot(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same(before: Mapping[str, Tensor], model: Any, what: str) -> None:
    now = model.state_dict()
    _require(now.keys() == before.keys(), f"{what} changed state-dict keys: {sorted(now.keys() ^ before.keys())[:3]}")
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    _require(not changed, f"{what} changed {changed[:3]}")


def _preparation(subject: _Subject) -> None:
    """Keys and parameters are kept, and every parameter that trained before still does."""
    student = _tiny_llama()
    before, names = _snapshot(student), [name for name, each in student.named_parameters() if each.requires_grad]
    quantizer = subject.make()
    _require(isinstance(quantizer, Quantizer), "it is not a Quantizer")
    student = quantizer.prepare(student)
    _same(before, student, "prepare")
    output = student(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])
    output.loss.backward()
    gradients = {name: each.grad for name, each in student.named_parameters()}
    dead = [name for name in names if gradients.get(name) is None or not gradients[name].isfinite().all()]
    _require(not dead, f"parameters without a finite gradient: {dead[:3]}")


def _progress(subject: _Subject) -> None:
    """``on_progress`` depends on its arguments alone, so that a resumed run is the same."""
    results = []
    for steps in ((0, 5, 9, 2), (2,)):
        quantizer = subject.make()
        student = quantizer.prepare(_tiny_llama())
        for step in steps:
            quantizer.on_progress(student, step, 10)
        results.append(student(input_ids=torch.arange(8)[None]).logits)
    _require(torch.equal(*results), "step 2 after other steps is another model than step 2 at once")


def _conversion(subject: _Subject) -> None:
    quantizer = subject.make()
    student = quantizer.prepare(_tiny_llama())
    quantizer.on_progress(student, 10, 10)
    before = _snapshot(student)
    tensors, entry = quantizer.convert(student)
    _require(tensors and all(isinstance(each, Tensor) for each in tensors.values()), "convert gave no mapping of tensors")
    _require("quant_method" in entry, "the quantization_config that convert gave has no quant_method")
    _same(before, student, "convert")


def _metrics(subject: _Subject) -> None:
    from torch.utils.data import default_collate

    from distily.heldout import HeldOut
    from distily.models import load_tokenizer

    tokenizer = load_tokenizer("demo", "tokenizer")
    model, teacher = _tiny_llama(len(tokenizer)), _tiny_llama(len(tokenizer))
    before, evaluator = _snapshot(model), subject.make()
    _require(isinstance(evaluator, Evaluator), "it is not an Evaluator")
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))]
    for other in (teacher, None):
        held_out = HeldOut(texts, default_collate, other, len(tokenizer), 2)
        with tempfile.TemporaryDirectory() as folder:
            context = EvaluationContext(tokenizer, held_out.token_means, other is not None, 2, folder)
            results = [measure({subject.entry.name: copy.deepcopy(evaluator)}, model, context) for _ in range(2)]
        _require(results[0] or other is None, "it gave no number")
        _require(str(results[0]) == str(results[1]), f"the same model gave {results[0]}, then {results[1]}")
        _same(before, model, "the evaluator")
        _require(all(each.requires_grad for each in model.parameters()), "the evaluator froze the model")


def _a_run(subject: _Subject) -> None:
    logger = subject.make()
    _require(isinstance(logger, Logger), "it is not a Logger")
    if logger.report_to is not None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        _require(logger.report_to in INTEGRATION_TO_CALLBACK, f"transformers knows no sink {logger.report_to!r}")
        return
    metrics = [{"loss": 2.0, "grad_norm": 1.0}, {"eval_perplexity": float("inf")}, {"train_runtime": 1.0}, {}]
    given = copy.deepcopy(metrics)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        subject.make().finish()  # the run failed before it started
        logger.start({"objectives": [{"name": "forward_kl"}], "train": {"max_steps": 4}}, 4)
        for step, values in enumerate(given):
            logger.log(values, step)
        logger.finish()
    _require(given == metrics, "it changed the metrics that it was given")


CHECKS: dict[str, Sequence[Callable[[_Subject], bool | None]]] = {
    "objectives": (
        *(_shape, _dtype, _arguments_kept, _precision, _gradient, _finite, _rows, _teacher, _equality, _reference),
        *(_no_host_synchronisation, _chunks, _unsupervised),
    ),
    "layer_mappers": (_pairs,),
    "projectors": (_projection,),
    "normalizers": (_normalization,),
    "quantizers": (_preparation, _progress, _conversion),
    "evaluators": (_metrics,),
    "loggers": (_a_run,),
}
