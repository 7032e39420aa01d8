"""The conformance kit passes what keeps the contract, and names the check that each broken component fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distily.errors import DistilyError, RunError
from distily.hookspecs import KINDS
from distily.objectives import row_set_objective, token_objective
from distily.plugins import Offered, Package, Plugins, load
from distily.quantization import Quantizer
from distily.testing import (
    check_evaluator,
    check_layer_mapper,
    check_logger,
    check_normalizer,
    check_objective,
    check_package,
    check_projector,
    check_quantizer,
)

BUILT_IN = load()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """A sound objective, which the mutants below spoil."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def mmd(student: Tensor, teacher: Tensor) -> Tensor:
    """A sound row-set objective: the linear-kernel MMD of the probabilities, one part for each row."""
    gap = student.softmax(-1) - teacher.softmax(-1)
    return gap @ gap.mean(0)


def reference_kl(student: Tensor, teacher: Tensor) -> Any:
    s, t = (torch.exp(rows) / torch.exp(rows).sum(1, keepdim=True) for rows in (student, teacher))
    return (t * torch.log(t / s)).sum(1)


def test_sound_objectives_pass() -> None:
    assert "reference" in check_objective(token_objective(kl), reference=reference_kl)
    assert "equality" in check_objective(row_set_objective(mmd))


def test_a_learned_objective_passes() -> None:
    @token_objective(on=("hidden_states", "logits"), zero_at_equality=False)
    class Learned(nn.Module):
        def __init__(self, *, power: int = 2) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1))
            self.power = power

        def forward(self, student: Tensor, teacher: Tensor, *, progress: float) -> Tensor:
            return ((student - self.scale * teacher) ** self.power).mean(-1) + progress

    assert "chunks" in check_objective(Learned, power=4)


def test_an_objective_with_a_solver_of_its_own_for_the_cpu_passes() -> None:
    def solver(student: Tensor, teacher: Tensor) -> Tensor:
        if student.device.type == "cpu":
            assert kl(student, teacher).sum().item() > -1
        return kl(student, teacher)

    assert "no host synchronisation" in check_objective(token_objective(solver))


# --- mutants: name, the check that must catch it, the objective, its facts ---

Mutant = tuple[str, str, Callable[..., Any], dict[str, Any]]
TOKEN: list[Mutant] = []


def mutant(check: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        TOKEN.append((function.__name__, check, function, facts))
        return function

    return keep


@mutant("shape")
def mean_of_all_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher).mean()


@mutant("rows")
def mean_in_every_row(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher).mean().expand(student.shape[0])


@mutant("rows")
def divided_by_the_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher) / student.shape[0]


@mutant("shape")
def no_reduction_over_the_vocabulary(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher) ** 2


@mutant("rows", needs_teacher=False, zero_at_equality=False, temperature_scale=None)
def shifted_again(student: Tensor, teacher: Tensor | None, *, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(student, labels.roll(-1), reduction="none")


@mutant("shape", needs_teacher=False, zero_at_equality=False, temperature_scale=None)
def shifted_and_cut(student: Tensor, teacher: Tensor | None, *, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(student[:-1], labels[1:], reduction="none")


@mutant("rows")
def teacher_of_the_next_row(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher.roll(-1, 0)) * 1.0


@mutant("reference")
def swapped_arguments(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(teacher, student)


@mutant("reference")
def twice_as_large(student: Tensor, teacher: Tensor) -> Tensor:
    return 2 * kl(student, teacher)


@mutant("no host synchronisation")
def reads_a_value(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher) * (1.0 if student.abs().max().item() < 1e9 else 0.5)


@mutant("no host synchronisation")
def branches_on_a_value(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher) if (student != teacher).any() else (student - teacher).sum(-1)


@mutant("no host synchronisation")
def selects_by_a_mask(student: Tensor, teacher: Tensor) -> Tensor:
    values = kl(student, teacher)
    return values + 0.0 * values[values > 0].sum()


@mutant("no host synchronisation")
def forgets_the_device(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher) * torch.ones(student.shape[0])


@mutant("gradient")
def gradient_to_the_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student.detach(), teacher.requires_grad_())


@mutant("gradient")
def half_detached(student: Tensor, teacher: Tensor) -> Tensor:
    log_s = student.log_softmax(-1)
    return (log_s.exp().detach() * (log_s - teacher.log_softmax(-1))).sum(-1)


@mutant("gradient")
def detached(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher).detach()


@mutant("gradient")
def constant(student: Tensor, teacher: Tensor) -> Tensor:
    return (student * 0.0).sum(-1) + kl(student.detach(), teacher)


@mutant("gradient")
def straight_through_rounding(student: Tensor, teacher: Tensor) -> Tensor:
    rounded = student + (student.mul(64).round() / 64 - student).detach()
    return (rounded - teacher).square().mean(-1)


@mutant("arguments kept")
def changes_the_student(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student.data.sub_(student.data.amax(-1, keepdim=True)) + 0 * student, teacher)


@mutant("arguments kept")
def changes_the_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher.sub_(teacher.amax(-1, keepdim=True)))


@mutant("arguments kept", needs_teacher=False, zero_at_equality=False, temperature_scale=None)
def changes_the_labels(student: Tensor, teacher: Tensor | None, *, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(student, labels.clamp_(max=3), reduction="none")


@mutant("equality")
def wrong_sign(student: Tensor, teacher: Tensor) -> Tensor:
    return -kl(student, teacher)


@mutant("equality")
def no_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


@mutant("precision")
def loses_digits(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student + 1e6, teacher + 1e6)


@mutant("gradient")
def bf16_inside(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student.bfloat16(), teacher.bfloat16()).to(student.dtype) + 0 * student.sum(-1)


@mutant("dtype")
def always_float32(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student.float(), teacher.float())


@mutant("finite")
def nan_times_zero(student: Tensor, teacher: Tensor) -> Tensor:
    """0 · log 0 where a probability underflows."""
    t = teacher.softmax(-1)
    return (t * (t.log() - student.log_softmax(-1))).sum(-1)


@mutant("finite")
def root_at_zero(student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of √x at 0 is infinite, and 0 · ∞ is NaN: a student copied from its teacher would be destroyed."""
    return (student - teacher).square().sum(-1).sqrt()


@mutant("teacher")
def ignores_the_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    return student.square().mean(-1)


@mutant("contract")
def option_by_position(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    return beta * kl(student, teacher)


@mutant("contract")
def takes_any_option(student: Tensor, teacher: Tensor, **options: float) -> Tensor:
    return kl(student, teacher)


@mutant("contract")
def default_of_another_type(student: Tensor, teacher: Tensor, *, beta: float = "half") -> Tensor:  # type: ignore[assignment]
    return kl(student, teacher)


@pytest.mark.parametrize(("name", "check", "function", "facts"), TOKEN, ids=[entry[0] for entry in TOKEN])
def test_each_mutant_fails_its_check(name: str, check: str, function: Callable[..., Any], facts: dict[str, Any]) -> None:
    reference = reference_kl if check == "reference" else None
    with pytest.raises(AssertionError, match=f"^objective {name}: {check}: ") as caught:
        check_objective(token_objective(function, **facts), reference=reference)
    assert "\n" not in str(caught.value)


def seen_in_one_row(student: Tensor, teacher: Tensor) -> Tensor:
    return mmd(student, teacher) * torch.linspace(0.5, 1.5, student.shape[0], dtype=student.dtype, device=student.device)


def masked_by_multiplication(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances to all other rows; the row itself is masked by 0, but the root's gradient there is infinite."""
    others = 1 - torch.eye(student.shape[0], dtype=student.dtype, device=student.device)
    mine = (student[:, None] - student).square().sum(-1).sqrt() * others
    return (mine - (teacher[:, None] - teacher).norm(dim=-1)).square().mean(-1)


def needs_two_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """0 / 0 for one row: the driver gives such sets, too."""
    spread = [(rows - rows.mean(0)).square().sum(0) / (rows.shape[0] - 1) for rows in (student, teacher)]
    return (spread[0] - spread[1]).square().mean().expand(student.shape[0]).clone()


@pytest.mark.parametrize(
    ("function", "check"), [(seen_in_one_row, "rows"), (masked_by_multiplication, "gradient|finite"), (needs_two_rows, "finite")]
)
def test_row_set_mutants(function: Callable[..., Any], check: str) -> None:
    with pytest.raises(AssertionError, match=f"^objective {function.__name__}: ({check}): "):
        check_objective(row_set_objective(function))


def test_state_between_calls_is_found() -> None:
    @token_objective
    class Counting(nn.Module):
        calls = 0

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.calls += 1
            return kl(student, teacher) * self.calls

    with pytest.raises(AssertionError, match="arguments kept: a second call on the same rows gave other values"):
        check_objective(Counting)


def test_what_is_no_objective() -> None:
    def undecorated(student: Tensor, teacher: Tensor) -> Tensor:
        return kl(student, teacher)

    with pytest.raises(AssertionError, match="contract: it has neither @token_objective nor @row_set_objective"):
        check_objective(undecorated)


def test_options_are_checked_by_name() -> None:
    jsd = BUILT_IN.find("objectives", "jsd").factory
    with pytest.raises(DistilyError, match=r"option 'bta' is unknown; did you mean 'beta'"):
        check_objective(jsd, bta=0.3)
    assert "gradient" in check_objective(jsd, beta=0.3, normalize="beta")


# --- the other kinds ---


def beyond_the_last(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    return [(student_layers, teacher_layers + 1)]


def halves(student_layers: int, teacher_layers: int) -> list[tuple[float, int]]:
    return [(student_layers / 2, teacher_layers)]


def transposed(student_width: int, teacher_width: int) -> nn.Module:
    return nn.Linear(teacher_width, student_width)


def over_positions(student_width: int, teacher_width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(student_width, teacher_width), nn.Softmax(dim=-2))


def by_its_length(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def over_the_batch(features: Tensor) -> Tensor:
    return features - features.mean(0)


class NewKeys(Quantizer):
    def prepare(self, student: Any) -> Any:
        student.lm_head = nn.Sequential(student.lm_head)
        return student


class Frozen(Quantizer):
    def prepare(self, student: Any) -> Any:
        student.lm_head.requires_grad_(False)
        return student


class Stateful(Quantizer):
    calls = 0

    def prepare(self, student: Any) -> Any:
        student.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (1 + self.calls),))
        return student

    def on_progress(self, student: Any, step: int, max_steps: int) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("check", "factory", "seen"),
    [
        (check_layer_mapper, beyond_the_last, "layer mapper beyond_the_last: pairs: .*block 2 of the teacher does not exist"),
        (check_layer_mapper, halves, "layer mapper halves: pairs: .* are not pairs of integers"),
        (check_projector, transposed, "projector transposed: projection: it raised RuntimeError"),
        (check_projector, over_positions, "projection: a row's projection depends on other rows"),
        (check_normalizer, by_its_length, "normalizer by_its_length: normalization: a value is not finite"),
        (check_normalizer, over_the_batch, "normalization: a row depends on other rows"),
        (check_quantizer, NewKeys, "quantizer NewKeys: preparation: prepare changed state-dict keys"),
        (check_quantizer, Frozen, r"preparation: parameters without a finite gradient: \['lm_head.weight'\]"),
        (check_quantizer, Stateful, "progress: step 2 after other steps is another model"),
        (check_evaluator, Frozen, "evaluator Frozen: numbers: it is not an Evaluator"),
        (check_logger, Frozen, "logger Frozen: run: it is not a Logger"),
    ],
)
def test_broken_components_of_other_kinds(check: Callable[..., Any], factory: Any, seen: str) -> None:
    with pytest.raises(AssertionError, match=seen):
        check(factory)


def package(**components: Any) -> Plugins:
    offered = tuple(Offered("objectives", name, factory, "mine") for name, factory in components.items())
    return Plugins((Package("mine", "mine", "mine", "1", offered), Package("torn", "torn", "torn", "1", error="ImportError: no")))


def test_check_package_reports_all_components_then_all_failures() -> None:
    @token_objective
    def asks(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
        return kl(student, teacher) * beta

    broken = {"wrong": token_objective(wrong_sign), "flat": token_objective(constant)}
    lines: list[str] = []
    with pytest.raises(RunError) as caught:
        lines.extend(check_package(package(sound=token_objective(kl), **broken, asks=asks), "mine"))
    assert re.fullmatch(r"objective sound: 1\d checks passed", lines[0])
    assert lines[1].startswith("objective asks: not checked: option 'beta' has no default")
    failures = str(caught.value).splitlines()
    assert caught.value.exit_code == 1
    assert [failure.split(":")[0] for failure in failures] == ["objective wrong", "objective flat"]


def test_check_package_on_what_is_not_there() -> None:
    with pytest.raises(DistilyError, match="plugin 'mien' is unknown; did you mean 'mine'") as caught:
        list(check_package(package(), "mien"))
    assert caught.value.exit_code == 2
    with pytest.raises(RunError, match="plugin torn: ImportError: no"):
        list(check_package(package(), "torn"))
    with pytest.raises(RunError, match="plugin mine: it offers no component"):
        list(check_package(package(), "mine"))


def test_every_kind_has_checks() -> None:
    from distily.testing import CHECKS

    assert CHECKS.keys() == KINDS.keys()
